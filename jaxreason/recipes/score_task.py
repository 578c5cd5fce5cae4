"""Answers of a model to a task's examples: opened, asked greedily, scored, timed.

Prompts are the tokens that training put in front of a completion, template and all, so a run is
asked what it learned to answer.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxreason.data.pairs import Encoded, Example
from jaxreason.eval.task import Answer
from jaxreason.models.model import Model
from jaxreason.rollout import GREEDY, Stats, generate, prepare

Encode = Callable[[Any], Encoded]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How a task's examples are answered; tokens are always the most likely ones."""

    max_new_tokens: int = 64
    """Most tokens of an answer."""
    stop: tuple[str, ...] = ()
    """Strings before which an answer ends, for models that were never taught to end it."""
    slots: int = 8
    """Answers decoded at a time; with 1 each answer's time a token is measured."""


def prompt_tokens(encode: Encode, example: Example) -> list[int]:
    """The tokens before an example's first learned one."""
    encoded = encode(example)
    return list(encoded.tokens[: int(np.argmax(np.asarray(encoded.learned)))])


def asked_of(
    model: Model,
    encode: Encode,
    cfg: AnswerConfig,
    sha256: str,
    *,
    keep: Sequence[bool] | None = None,
) -> Callable[[Example], str]:
    """Returns what hashes all that an answer depends on (`eval.task.evaluate`'s `asked`).

    That is the model, the way in which it is asked, and the tokens of an example's prompt.

    Args:
        model, encode, cfg, keep: as of `answerer`.
        sha256: of the model's weights (`recipes.base.identity`).
    """
    depth = model.depth
    way = {
        "model": sha256,
        "dtype": model.dtype,
        "answers": dataclasses.asdict(cfg),
        "ends": sorted(model.eos_ids),
        "keep": None if keep is None else [bool(k) for k in keep],
        "skips": None if depth is None else [depth.scope, repr(depth.decision)],
    }
    fixed = json.dumps(way, sort_keys=True)

    def asked(example: Example) -> str:
        prompt = json.dumps(prompt_tokens(encode, example))
        return hashlib.sha256(f"{fixed} {prompt}".encode()).hexdigest()[:32]

    return asked


def answerer(
    model: Model,
    encode: Encode,
    cfg: AnswerConfig,
    *,
    keep: Sequence[bool] | None = None,
) -> Callable[[Sequence[Any]], list[Answer]]:
    """Returns what answers examples (`eval.task.evaluate`'s `complete`).

    Args:
        model: with parameters; its `depth` chooses layers where it has one.
        encode: `recipes.encode_examples.make_encode(model, data config)`.
        cfg: the settings.
        keep: a set of layers for every example in place of the model's choice.
    """
    ready = prepare(model, cfg.slots)

    def complete(examples: Sequence[Any]) -> list[Answer]:
        stats = Stats()
        done = generate(
            ready,
            [prompt_tokens(encode, example) for example in examples],
            GREEDY,
            max_new_tokens=cfg.max_new_tokens,
            stop=cfg.stop,
            slots=cfg.slots,
            keep=keep,
            stats=stats,
        )
        alone = cfg.slots == 1 and len(examples) == 1 and stats.decode_tokens > 0
        seconds = stats.decode_seconds / stats.decode_tokens if alone else None
        return [
            Answer(
                text=c.text.strip(),
                tokens=len(c.tokens),
                finish_reason=c.finish_reason,
                layers=None if c.layers is None else tuple(c.layers),
                seconds_per_token=seconds,
            )
            for c in done
        ]

    return complete


def times_per_token(
    model: Model,
    encode: Encode,
    examples: Sequence[Example],
    *,
    tokens: int = 48,
    warm_up: int = 1,
) -> list[tuple[float, float, int]]:
    """Seconds a decoded token at batch 1 as the model chooses, with all layers, and layers run.

    All layers run as they do without any skipping, in a program without conditionals. For each
    example both are measured, the first in turn, so that a machine that slows down slows both. Ends
    of text are passed over: every answer has `tokens` tokens, the first of which is the prompt's.
    The first `warm_up` examples are run beforehand and not counted.
    """
    ready = prepare(model, 1)
    every = dataclasses.replace(ready, depth=None)

    def seconds(example: Example, of: Model) -> tuple[float, int]:
        stats = Stats()
        (done,) = generate(
            of, [prompt_tokens(encode, example)], GREEDY, max_new_tokens=tokens,
            ignore_eos=True, slots=1, stats=stats,
        )  # fmt: skip
        layers = model.config.num_layers if done.layers is None else len(done.layers)
        return stats.decode_seconds / stats.decode_tokens, layers

    for example in examples[:warm_up]:
        seconds(example, ready)
        seconds(example, every)
    found = []
    for i, example in enumerate(examples):
        order = (ready, every) if i % 2 else (every, ready)
        times = {id(of): seconds(example, of) for of in order}
        own, layers = times[id(ready)]
        found.append((own, times[id(every)][0], layers))
    return found
