"""What a trained model writes: greedy continuations of held-out text, for the run's report."""

from typing import Any

import jax
from etils import epath

from jaxreason.data.pipeline import Dataset
from jaxreason.models.model import Model
from jaxreason.models.model_config import ModelConfig, on_any_device
from jaxreason.rollout import GREEDY, generate
from jaxreason.train.manifest import atomic_write
from jaxreason.train.report import SAMPLE_SEPARATOR

MARK = "▸"
"""Stands between a prompt and what the model made of it."""


def write_samples(
    directory: epath.PathLike,
    params: Any,
    config: ModelConfig,
    held_out: Dataset,
    *,
    dtype: str,
    count: int = 4,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    prompts: list[list[int]] | None = None,
    eos_ids: tuple[int, ...] = (),
    depth: Any = None,
) -> list[str]:
    """Writes `samples.txt`, which the report shows: a prompt, the mark, its continuation.

    A prompt is the beginning of a row of the first held-out batch, so runs on the same text are
    asked the same. It compiles the programs of generation, which takes seconds; the device holds
    one more copy of the parameters meanwhile.

    Args:
      directory: the run's folder.
      params: tree of `decoder.specs(config)`, on one device.
      config: the model; its forms (`kernels` and the like) are those of generation anyway.
      held_out: whose batches the prompts are from.
      dtype: compute precision, `float32` or `bfloat16`.
      count: prompts; fewer where the batch has fewer rows of that length.
      prompt_tokens: tokens of a prompt.
      new_tokens: most tokens of a continuation.
      prompts: to ask in place of the batch's rows, which are then not read.
      eos_ids: what ends a continuation; none: the tokenizer's own end of text.
      depth: what chooses the model's layers by prompt; None runs them all.

    Returns:
      The texts; none, and nothing is written, on several devices or hosts, and for a model with
      too few learned positions.
    """
    if jax.process_count() > 1 or any(len(leaf.devices()) > 1 for leaf in jax.tree.leaves(params)):
        return []
    if config.positions == "learned":
        longest = max(map(len, prompts), default=0) if prompts else prompt_tokens
        new_tokens = min(new_tokens, config.max_positions - longest)
        if new_tokens < 1:
            return []
    if prompts is None:
        batch = held_out.batch(0)
        whole = (batch["segment_ids"][:, :prompt_tokens] == 1).all(axis=1)
        prompts = [list(map(int, row)) for row in batch["tokens"][whole][:count, :prompt_tokens]]
    if not prompts:
        return []
    tokenizer = held_out.tokenizer
    model = Model(
        params=params,
        config=on_any_device(config),
        tokenizer=tokenizer,
        eos_ids=eos_ids or (tokenizer.eos_id,),
        dtype=dtype,
        depth=depth,
    )
    done = generate(model, prompts, GREEDY, max_new_tokens=new_tokens, slots=max(len(prompts), 1))
    texts = [
        f"{tokenizer.decode(prompt)}{MARK}{completion.text}".replace("\f", " ")
        for prompt, completion in zip(prompts, done, strict=True)
    ]
    if texts:
        file = epath.Path(directory) / "samples.txt"
        atomic_write(file, SAMPLE_SEPARATOR.join(texts))
    return texts
