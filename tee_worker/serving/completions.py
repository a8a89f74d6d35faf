"""``/v1/completions``: prompts, as text or token ids, to answers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tee_worker.serving.answers import TextStream
from tee_worker.serving.chosen import Chosen
from tee_worker.serving.engines import turns_with_length
from tee_worker.serving.fields import MOST_CHOICES, CompletionRequest, Refused
from tee_worker.serving.merged import merged
from tee_worker.serving.resumption import Resumption
from tee_worker.serving.scoring import prompt_logprobs

if TYPE_CHECKING:
    from tee_worker.serving.service import Service

_NEW_TOKENS = 16
"""As OpenAI's endpoint has it where a request does not say."""


@dataclass(slots=True)
class _Prompt:
    ids: list[int]
    text: str
    scored: list[Chosen] | None = None


class Completion:
    """One request."""

    def __init__(self, service: Service, asked: CompletionRequest, name: str, resumption: Resumption | None = None) -> None:
        """Begin to generate, or go on. Raises :class:`Refused`."""
        self._service = service
        self._id = f"cmpl-{name}"
        self._chunks_before = 0 if resumption is None else resumption.chunks
        self.created = int(time.time()) if resumption is None else resumption.created
        self._echo = bool(asked.echo)
        self._logprobs = asked.logprobs
        self._usage_in_stream = bool(asked.stream_options and asked.stream_options.include_usage)
        limit = _NEW_TOKENS if asked.max_tokens is None else asked.max_tokens
        if asked.stream_options is not None and not asked.stream:
            raise Refused("stream_options: only with stream", "stream_options")
        if limit == 0 and not self._echo:
            raise Refused("max_tokens: at least one token must be asked for, unless the prompt is asked back (echo)", "max_tokens")
        self._prompts = [self._prompt(one) for one in _prompts_of(asked.prompt)]
        self._choices = asked.n or 1
        if len(self._prompts) * self._choices > MOST_CHOICES:
            raise Refused(f"prompt: at most {MOST_CHOICES} answers in one request, prompts times n", "prompt")
        sampling, stops = service.sampling(asked, asked.logprobs), service.stops(asked.stop)
        for prompt in self._prompts:
            if limit or len(prompt.ids) > service.max_context:
                service.room(prompt.ids)
        if self._echo and self._logprobs is not None and turns_with_length(service.model):
            raise Refused(
                "echo: with logprobs it is not possible for this model, whose rotary embedding depends on the length of a pass", "echo"
            )
        self.answers = [
            service.answer(place * self._choices + index, prompt.ids, sampling.of(index), limit, stops, resumption=resumption)
            for place, prompt in enumerate(self._prompts)
            for index in range(self._choices)
            if limit
        ]

    def _prompt(self, told: str | list[int]) -> _Prompt:
        tokenizer = self._service.tokenizer
        if isinstance(told, str):
            self._service.check_length(told, "prompt")
            return _Prompt([int(one) for one in tokenizer(told)["input_ids"]], told)
        vocabulary = self._service.model.config.get_text_config().vocab_size
        if any(not 0 <= one < vocabulary for one in told):
            raise Refused(f"prompt: token ids of this model are 0 to {vocabulary - 1}", "prompt")
        return _Prompt(told, str(tokenizer.decode(told)))

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt.ids) for prompt in self._prompts)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        completion = sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion, "total_tokens": self.prompt_tokens + completion}

    async def whole(self) -> dict[str, Any]:
        """The response, once all answers are there."""
        await self._score()
        await asyncio.gather(*[answer.all() for answer in self.answers])
        choices = []
        for index in range(len(self._prompts) * self._choices):
            answer = self.answers[index] if self.answers else None
            prompt = self._prompts[index // self._choices]
            text = (prompt.text if self._echo else "") + ("" if answer is None else answer.whole)
            logprobs = self._told(prompt if self._echo else None, [] if answer is None else answer.logprobs)
            choices.append(
                {"index": index, "text": text, "logprobs": logprobs, "finish_reason": "length" if answer is None else answer.finish_reason}
            )
        return {**self._head(), "choices": choices, "usage": self.usage}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The response as a stream."""
        heads = range(len(self._prompts) * self._choices) if self._echo else range(0)
        if self._chunks_before < len(heads):
            await self._score()
        for index in heads[self._chunks_before :]:
            prompt = self._prompts[index // self._choices]
            yield self._chunk(index, prompt.text, self._told(prompt, []), "length" if not self.answers else None)
        again = sum(len(answer.told_again) for answer in self.answers)
        async with contextlib.aclosing(merged(self.answers)) as pieces:
            async for answer, piece in pieces:
                if piece is None:
                    yield self._chunk(answer.index, "", None, answer.finish_reason)
                else:
                    yield self._chunk(
                        answer.index, piece.text, self._told(None, piece.logprobs, self._prompts[answer.index // self._choices]), None
                    )
        if self._usage_in_stream and self._chunks_before <= len(heads) + again + len(self.answers):
            yield {**self._head(), "choices": [], "usage": self.usage}

    async def _score(self) -> None:
        if not self._echo or self._logprobs is None:
            return
        service = self._service
        for prompt in self._prompts:
            work = functools.partial(prompt_logprobs, service.model, prompt.ids, self._logprobs, service.max_context)
            prompt.scored = await service.engine.alone(work)

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self.created, "model": self._service.name}

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        return {**self._head(), "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}]}

    def _told(self, prompt: _Prompt | None, found: Sequence[tuple[Chosen, int]], after: _Prompt | None = None) -> dict[str, Any] | None:
        """Log probabilities in the form of this endpoint: of the prompt's tokens, where it is given, and of those ``found``.

        ``after``: the prompt that these come after, where it was told before.
        """
        if self._logprobs is None:
            return None
        text_of = self._service.text_of
        tokens: list[str] = []
        logprobs: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        if prompt is not None:
            stream = TextStream(self._service.tokenizer, [])
            for token, one in zip(prompt.ids, [None, *(prompt.scored or [])], strict=False):
                stream.feed(token)
                tokens.append(text_of(token))
                logprobs.append(None if one is None else one.logprob)
                top.append(None if one is None else self._top(one))
            offsets += stream.offsets
        shown = prompt or (after if self._echo else None)
        at = 0 if shown is None else len(shown.text)
        for chosen, offset in found:
            tokens.append(text_of(chosen.token))
            logprobs.append(chosen.logprob)
            top.append(self._top(chosen))
            offsets.append(at + offset)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _top(self, one: Chosen) -> dict[str, float]:
        """By text; of tokens with the same, the likeliest."""
        found: dict[str, float] = {}
        for token, logprob in one.top:
            found.setdefault(self._service.text_of(token), logprob)
        return found


def _prompts_of(told: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One or several prompts, each as text or token ids. Raises :class:`Refused` for none."""
    if isinstance(told, str):
        return [told]
    if not told:
        raise Refused("prompt: is empty", "prompt")
    if isinstance(told[0], int):
        return [told]
    return list(told)
