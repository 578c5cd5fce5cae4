"""The host's side of one request: its tokens so far, their text, and why they ended."""

from collections.abc import Sequence
from typing import Any

from jaxreason.rollout.requests import Completion, Delta, FinishReason, Request
from jaxreason.rollout.text_stream import Detokenizer, StopBuffer


class Reply:
    """Collects the tokens of a request; `tokenizer` None gives no text (and finds no stop)."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], request: Request):
        self._request, self._eos = request, frozenset(eos_ids)
        self._text = Detokenizer(tokenizer.decode, request.tokens) if tokenizer else None
        self._stop = StopBuffer(request.stop)
        self._pieces: list[str] = []
        self._given = 0
        self._told = False
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.sampling_logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.layers: list[int] | None = None

    def add(self, token: int, logprob: float, sampling_logprob: float) -> None:
        """Takes the next token."""
        token = int(token)
        self.tokens.append(token)
        self.logprobs.append(float(logprob))
        self.sampling_logprobs.append(float(sampling_logprob))
        if token in self._eos and not self._request.ignore_eos:
            self.finish("eos")
            return
        if self._text is not None:
            self._pieces.append(self._stop.add(self._text.add(token)))
        if self._stop.hit:
            self.finish("stop")
        elif len(self.tokens) >= self._request.max_new_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """Ends the reply, unless it has ended."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self._pieces.append(self._stop.end())

    def take_delta(self) -> Delta | None:
        """The text that is new since the last call, or None; the end is told once."""
        text, self._given = "".join(self._pieces[self._given :]), len(self._pieces)
        if self._told or not (text or self.finish_reason):
            return None
        self._told = self.finish_reason is not None
        request = self._request
        return Delta(
            prompt_index=request.prompt_index, sample_index=request.sample_index,
            text=text, finish_reason=self.finish_reason,
        )  # fmt: skip

    def completion(self) -> Completion:
        """The result."""
        assert self.finish_reason is not None
        return Completion(
            prompt_index=self._request.prompt_index,
            sample_index=self._request.sample_index,
            tokens=self.tokens,
            text="".join(self._pieces),
            finish_reason=self.finish_reason,
            logprobs=self.logprobs,
            sampling_logprobs=self.sampling_logprobs,
            layers=self.layers,
        )
