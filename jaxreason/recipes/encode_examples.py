"""Examples of fine-tuning as tokens, with what is learned of them: pairs, and conversations.

The tokens are those that generation gives the model: a prompt is encoded as `rollout` encodes it,
and a completion ends with a token that ends generation.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxreason.core.errors import UserError
from jaxreason.data.pairs import Conversation, Encoded, Example
from jaxreason.data.pairs_config import PairsConfig
from jaxreason.data.pairs_source import Item
from jaxreason.models.model import Model
from jaxreason.rollout import chat_template


def make_encode(model: Model, cfg: PairsConfig) -> Callable[[Item], Encoded]:
    """Returns what turns an example into tokens for `model`, which has a tokenizer.

    Raises:
      UserError: a template is asked for and the model has none; later, at an example: the template
        refuses its messages, or writes them so that no tokens are those of a reply.
    """
    templates = _Conversations(model, cfg.learned_turns)

    def encode(item: Item) -> Encoded:
        if isinstance(item, Conversation):
            return templates.encode(item)
        if cfg.chat:
            return templates.encode(as_conversation(item, cfg.system))
        return _pair(model, item)

    if cfg.chat:
        templates.check()
    return encode


def as_conversation(example: Example, system: str = "") -> Conversation:
    """A pair as a conversation: the prompt is the user's, the completion the assistant's."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": example.prompt}]
    messages += [{"role": "assistant", "content": example.completion}]
    return Conversation(tuple(messages), example.name, example.group)


def end_id(model: Model) -> int:
    """The token put behind a completion: the tokenizer's end of text where it ends generation."""
    assert model.tokenizer is not None
    own = model.tokenizer.eos_id
    return own if own in model.eos_ids or not model.eos_ids else model.eos_ids[0]


def _pair(model: Model, example: Example) -> Encoded:
    """Prompt and completion encoded each by itself: in generation too the prompt ends there."""
    assert model.tokenizer is not None
    first = [] if model.bos_id is None else [model.bos_id]
    prompt = first + model.tokenizer.encode(example.prompt)
    completion = [*model.tokenizer.encode(example.completion), end_id(model)]
    return Encoded(
        prompt + completion,
        [False] * len(prompt) + [True] * len(completion),
        len(example.completion.encode()),
    )


class _Conversations:
    """A model's template, and where in its text the replies stand."""

    def __init__(self, model: Model, turns: str):
        self._model, self._turns = model, turns
        self._special = chat_template.special_tokens(model)
        self._ends = {*model.eos_ids, end_id(model)}

    def check(self) -> str:
        if not self._model.chat_template:
            raise UserError(
                f"the model {self._model.name!r} has no chat template; set data.chat=false and "
                "give prompts and completions, or use an instruction-tuned model"
            )
        return self._model.chat_template

    def _render(self, messages: Sequence[Any], prompt: bool) -> str:
        template = self.check()
        return chat_template.render(template, messages, self._special, add_generation_prompt=prompt)

    def encode(self, item: Conversation) -> Encoded:
        """The conversation up to its last reply; what the template writes behind that is cut."""
        try:
            return self._encode(item)
        except UserError as error:
            if not item.name:
                raise
            raise UserError(f"{item.name}: {error}") from None

    def _encode(self, item: Conversation) -> Encoded:
        tokenizer, messages = self._model.tokenizer, item.messages
        assert tokenizer is not None
        replies = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"]]
        if self._turns == "last":
            replies = replies[-1:]
        whole = self._render(messages[: replies[-1] + 1], False)
        begins = [self._prefix(self._render(messages[:i], True), whole, i) for i in replies]
        ends = [
            self._prefix(self._render(messages[: i + 1], False), whole, i) for i in replies[:-1]
        ]
        cuts = zip(begins, [*ends, len(whole)], strict=True)
        tokens, places = self._tokens(whole, [place for cut in cuts for place in cut])
        learned = [False] * len(tokens)
        for begin, stop in zip(places[::2], places[1::2], strict=True):
            # What stands behind a token that ends generation was never the model's to write.
            stop = next((i + 1 for i in range(begin, stop) if tokens[i] in self._ends), stop)
            learned[begin:stop] = [True] * (stop - begin)
        if not any(learned[places[-2] :]):
            raise UserError("no token of the text belongs to the last reply; leave the line out")
        last = len(learned) - learned[::-1].index(True)
        tokens, learned = list(tokens[:last]), learned[:last]
        if tokens[-1] not in self._ends:  # The template closes replies with no such token.
            tokens.append(end_id(self._model))
            learned.append(True)
        size = sum(len(messages[i]["content"].encode()) for i in replies)
        return Encoded(tokens, learned, size)

    def _prefix(self, text: str, whole: str, i: int) -> int:
        """The length of what is written up to a place of message `i`, which the whole begins with.

        Templates that drop the reasoning of earlier replies write those otherwise once more turns
        follow: then no text of the whole is what the model would have seen.
        """
        if not whole.startswith(text):
            raise UserError(
                f"the chat template writes the text up to message {i} otherwise once its reply or "
                "more turns follow; set data.learned_turns=last, or give single turns"
            )
        return len(text)

    def _tokens(self, whole: str, places: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of the text, and the number of tokens before each place (in characters).

        A place is exact where the text before it has the first tokens of the whole. A token that
        lies across a place counts as behind it (the reply has a part of it). Tokenizers that tell
        no offsets encode the parts between the places by themselves.
        """
        tokenizer = self._model.tokenizer
        assert tokenizer is not None
        tokens = tokenizer.encode(whole)
        before = [tokenizer.encode(whole[:place]) for place in places]
        exact = [tokens[: len(head)] == head for head in before]
        if all(exact):
            return tokens, [len(head) for head in before]
        if hasattr(tokenizer, "encode_with_offsets"):
            tokens, offsets = tokenizer.encode_with_offsets(whole)  # type: ignore
            ends = [end for _, end in offsets]
            found = [
                len(head)
                if same
                else next((i for i, end in enumerate(ends) if end > place), len(ends))
                for head, same, place in zip(before, exact, places, strict=True)
            ]
            return tokens, found
        tokens, found = [], []
        for begin, end in zip([0, *places], [*places, len(whole)], strict=True):
            tokens += tokenizer.encode(whole[begin:end])
            found.append(len(tokens))
        return tokens, found[:-1]
