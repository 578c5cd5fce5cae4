"""Text from a model.

    python -m jaxreason.generate --checkpoint=MODEL --prompt="Once upon a time"
    python -m jaxreason.generate --checkpoint=MODEL --message="What is a monad?" --temperature=0.7
    python -m jaxreason.generate --checkpoint=MODEL --prompts=FILE.jsonl --out=FILE.jsonl
    python -m jaxreason.generate --checkpoint=MODEL --chat
    python -m jaxreason.generate --checkpoint=MODEL --prompt=TEXT --keep_layers=0-9,29 --skip_stats
    python -m jaxreason.generate --checkpoint=MODEL --prompt=TEXT --self_speculative --exit_layer=8

MODEL is a run's folder, a checkpoint, a Hugging Face folder or a .gguf file. Times go to stderr.
Exit codes: 0 done, 2 bad input (one line says what).
"""

import dataclasses
import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Literal

from etils import epath

from jaxreason.config_types import fields, members, read, type_name
from jaxreason.core.errors import UserError, nearest
from jaxreason.core.platform import compilation_cache, prepare


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The flags."""

    checkpoint: str = ""
    """A run's folder, a checkpoint, a Hugging Face folder or a .gguf file."""
    prompt: str = ""
    """Text to go on from, as it is."""
    message: str = ""
    """A user's message, put into the model's chat template."""
    prompts: str = ""
    """JSONL file, a line {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}."""
    chat: bool = False
    """Talks in the terminal: /reset, /quit, Ctrl-C stops a reply."""
    out: str = ""
    """JSONL file for the completions: text, tokens, why each ended, log-probabilities on request.
    Without it a prompt's text goes to the terminal, and completions of `prompts` as JSONL."""
    system: str = ""
    """System message of `chat` and `message`."""
    max_new_tokens: int = 256
    """Most tokens a completion may have."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keeps the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the most likely tokens that together have this probability; 1 keeps all."""
    min_p: float = 0.0
    """Keeps tokens at least this fraction as likely as the most likely."""
    stop: tuple[str, ...] = ()
    """A string before which the text ends; may be given several times."""
    n: int = 1
    """Completions a prompt."""
    seed: int = 0
    """Of the draws: the same seed gives the same completions."""
    logprobs: bool = False
    """Log-probabilities of the tokens, in nats: the model's, and those of the sampling."""
    slots: int = 8
    """Completions decoded at a time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; auto: bfloat16 where the hardware has it."""
    skip: Literal["auto", "off"] = "auto"
    """Whether a model with routers skips the layers that they choose by prompt; off runs all."""
    keep_layers: str = ""
    """The only layers that run, in place of the routers' choice: numbers and ranges from 0, as in
    0-9,20,29 (or none)."""
    skip_scope: Literal["decode_only", "everywhere"] = "decode_only"
    """With keep_layers: whether the prompt runs all layers or these only."""
    batching: Literal["union", "group"] = "union"
    """Completions with different layers: decoded together, running the layers that any of them
    needs, or those of one set at a time."""
    skip_stats: bool = False
    """Shows on stderr which layers ran for each completion, how many, and the time a token."""

    self_speculative: bool = False
    """Some layers draft tokens and all verify them: the full model's text, faster where the draft
    is good. Without exit_layer and draft_layers, the model's own set or routers say which."""
    exit_layer: int = 0
    """The first so many layers draft (early exit); 0: see draft_layers."""
    draft_layers: str = ""
    """The layers that draft, as in 0-9,20,29 (or none)."""
    draft_tokens: int = 6
    """Tokens drafted before a verification."""
    draft_stats: bool = False
    """Shows on stderr how many draft tokens were accepted, tokens a verification, time a token."""

    def validate(self) -> None:
        """Raises UserError for flags that do not go together."""
        if not self.checkpoint:
            raise UserError("--checkpoint is missing; give a run's folder, a model folder or .gguf")
        given = [n for n in ("prompt", "message", "prompts", "chat") if getattr(self, n)]
        if len(given) != 1:
            got = " and ".join(f"--{n}" for n in given) or "none"
            raise UserError(f"expected one of --prompt, --message, --prompts, --chat; got {got}")
        for name in ("n", "slots", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; expected at least 1")
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"--n={self.n} completions at temperature 0 are equal; set one higher")
        if self.chat and (self.out or self.n > 1 or self.logprobs):
            raise UserError("--chat streams one reply a turn; it takes no --out, --n or --logprobs")
        if self.skip == "off" and self.keep_layers:
            raise UserError("--skip=off runs all layers and --keep_layers only some; give one")
        if self.skip_scope == "everywhere" and not self.keep_layers:
            raise UserError("--skip_scope belongs to --keep_layers; routers have their own scope")
        self._validate_drafts()
        same = self.keep_layers or self.exit_layer or self.draft_layers or self.skip == "off"
        if self.batching == "group" and (same or self.chat):
            raise UserError("--batching=group is for completions of different layers; leave it out")
        if self.system and not (self.chat or self.message):
            raise UserError("--system belongs to --chat or --message")

    def _validate_drafts(self) -> None:
        names = ("exit_layer", "draft_layers", "draft_tokens", "draft_stats")
        given = [n for n in names if getattr(self, n) != getattr(GenerateConfig, n)]
        if not self.self_speculative and given:
            raise UserError(f"--{given[0]} belongs to --self_speculative; give both")
        if self.self_speculative and (self.keep_layers or self.skip_stats):
            got = "keep_layers" if self.keep_layers else "skip_stats"
            raise UserError(
                f"--self_speculative gives the full model's text, and --{got} belongs to skipping; "
                "see --draft_layers and --draft_stats"
            )
        own = self.self_speculative and not (self.exit_layer or self.draft_layers)
        if own and self.skip == "off":
            raise UserError(
                "--skip=off drops the model's own choice of layers, which drafts; leave it out, "
                "or give --exit_layer or --draft_layers"
            )
        if self.exit_layer and self.draft_layers:
            raise UserError("--exit_layer and --draft_layers both name the draft; give one")
        if self.draft_tokens < 1:
            raise UserError(f"--draft_tokens is {self.draft_tokens}; expected at least 1")


