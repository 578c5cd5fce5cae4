"""What fine-tuning learns from: prompts with completions, conversations, and their tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its completion, as text; loss falls on the completion alone."""

    prompt: str
    """Conditioned on, never learned; may be empty."""
    completion: str
    """Learned, up to the end-of-text token that is put behind it."""
    name: str = ""
    """Says which example this is in messages and samples, for instance "train.jsonl:12"."""
    group: str = ""
    """Examples of one group lie on one side of the split; empty: the example is its own group."""

    @property
    def context(self) -> str:
        """What the example asks; equal questions lie on one side of the split."""
        return self.prompt or self.completion


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages with `role` and `content`, which a chat template turns into text."""

    messages: tuple[Mapping[str, Any], ...]
    """At least one of them the assistant's; loss falls on those alone."""
    name: str = ""
    """As `Example.name`."""
    group: str = ""
    """As `Example.group`."""

    @property
    def context(self) -> str:
        """What stands before the first reply."""
        roles = [message["role"] for message in self.messages]
        return repr([dict(m) for m in self.messages[: roles.index("assistant")]])


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The tokens of an example, and which of them are learned."""

    tokens: Sequence[int]
    """Ids, those that end a completion included."""
    learned: Sequence[bool]
    """One a token: whether it is a completion's, thus a target; the others are the prompt's."""
    completion_bytes: int
    """Size of the learned text in UTF-8."""
