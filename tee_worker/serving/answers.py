"""An answer as text: a sequence's tokens decoded as they come, cut before a stop string, taken apart into what is said, thought and called."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

from tee_worker.serving.chosen import Chosen
from tee_worker.serving.engine import End, Generation
from tee_worker.serving.resumption import AnswerSoFar, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_parsing import ResponseParser


@dataclass(frozen=True, slots=True)
class Call:
    """Of a function, as the model asks for it; ``arguments``: JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    logprobs: tuple[tuple[Chosen, int], ...] = ()
    """Of the tokens that it came of, each with where its text begins in the answer's."""
    arrivals: int = 0
    """How many had come of the answer's."""
    stage: Stage = Stage.GENERATING


@dataclass(slots=True)
class Answer:
    """One choice of a request, while it is generated and after."""

    index: int
    generation: Generation
    text: TextStream
    parser: ResponseParser | None = None
    """Takes the text apart, where the model's is known to have parts."""
    finish_reason: str = ""
    whole: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[tuple[Chosen, int]] = field(default_factory=list)
    _unsaid: str = ""
    """What the parser was given and has made nothing of yet."""
    resumed: AnswerSoFar | None = None
    """What was told of it already, by another server."""
    told_again: list[Piece] = field(default_factory=list)
    """What had been told then."""
    told_arrivals: int = 0
    """Of those that came, how many are in what was handed on; and how far that is. Set by whoever hands it on."""
    told_stage: Stage = Stage.GENERATING
    _arrivals: list[list[int]] = field(default_factory=list)
    _held: list[tuple[Chosen, int]] = field(default_factory=list)
    """Of tokens whose text may yet be cut."""

    def __post_init__(self) -> None:
        if self.resumed is not None:
            self._read_again(self.resumed)

    def _read_again(self, resumed: AnswerSoFar) -> None:
        """Be as it was when so much had been told."""
        for tokens in resumed.arrivals:
            self.generation.tokens.extend(tokens)
            self.told_again += filter(None, [self._arrived(tokens)])
        if resumed.stage is not Stage.GENERATING:
            self.told_again += filter(None, [self._rest()])
        self.told_arrivals, self.told_stage = len(resumed.arrivals), resumed.stage

    def told(self, piece: Piece | None) -> None:
        """``piece`` is handed on; None: that it is at its end."""
        if piece is None:
            self.told_arrivals, self.told_stage = len(self._arrivals), Stage.END
        else:
            self.told_arrivals, self.told_stage = piece.arrivals, piece.stage

    def arrived(self, first: int, last: int) -> tuple[list[list[int]], list[Chosen]]:
        """The tokens of so many arrivals, and their log probabilities where they are asked for."""
        before, count = (sum(len(one) for one in part) for part in (self._arrivals[:first], self._arrivals[first:last]))
        return self._arrivals[first:last], self.generation.sequence.chooser.chosen[before : before + count]

    @property
    def tokens(self) -> int:
        """Generated so far."""
        return len(self.generation.tokens)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The parts in their order. Raises what the generation does. Who stops reading ends the generation."""
        generation = self.generation
        ended = False
        try:
            if self.finish_reason:  # all was told before
                return
            if not self.text.stopped:
                async with contextlib.aclosing(generation.arrivals()) as arrivals:
                    async for tokens in arrivals:
                        piece = self._arrived(tokens)
                        if piece is not None:
                            yield piece
                        if self.text.stopped:
                            break
            ended = not self.text.stopped
            piece = self._rest()
            if piece is not None:
                yield piece
        finally:
            if not ended:
                generation.cancel()

    def _arrived(self, tokens: list[int]) -> Piece | None:
        """What comes of tokens more, which the generation has counted."""
        generation, first = self.generation, len(self.text.offsets)
        self._arrivals.append(tokens)
        text = "".join([self.text.feed(token, token in generation.sequence.ends) for token in tokens])
        self._held += zip(generation.sequence.chooser.chosen[first : self.tokens], self.text.offsets[first:], strict=False)
        return self._piece(text, self._certain(self.text.certain))

    def _rest(self) -> Piece | None:
        """What comes of it when no token comes any more."""
        rest = self.text.rest()
        piece = self._piece(rest, self._certain(self.text.limit), final=True)
        self.finish_reason = "tool_calls" if self.calls else End.STOP if self.text.stopped else self.generation.end
        return piece

    def _certain(self, end: float) -> list[tuple[Chosen, int]]:
        """Of those that are held, the ones whose text begins before ``end``; they are so no more."""
        found = [one for one in self._held if one[1] < end]
        self._held = self._held[len(found) :]
        return found

    async def all(self) -> Answer:
        """Read to the end: itself."""
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass
        return self

    def _piece(self, text: str, logprobs: Sequence[tuple[Chosen, int]], *, final: bool = False) -> Piece | None:
        said, reasoning, calls = self._parts(text, final=final)
        self.whole += said
        self.reasoning += reasoning
        self.calls += calls
        self.logprobs += logprobs
        if not (said or reasoning or calls or logprobs):
            return None
        return Piece(said, reasoning, tuple(calls), tuple(logprobs), len(self._arrivals), Stage.TEXT if final else Stage.GENERATING)

    def _parts(self, text: str, *, final: bool) -> tuple[str, str, list[Call]]:
        if self.parser is None:
            return text, "", []
        self._unsaid += text
        try:
            events = list(self.parser.feed(text)) if text else []
            found = parts_of(events)
            self._unsaid = _after(self._unsaid, found)
            if final:
                said, reasoning, calls = parts_of(self.parser.finalize()[1])
                found = found[0] + said, found[1] + reasoning, found[2] + calls
            return found
        except Exception:  # a call that is none, or is not whole: it is said as it was written
            self.parser = None
            return self._unsaid, "", []


def _after(text: str, found: tuple[str, str, list[Call]]) -> str:
    """What of ``text`` comes after what was ``found`` in it."""
    said, reasoning, calls = found
    if calls:
        return ""
    for one in (reasoning, said):
        text = text[text.find(one) + len(one) :] if one in text else text
    return text


def parts_of(events: Sequence[dict[str, Any]]) -> tuple[str, str, list[Call]]:
    """What Hugging Face's parser of answers tells: text, reasoning, calls."""
    from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks

    said, reasoning, calls = "", "", []
    for one in response_events_to_chunks(list(events)):
        if isinstance(one, ToolCall):
            arguments = one.arguments if isinstance(one.arguments, str) else json.dumps(one.arguments)
            calls.append(Call(one.name, arguments))
        elif isinstance(one, ReasoningText):
            reasoning += one
        else:
            said += one
    return said, reasoning, calls