def parse(argv: Sequence[str]) -> GenerateConfig:
    """The flags `--name=value` (a switch such as `--chat` alone is true), checked."""
    known, given = fields(GenerateConfig), {}
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not arg.startswith("--") or name not in known:
            hint = nearest(name, known) or f"; expected --{', --'.join(known)}"
            raise UserError(f"unknown flag {arg.partition('=')[0]!r}{hint}")
        kind = known[name][0]
        if not equals and kind is not bool:
            raise UserError(f"--{name} needs a value: --{name}=...")
        if name == "stop":
            given[name] = (*given.get(name, ()), _utf8(name, text))
        elif kind is str:
            given[name] = _utf8(name, text)
        else:
            given[name] = read(text if equals else "true", kind, f"--{name}")
    config = GenerateConfig(**given)
    config.validate()
    return config


def _utf8(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"--{name} is not valid UTF-8") from None
    return text


def usage() -> str:
    """The text of `--help`."""
    lines = [(__doc__ or "").strip(), ""]
    for name, (kind, field, doc) in fields(GenerateConfig).items():
        shown = "" if field.default in ("", (), False) else f" = {field.default}"
        lines += [f"--{name}  {' | '.join(map(type_name, members(kind)))}{shown}", f"    {doc}"]
    return "\n".join(lines)


def keep_set(text: str, num_layers: int, flag: str = "keep_layers") -> tuple[bool, ...] | None:
    """Whether each layer runs, from `--keep_layers` or another flag; None where it is not given.

    Raises:
        UserError: it names no layers, or some that the model does not have.
    """
    if not text:
        return None
    kept: set[int] = set()
    for part in [] if text == "none" else text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise UserError(f"--{flag}={text}: {part!r} is no layer; expected such as 0-9,29")
        span = range(int(first), int(last or first) + 1)
        if not span or span[-1] >= num_layers:
            raise UserError(
                f"--{flag}={text}: {part!r} is not within the model's layers 0 to {num_layers - 1}"
            )
        kept.update(span)
    return tuple(layer in kept for layer in range(num_layers))


def open_model(path: str, dtype: str) -> Any:
    """Opens what `--checkpoint` names."""
    from jaxreason.recipes.open_model import open_model

    return open_model(path, dtype=dtype)


