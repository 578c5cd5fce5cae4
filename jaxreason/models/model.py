"""A model that is ready to be used: parameters, shape, tokenizer, and how to talk to it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxreason.core.text import Tokenizer
from jaxreason.models.decoder import ModelConfig


@dataclasses.dataclass(frozen=True)
class Model:
    """A plain record, made by `recipes.open_model.open_model`; it has no behaviour."""

    params: Any
    """Tree of `decoder.specs(config)`, on its devices."""
    config: ModelConfig
    """Shape of the decoder; its forms (`kernels` and the like) are `auto`."""
    tokenizer: Tokenizer | None = None
    """Reads special tokens written out in a text as their ids; None where the source has none."""
    chat_template: str | None = None
    """Jinja template of a conversation; untrusted text, to be rendered in a sandbox only."""
    eos_ids: tuple[int, ...] = ()
    """Ids that end a completion."""
    bos_id: int | None = None
    """Id that the model's tokenizer puts in front of a plain prompt; None where it puts none."""
    dtype: str = "float32"
    """Compute precision, `float32` or `bfloat16`."""
    name: str = ""
    """What to call it: the folder's or the file's name."""
    family: str | None = None
    """`model_type` of the Hugging Face config that it came from; None for a model trained here."""
    context: int | None = None
    """Longest context, in tokens, that the source states."""
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    """Small files of the source that travel along, by name: tokenizer, template, generation."""
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Facts about where it is from, for reports."""
    depth: Any = None
    """What chooses its layers by prompt (`depth.decision.Skipper`); None runs them all."""