class TextStream:
    """Tokens to text, piece by piece: whole characters, and nothing that may yet turn out to be the beginning of a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, special: bool = False) -> None:
        """``special``: with the text of special tokens."""
        self._tokenizer = tokenizer
        self._stream = DecodeStream([], skip_special_tokens=not special)
        self._special = special
        self._stops = stops
        self._tokens: list[int] = []
        self._text = ""
        """So far, what is held included."""
        self._held = ""
        self._length = 0
        """Of the text so far."""
        self.offsets: list[int] = []
        """Where each token's text begins."""
        self.stopped = False
        self.limit: float = float("inf")
        """Where the text was cut."""

    def feed(self, token: int, end: bool = False) -> str:
        """One token more; what of the text is certain now."""
        self.offsets.append(self._length)
        if self.stopped:
            return ""
        if end and not self._special:
            self.limit = self._length  # its own text is none
            return ""
        self._tokens.append(token)
        try:
            text = self._stream.step(self._tokenizer._tokenizer, token)
        except Exception:  # bytes that are no character confuse it, for good
            self._stream = DecodeStream([], skip_special_tokens=not self._special)
            text = self._stream.step(self._tokenizer._tokenizer, token)
        return self._more(text or "")

    @property
    def certain(self) -> float:
        """How much of the text is certain: what begins before it is not cut."""
        return self.limit if self.stopped else self._length - len(self._held)

    def rest(self) -> str:
        """What is held, once no token comes any more: also a character of which only some bytes came."""
        if self.stopped:
            return ""
        whole = str(self._tokenizer.decode(self._tokens, skip_special_tokens=not self._special))
        certain = self._more(whole[self._length :] if whole.startswith(self._text) else "")
        if self.stopped:
            return certain
        held, self._held = self._held, ""
        return certain + held

    def _more(self, text: str) -> str:
        self._text += text
        self._length = len(self._text)
        self._held += text
        return self._certain()

    def _certain(self) -> str:
        held = self._held
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            at = min(found)
            self.stopped = True
            self.limit = self._length - len(held) + at
            self._held = ""
            return held[:at]
        keep = max([_overlap(held, stop) for stop in self._stops], default=0)
        cut = len(held) - keep
        self._held = held[cut:]
        return held[:cut]


def _overlap(text: str, stop: str) -> int:
    """Of the end of ``text``, how much may be the beginning of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
