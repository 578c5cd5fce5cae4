"""Examples of fine-tuning as tokens, with what is learned of them: pairs, and conversations.

The tokens are those that generation gives the model: a prompt is encoded as `rollout` encodes it,
by itself, and the completion's tokens stand behind those, the last one a token that ends
generation. Where a token of the whole text would lie across the border between the two, there is
none: the completion is encoded from its own beginning.
"""

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from jaxreason.core.errors import UserError
from jaxreason.core.text import encode_behind
from jaxreason.data.pairs import Conversation, Encoded, Example
from jaxreason.data.pairs_config import PairsConfig
from jaxreason.data.pairs_source import Item
from jaxreason.models.model import Model
from jaxreason.rollout import chat_template

DATE = "template_date"
"""Name in `Model.source` of the day that a run's chat template was told."""


def make_encode(model: Model, cfg: PairsConfig, *, date: str = "") -> Callable[[Item], Encoded]:
    """Returns what turns an example into tokens for `model`, which has a tokenizer.

    Args:
      model: whose tokenizer, template and end tokens are taken.
      cfg: says whether pairs are conversations, and which replies are learned.
      date: the day (YYYY-MM-DD) that a template is told which writes today's; empty: that of the
        run which `model` is from, else today.

    Raises:
      UserError: a template is asked for and the model has none; later, at an example: the template
        refuses its messages, or writes them so that no tokens are those of a reply; or a learned
        text writes out a token that ends generation, which would cut it there.
    """
    templates = _Conversations(model, cfg.learned_turns, date or model.source.get(DATE, ""))

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


def clock(date: str) -> dict[str, Callable[[str], str]]:
    """What a template is given to write the day `date` (YYYY-MM-DD), at midnight; nothing for "".

    Raises:
      UserError: `date` is no day.
    """
    if not date:
        return {}
    try:
        day = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    except ValueError:
        raise UserError(f"base.date is {date!r}, expected a day as YYYY-MM-DD") from None
    return {"strftime_now": day.strftime}


def _pair(model: Model, example: Example) -> Encoded:
    """The prompt as generation encodes it, then the completion, which goes on from its tokens."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    prompt = tokenizer.encode(example.prompt)
    if model.bos_id is not None and prompt[:1] != [model.bos_id]:  # It may be written out.
        prompt = [model.bos_id, *prompt]
    completion = encode_behind(tokenizer, example.prompt, example.completion)
    where = example.name or repr(example.prompt[:40])
    _check_ends(model, completion[:-1], f"{where}: the completion")
    if not completion or completion[-1] not in _ends(model):  # Else it is written at its place.
        completion.append(end_id(model))
    return Encoded(
        prompt + completion,
        [False] * len(prompt) + [True] * len(completion),
        len(example.completion.encode()),
    )


def _ends(model: Model) -> set[int]:
    return {*model.eos_ids, end_id(model)}


def _check_ends(model: Model, tokens: Sequence[int], what: str) -> None:
    """Raises UserError where tokens of a text to learn end generation before the text does."""
    ends = _ends(model)
    at = next((i for i, token in enumerate(tokens) if token in ends), None)
    if at is not None:
        assert model.tokenizer is not None
        text = model.tokenizer.decode(tokens[:at])[-30:]
        raise UserError(
            f"{what} writes out a token that ends generation (id {tokens[at]}) behind {text!r}, "
            "and would end there; take it out of the text, or leave the example out"
        )


class _Conversations:
    """A model's template, and where in its text the replies stand."""

    def __init__(self, model: Model, turns: str, date: str):
        self._model, self._turns = model, turns
        self._given: dict[str, Any] = {**chat_template.special_tokens(model), **clock(date)}
        self._ends = _ends(model)

    def check(self) -> str:
        if not self._model.chat_template:
            raise UserError(
                f"the model {self._model.name!r} has no chat template; set data.chat=false and "
                "give prompts and completions, or use an instruction-tuned model"
            )
        return self._model.chat_template

    def _render(self, messages: Sequence[Any], prompt: bool) -> str:
        template = self.check()
        return chat_template.render(template, messages, self._given, add_generation_prompt=prompt)

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
        for i in replies:
            own = tokenizer.encode(messages[i]["content"])
            _check_ends(self._model, own, f"the reply, message {i},")
        whole = self._render(messages[: replies[-1] + 1], False)
        begins = [self._prefix(self._render(messages[:i], True), whole, i) for i in replies]
        ends = [
            self._prefix(self._render(messages[: i + 1], False), whole, i) for i in replies[:-1]
        ]
        cuts = zip(begins, [*ends, len(whole)], strict=True)
        tokens, places = self._tokens("", whole, [place for cut in cuts for place in cut])
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

    def _tokens(self, before: str, text: str, places: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of a text behind another, and their number before each place (in characters).

        A place is exact where the text up to it has the first tokens of the whole. The text is cut
        at a place that is not, and what follows is encoded from there. So the first learned reply,
        and every one whose place is exact, stands behind the tokens that generation gives it;
        behind a cut, later replies see the cut where generation, which encodes their prompt as one
        text, has the token across it.
        """
        tokenizer = self._model.tokenizer
        assert tokenizer is not None
        tokens, found = encode_behind(tokenizer, before, text), []
        for i, place in enumerate(places):
            head = encode_behind(tokenizer, before, text[:place])
            if tokens[: len(head)] != head:
                tokens, found = self._tokens(before, text[:place], places[:i])
                rest = [later - place for later in places[i:]]
                tail, more = self._tokens(before + text[:place], text[place:], rest)
                return tokens + tail, found + [len(tokens) + number for number in more]
            found.append(len(head))
        return tokens, found