def read_prompts(path: str) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a JSONL file of prompts with their numbers.

    Raises:
        UserError: the file or a line of it is not as expected.
    """
    try:
        lines = epath.Path(path).read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: cannot read {path!r} ({error})") from None
    result = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON ({error})") from None
        if not (isinstance(entry, dict) and _is_prompt(entry)):
            raise UserError(
                f'{path}, line {number}: expected {{"prompt": TEXT}} or {{"messages": '
                f'[{{"role": ..., "content": ...}}, ...]}}, got {line[:60]!r}'
            )
        result.append((number, entry))
    if not result:
        raise UserError(f"--prompts: {path!r} has no prompts")
    return result


def _is_prompt(entry: dict) -> bool:
    messages = entry.get("messages")
    if "prompt" in entry:
        return "messages" not in entry and isinstance(entry["prompt"], str)
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m
            for m in messages
        )
    )


def _prompts(cfg: GenerateConfig, model: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """Prompts for `generate` (text, or the tokens of a rendered chat), and what each came from."""
    from jaxreason.rollout.chat_template import render_chat

    if cfg.prompt:
        return [cfg.prompt], [{"prompt": cfg.prompt}]
    if cfg.message:
        system = [{"role": "system", "content": cfg.system}] if cfg.system else []
        entries = [(0, {"messages": [*system, {"role": "user", "content": cfg.message}]})]
    else:
        entries = read_prompts(cfg.prompts)
    prompts = []
    for number, entry in entries:
        try:
            text = entry.get("prompt")
            prompts.append(render_chat(model, entry["messages"]) if text is None else text)
        except UserError as error:
            where = f"{cfg.prompts}, line {number}: " if number else ""
            raise UserError(f"{where}{error}") from None
    return prompts, [entry for _, entry in entries]


def run(cfg: GenerateConfig) -> None:
    """Does what the flags say."""
    from jaxreason.rollout import Sampling, SelfSpeculation, Stats, generate
    from jaxreason.rollout.chat import chat

    sampling = Sampling(
        temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, min_p=cfg.min_p
    )
    sampling.validate()
    if cfg.prompts:
        read_prompts(cfg.prompts)  # Its errors come before the model is read.
    if cfg.out:
        _write([], cfg.out, keep=False)
    model, stats = open_model(cfg.checkpoint, cfg.dtype), Stats()
    if cfg.skip == "off":
        model = dataclasses.replace(model, depth=None)
    keep = keep_set(cfg.keep_layers, model.config.num_layers)
    speculation = None
    if cfg.self_speculative:
        layers = keep_set(cfg.draft_layers, model.config.num_layers, "draft_layers")
        speculation = SelfSpeculation(
            exit_layer=cfg.exit_layer, layers=layers, tokens=cfg.draft_tokens
        )
    try:
        if cfg.chat:
            chat(
                model, sampling, system=cfg.system, max_new_tokens=cfg.max_new_tokens,
                stop=cfg.stop, seed=cfg.seed, keep=keep, skip_scope=cfg.skip_scope,
                speculation=speculation, stats=stats, out=sys.stdout,
            )  # fmt: skip
            return
        prompts, sources = _prompts(cfg, model)
        streamed = not (cfg.prompts or cfg.out or cfg.n > 1)
        done = generate(
            model, prompts, sampling, max_new_tokens=cfg.max_new_tokens, n=cfg.n, seed=cfg.seed,
            stop=cfg.stop, logprobs=cfg.logprobs, keep=keep, skip_scope=cfg.skip_scope,
            batching=cfg.batching, speculation=speculation, slots=cfg.slots, stats=stats,
            stream=_show if streamed else None,
        )  # fmt: skip
        if cfg.prompts or cfg.out:
            _write([_record(c, sources[c.prompt_index]) for c in done], cfg.out)
            return
        for c in done:
            print("" if streamed else f"--- {c.sample_index} ({c.finish_reason})\n{c.text}")
            if cfg.logprobs:
                _table(c, model)
    finally:
        print(stats.summary(), file=sys.stderr)
        if cfg.draft_stats and stats.drafts:
            print(stats.drafts.table(), file=sys.stderr)
        if cfg.skip_stats:
            none = "all layers ran: no routers were used, and --keep_layers is not given"
            print(stats.layers.table() if stats.layers else none, file=sys.stderr)


def _show(delta) -> None:
    sys.stdout.write(delta.text)
    sys.stdout.flush()


def _record(completion: Any, source: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in dataclasses.asdict(completion).items() if v is not None}
    return {**source, **kept}


def _write(records: Sequence[dict[str, Any]], out: str, *, keep: bool = True) -> None:
    """Writes JSONL under a temporary name first; `keep` False only finds out whether it can."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if not out:
        sys.stdout.write(text)
        return
    path = epath.Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary = path.parent / f".{path.name}.{os.getpid()}"
        temporary.write_text(text)
        temporary.replace(path) if keep else temporary.unlink()
    except OSError as error:
        raise UserError(f"--out: cannot write {out!r} ({error.strerror or error})") from None


def _table(completion: Any, model: Any) -> None:
    print("token\tlogprob\tsampling\ttext")
    for token, own, drawn in zip(
        completion.tokens, completion.logprobs, completion.sampling_logprobs
    ):
        print(f"{token}\t{own:.4f}\t{drawn:.4f}\t{model.tokenizer.decode([token])!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    prepare(restart=argv is None, onednn=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--help" in argv or "-h" in argv:
            print(usage())
            return 0
        config = parse(argv)
        compilation_cache()
        run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # The reader of our output has gone (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
