"""EleutherAI's lm-eval harness on our models; needs the extra `eval`.

    python -m jaxreason.lm_eval --model jaxreason --model_args checkpoint=MODEL --tasks ...

takes the arguments of the `lm_eval` command, which itself knows no models from outside; a program
of one's own calls `register()` and then `lm_eval.simple_evaluate(model="jaxreason", ...)`. MODEL is
what `jaxreason.generate` takes.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

from jaxreason.core.errors import UserError
from jaxreason.core.platform import compilation_cache, prepare

DEFAULT_LENGTH = 2048  # As the harness' own models have it where nothing states a context.
SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "min_p"}


@functools.cache
def register() -> type:
    """Makes `jaxreason` known to the harness and returns the adapter class.

    Raises:
        UserError: lm-eval is not installed.
    """
    try:
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from lm_eval.models.utils import normalize_gen_kwargs
    except ImportError as error:
        raise UserError(f"lm-eval is missing ({error}); pip install 'jaxreason[eval]'") from None

    from jaxreason.eval.likelihood import continuation_logprobs
    from jaxreason.rollout import Request, Sampling, run
    from jaxreason.rollout import prepare as prepare_model
    from jaxreason.rollout.chat_template import render, special_tokens

    @register_model("jaxreason")
    class JaxReasonLM(TemplateLM):
        """One of our models, or one that we can open, for the harness.

        Args:
            checkpoint: a run's folder, a checkpoint, a Hugging Face folder or a .gguf file.
            dtype: compute precision: auto, float32 or bfloat16.
            batch_size: rows of a forward, and completions decoded at a time.
            max_length: longest context in tokens; None takes the model's.
            seed: of the draws, where a task asks for sampling.
            model: an open `models.model.Model` in place of `checkpoint`.
        """

        def __init__(
            self,
            checkpoint: str = "",
            dtype: str = "auto",
            batch_size: int | str = 8,
            max_length: int | None = None,
            seed: int = 0,
            model: Any = None,
            max_batch_size: int | None = None,
            device: str | None = None,
        ):
            super().__init__()
            del max_batch_size, device  # Of the command's; JAX has chosen the device.
            if model is None:
                if not checkpoint:
                    raise UserError("--model_args lacks checkpoint=MODEL")
                from jaxreason.recipes.open_model import check_whole, open_model

                model = open_model(str(checkpoint), dtype=dtype)
                check_whole(model, str(checkpoint), "scoring with the harness")
            if model.tokenizer is None:
                raise UserError(f"{checkpoint} has no tokenizer, and lm-eval speaks text")
            self.batch_size = 8 if batch_size in ("auto", None) else int(batch_size)
            self._model = prepare_model(model, slots=self.batch_size)
            stated = model.context or model.config.max_positions or DEFAULT_LENGTH
            self.max_length = int(max_length or stated)
            self._seed = seed

        @property
        def eot_token_id(self) -> int:
            return self._model.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            bos = self._model.tokenizer.bos_id
            return self.eot_token_id if bos is None else bos

        @property
        def tokenizer_name(self) -> str:
            return self._model.tokenizer.fingerprint

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return self._model.chat_template if chat_template else None

        def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
            if not self._model.chat_template:
                raise UserError(f"the model {self._model.name!r} has no chat template")
            return render(
                self._model.chat_template, chat_history, special_tokens(self._model),
                add_generation_prompt=add_generation_prompt,
            )  # fmt: skip

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs
        ) -> list[int]:
            tokens, bos = self._model.tokenizer.encode(string), self._model.bos_id
            if add_special_tokens is False or bos is None or tokens[:1] == [bos]:
                return tokens
            return [bos, *tokens]

        def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            results = continuation_logprobs(
                self._model, pairs, batch_size=self.batch_size, max_length=self.max_length
            )
            for (key, _, _), result in zip(requests, results):
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, result)
            return results

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for i, (text,) in enumerate(request.args for request in requests):
                parts = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text), prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length, context_len=1,
                )  # fmt: skip
                for part in map(utils.make_disjoint_window, parts):
                    windows.append((None, *part))
                    owners.append(i)
            totals = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows)):
                totals[owner] += value
            for request, total in zip(requests, totals):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            asked = [self._request(i, *request.args) for i, request in enumerate(requests)]
            texts = [c.text for c in run(
                self._model, asked, seed=self._seed, slots=self.batch_size, chunk=8
            )]  # fmt: skip
            for request, text in zip(requests, texts):
                self.cache_hook.add_partial("generate_until", request.args, text)
            return texts

        def _request(self, index: int, context: str, gen_kwargs: dict) -> Request:
            given: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs)}
            stop, limit = given.pop("until"), given.pop("max_gen_toks")
            if unknown := sorted(set(given) - SAMPLING):
                raise UserError(
                    f"the task's generation_kwargs have {unknown[0]!r}; "
                    f"expected until, max_gen_toks, {', '.join(sorted(SAMPLING))}"
                )
            if self.max_length <= limit:
                raise UserError(
                    f"the task asks for {limit} new tokens and the longest context is "
                    f"{self.max_length}; set max_gen_toks lower"
                )
            greedy = not given.pop("do_sample")
            if greedy:
                given = {"temperature": 0.0}
            given["top_k"] = max(0, int(given.get("top_k") or 0))
            tokens = self.tok_encode(context)[-(self.max_length - limit) :]
            return Request(
                tokens=tuple(tokens or [self.prefix_token_id]), prompt_index=index,
                max_new_tokens=limit, sampling=Sampling(**given), stop=tuple(filter(None, stop)),
            )  # fmt: skip

    return JaxReasonLM


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the harness' command line with our models known; returns the exit code."""
    prepare(restart=argv is None, onednn=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        compilation_cache()
        sys.argv = ["lm_eval", *arguments]
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # The module imported by name: the harness' registry holds its class.
    from jaxreason.lm_eval import main as imported_main

    sys.exit(imported_main())
