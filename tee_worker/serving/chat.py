"""``/v1/chat/completions``: messages to answers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta

from tee_worker.serving.answers import Answer, Call, Piece
from tee_worker.serving.chosen import Chosen
from tee_worker.serving.fields import ChatRequest, Refused
from tee_worker.serving.merged import merged
from tee_worker.serving.messages import messages_of
from tee_worker.serving.resumption import Resumption

if TYPE_CHECKING:
    from tee_worker.serving.service import Service


class Chat:
    """One request."""

    def __init__(self, service: Service, asked: ChatRequest, name: str, resumption: Resumption | None = None) -> None:
        """Begin to generate, or go on. Raises :class:`Refused`."""
        self._service = service
        self._id = f"chatcmpl-{name}"
        self._chunks_before = 0 if resumption is None else resumption.chunks
        self.created = int(time.time()) if resumption is None else resumption.created
        self._usage_in_stream = bool(asked.stream_options and asked.stream_options.include_usage)
        if asked.stream_options is not None and not asked.stream:
            raise Refused("stream_options: only with stream", "stream_options")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refused("top_logprobs: only with logprobs", "top_logprobs")
        if asked.max_tokens == 0:
            raise Refused("max_tokens: at least one token must be asked for", "max_tokens")
        self.prompt = chat_prompt(
            service, asked.messages, None if asked.tool_choice == "none" else asked.tools or None, asked.chat_template_kwargs or {}
        )
        if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
            raise Refused("max_tokens: max_completion_tokens says something else: give one of them", "max_tokens")
        limit = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling, stops = service.sampling(asked, logprobs), service.stops(asked.stop)
        service.room(self.prompt)
        self.answers = [
            service.answer(index, self.prompt, sampling.of(index), limit, stops, parser_of(service, self.prompt, asked.tools), resumption)
            for index in range(asked.n or 1)
        ]

    @property
    def prompt_tokens(self) -> int:
        """Of the messages, as the model reads them."""
        return len(self.prompt)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        completion = sum(answer.tokens for answer in self.answers)
        return {"prompt_tokens": len(self.prompt), "completion_tokens": completion, "total_tokens": len(self.prompt) + completion}

    async def whole(self) -> dict[str, Any]:
        """The response, once all answers are there."""
        await asyncio.gather(*[answer.all() for answer in self.answers])
        return {**self._head("chat.completion"), "choices": [self._choice(answer) for answer in self.answers], "usage": self.usage}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.whole, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.whole or None
            message["tool_calls"] = [self._call(answer, place, call) for place, call in enumerate(answer.calls)]
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs, answer),
            "finish_reason": answer.finish_reason,
        }

    def _call(self, answer: Answer, place: int, call: Call) -> dict[str, Any]:
        return {
            "id": f"call_{self._id}_{answer.index}_{place}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def _logprobs(self, found: Sequence[tuple[Chosen, int]], answer: Answer) -> dict[str, Any] | None:
        if not answer.generation.sequence.chooser.tells:
            return None
        return {"content": [self._logprob(one) for one, _ in found], "refusal": None}

    def _logprob(self, one: Chosen) -> dict[str, Any]:
        return {**self._token(one.token, one.logprob), "top_logprobs": [self._token(*other) for other in one.top]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._service.text_of(token)
        # A part of a character has no bytes that the tokenizer would tell.
        return {"token": text, "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode()), "logprob": logprob}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The response as a stream."""
        for answer in self.answers[self._chunks_before :]:
            yield self._chunk(answer, {"role": "assistant", "content": ""})
        told = [len(answer.calls) for answer in self.answers]
        again = sum(len(answer.told_again) for answer in self.answers)
        async with contextlib.aclosing(merged(self.answers)) as pieces:
            async for answer, piece in pieces:
                if piece is None:
                    yield self._chunk(answer, {}, finish_reason=answer.finish_reason)
                else:
                    yield self._chunk(answer, self._delta(answer, piece, told), piece)
        if self._usage_in_stream and self._chunks_before <= 2 * len(self.answers) + again:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage}

    def _delta(self, answer: Answer, piece: Piece, told: list[int]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.calls:
            first = told[answer.index]
            told[answer.index] += len(piece.calls)
            delta["tool_calls"] = [
                {"index": place, **self._call(answer, place, call)} for place, call in enumerate(piece.calls, start=first)
            ]
        return delta

    def _chunk(self, answer: Answer, delta: dict[str, Any], piece: Piece | None = None, finish_reason: str | None = None) -> dict[str, Any]:
        logprobs = None if piece is None else self._logprobs(piece.logprobs, answer)
        choice = {"index": answer.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self.created, "model": self._service.name}


def chat_prompt(
    service: Service,
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    arguments: Mapping[str, Any],
    places: Sequence[str] | None = None,
) -> list[int]:
    """The token ids of messages by the model's chat template; ``arguments``: for it; ``places``: as of ``messages_of``. Raises :class:`Refused`."""
    tokenizer = service.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        raise Refused("this model has no chat template: use /v1/completions", "messages")
    told = messages_of(messages, places)
    for place, message in enumerate(told):
        service.check_length(message["content"], f"messages.{place}.content")
    known = _variables_of(tokenizer.chat_template) if isinstance(tokenizer.chat_template, str) else None
    if tools and known is not None and "tools" not in known:
        raise Refused("tools: this model's chat template has no place for them", "tools")
    for name in arguments:
        if known is not None and name not in known:
            raise Refused(f"chat_template_kwargs: this model's chat template does not know {name!r}", "chat_template_kwargs")
    own = sorted(set(arguments) & set(inspect.signature(type(tokenizer).apply_chat_template).parameters))
    if own:
        raise Refused(f"chat_template_kwargs: {own[0]!r} is the server's own: only what the model's template knows", "chat_template_kwargs")
    try:
        ids: Any = tokenizer.apply_chat_template(
            told, add_generation_prompt=True, tools=tools, tokenize=True, return_dict=False, **arguments
        )
    except Exception as error:  # a template raises whatever it likes over messages that it does not take
        raise Refused(f"messages: this model's chat template does not take them: {error}", "messages") from None
    return [int(one) for one in ids]


@functools.cache
def _variables_of(template: str) -> frozenset[str] | None:
    """What a chat template asks for; None where that cannot be told."""
    try:
        return frozenset(meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)))  # noqa: S701
    except TemplateError:
        return None


def parser_of(service: Service, prompt: Sequence[int], tools: Sequence[dict[str, Any]] | None) -> Any:
    """What takes this model's answers apart; None where their parts are not known."""
    from transformers.cli.serving.utils import build_response_parser

    return build_response_parser(service.tokenizer, service.model, list(prompt), tools=tools)
