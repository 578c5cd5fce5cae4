"""What is asked of generation, and what comes back."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

from jaxreason.core.errors import UserError
from jaxreason.depth.decision import Scope
from jaxreason.rollout.sampling import Sampling

FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to make. Its random draws follow from the seed and the two indices alone."""

    tokens: tuple[int, ...]
    """The prompt."""
    prompt_index: int = 0
    sample_index: int = 0
    max_new_tokens: int = 256
    """The end-of-text token counts as one."""
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """Strings before which the text ends; the tokens that make one up stay in `tokens`."""
    ignore_eos: bool = False
    """Whether to go on after an end-of-text token (for measurements)."""
    keep: tuple[bool, ...] | None = None
    """The layers that run, one truth value a layer. None: those that the model's `depth` chooses,
    or all where it has none."""
    skip_scope: Scope = "decode_only"
    """With `keep`: whether the prompt too runs these layers only (`everywhere`, as a model without
    the others would) or all of them. The first token is drawn from what the prompt gives."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A request's result.

    `tokens` are all that were sampled, the end-of-text token and those of a stop string included;
    `text` has neither, nor the bytes of a character left unfinished at the end. `logprobs` are
    nats, one a token, under the model's distribution (temperature 1, no filter, what training
    computes), `sampling_logprobs` under the distribution they were drawn from.
    """

    prompt_index: int
    sample_index: int
    tokens: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    sampling_logprobs: list[float] | None = None
    layers: list[int] | None = None
    """Numbers of the layers that its tokens after the first ran; None where none may be skipped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """New text of one completion, for a `stream` callback; the last one has the finish reason."""

    prompt_index: int
    sample_index: int
    text: str
    finish_reason: FinishReason | None = None


def encode_prompts(model: Any, prompts: Sequence[str | Sequence[int]]) -> list[tuple[int, ...]]:
    """The tokens of prompts given as text, or as tokens, which are taken as they are.

    A text gets the beginning-of-text token where the model's tokenizer puts one.

    Raises:
        UserError: a prompt is empty or has a token that the model does not know.
    """
    texts = [p for p in prompts if isinstance(p, str)]
    if texts and model.tokenizer is None:
        raise UserError("the model has no tokenizer; give prompts as lists of tokens")
    encoded = iter(model.tokenizer.encode_batch(texts) if texts else ())
    first = (model.bos_id,) if model.bos_id is not None else ()
    result = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            tokens = tuple(next(encoded))
            # A rendered chat begins with the token written out.
            tokens = tokens if tokens[:1] == first else first + tokens
        else:
            tokens = tuple(int(t) for t in prompt)
        if not tokens:
            raise UserError(f"prompt {i} is empty and the model has no beginning-of-text token")
        if bad := [t for t in tokens if not 0 <= t < model.config.vocab_size]:
            raise UserError(
                f"prompt {i} has token {bad[0]}; the model knows 0 to {model.config.vocab_size - 1}"
            )
        result.append(tokens)
    return result


def check_depth(depth: Any, config: Any) -> None:
    """Raises UserError for routers that do not belong to a model of this shape."""
    if depth is None:
        return
    got, expected = depth.routers["w"].shape, (config.num_layers, config.d_model)
    if got != expected:
        raise UserError(
            f"the routers are for {got[0]} layers of width {got[1]}; the model has {expected[0]} "
            f"of width {expected[1]}: open it with its own routers"
        )
    depth.decision.check(config.num_layers, depth.scope)


def check_request(request: Request, model: Any) -> None:
    """Raises UserError for a request that cannot be served.

    Only a model with learned positions has a longest context.
    """
    request.sampling.validate()
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {request.max_new_tokens}; expected at least 1")
    if any(request.stop) and model.tokenizer is None:
        raise UserError("the model has no tokenizer; stop strings need one")
    layers = getattr(model.config, "num_layers", None)
    if request.keep is not None and len(request.keep) != layers:
        raise UserError(
            f"keep has {len(request.keep)} truth values; the model has {layers} layers: give one "
            "for each"
        )
    if request.skip_scope not in get_args(Scope):
        expected = ", ".join(get_args(Scope))
        raise UserError(f"skip_scope is {request.skip_scope!r}; expected one of {expected}")
    total = len(request.tokens) + request.max_new_tokens
    limit = getattr(model.config, "max_positions", 0)
    if getattr(model.config, "positions", "rope") == "learned" and total > limit:
        raise UserError(
            f"prompt {request.prompt_index} has {len(request.tokens)} tokens and may get "
            f"{request.max_new_tokens} new ones; the model has {limit} positions: shorten one"
        )
