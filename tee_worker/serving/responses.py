"""``/v1/responses``: an input to one answer, whole or as a stream of events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from tee_worker.serving.chat import chat_prompt, parser_of
from tee_worker.serving.fields import Refused, ResponseRequest
from tee_worker.serving.merged import merged
from tee_worker.serving.messages import text_of
from tee_worker.serving.resumption import Resumption
from tee_worker.serving.sampling import Sampling

if TYPE_CHECKING:
    from tee_worker.serving.service import Service


class Response:
    """One request."""

    def __init__(self, service: Service, asked: ResponseRequest, name: str, resumption: Resumption | None = None) -> None:
        """Begin to generate, or go on. Raises :class:`Refused`."""
        self._service = service
        self._name = name
        self._asked = asked
        self._chunks_before = 0 if resumption is None else resumption.chunks
        self.created = int(time.time()) if resumption is None else resumption.created
        tools = _tools_of(asked)
        messages = _messages_of(asked)
        self.prompt = chat_prompt(service, [one for one, _ in messages], tools, {}, [place for _, place in messages])
        sampling = Sampling(temperature=asked.temperature, top_p=asked.top_p, seed=asked.seed)
        self.answers = [
            service.answer(0, self.prompt, sampling, asked.max_output_tokens, [], parser_of(service, self.prompt, tools), resumption),
        ]
        self._answer = self.answers[0]

    @property
    def prompt_tokens(self) -> int:
        """Of the input, as the model reads it."""
        return len(self.prompt)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return {
            "input_tokens": len(self.prompt),
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self._answer.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(self.prompt) + self._answer.tokens,
        }

    async def whole(self) -> dict[str, Any]:
        """The response, once the answer is there."""
        await self._answer.all()
        return self._response()

    def _response(self) -> dict[str, Any]:
        asked, reason = self._asked, self._answer.finish_reason
        status = "in_progress" if not reason else "incomplete" if reason == "length" else "completed"
        return {
            "id": f"resp_{self._name}",
            "object": "response",
            "created_at": self.created,
            "model": self._service.name,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "output": self._output(status) if reason else [],
            "parallel_tool_calls": True,
            "temperature": asked.temperature,
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": asked.top_p,
            "usage": self.usage if reason else None,
        }

    def _output(self, status: str) -> list[dict[str, Any]]:
        return [self._message(status, [self._part(self._answer.whole)]), *self._others()]

    def _others(self) -> list[dict[str, Any]]:
        """What the answer has beside its text."""
        items: list[dict[str, Any]] = []
        if self._answer.reasoning:
            text = {"type": "reasoning_text", "text": self._answer.reasoning}
            items.append({"id": f"rs_{self._name}", "type": "reasoning", "summary": [], "content": [text], "status": "completed"})
        for place, call in enumerate(self._answer.calls):
            name = f"fc_{self._name}_{place}"
            said = {"name": call.name, "arguments": call.arguments, "status": "completed"}
            items.append({"id": name, "call_id": name, "type": "function_call", **said})
        return items

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": f"msg_{self._name}", "type": "message", "role": "assistant", "status": status, "content": content}

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": []}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The response as numbered events, but for those that were told before."""
        number = self._chunks_before
        async with contextlib.aclosing(self._events()) as events:
            async for event in events:
                yield {**event, "sequence_number": number}
                number += 1

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer's text as it comes; what it thinks and calls is told at the end."""
        at = {"item_id": f"msg_{self._name}", "output_index": 0, "content_index": 0}
        heads = self._heads(at)
        for event in heads[self._chunks_before :]:
            yield event
        async with contextlib.aclosing(merged(self.answers)) as pieces:
            async for _, piece in pieces:
                if piece is not None and piece.text:
                    yield {"type": "response.output_text.delta", **at, "delta": piece.text, "logprobs": []}
        again = sum(bool(piece.text) for piece in self._answer.told_again)
        for event in self._tails(at)[max(0, self._chunks_before - len(heads) - again) :]:
            yield event

    def _heads(self, at: dict[str, Any]) -> list[dict[str, Any]]:
        """The events before the text."""
        return [
            {"type": "response.created", "response": self._response()},
            {"type": "response.in_progress", "response": self._response()},
            {"type": "response.output_item.added", "output_index": 0, "item": self._message("in_progress", [])},
            {"type": "response.content_part.added", **at, "part": self._part("")},
        ]

    def _tails(self, at: dict[str, Any]) -> list[dict[str, Any]]:
        """Those after it."""
        whole = self._response()
        text = self._answer.whole
        events = [
            {"type": "response.output_text.done", **at, "text": text, "logprobs": []},
            {"type": "response.content_part.done", **at, "part": self._part(text)},
            {"type": "response.output_item.done", "output_index": 0, "item": self._message(whole["status"], [self._part(text)])},
        ]
        for place, item in enumerate(self._others(), start=1):
            events.append({"type": "response.output_item.added", "output_index": place, "item": item})
            events.append({"type": "response.output_item.done", "output_index": place, "item": item})
        return [*events, {"type": f"response.{whole['status']}", "response": whole}]


_OF_AN_ITEM = {
    "message": ("role", "content", "phase"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": ("summary", "content"),
}
"""What is read of each kind of item. All may have a type, an id and a status, as the server gives them."""

Placed = list[tuple[dict[str, Any], str]]
"""Messages as of a chat, each with where it stands in the request."""


def _messages_of(asked: ResponseRequest) -> Placed:
    """Raises :class:`Refused` for items that are not text or calls."""
    told: Placed = []
    if asked.instructions:
        told.append(({"role": "system", "content": asked.instructions}, "instructions"))
    if isinstance(asked.input, str):
        return [*told, ({"role": "user", "content": asked.input}, "input")]
    for place, item in enumerate(asked.input):
        where = f"input.{place}"
        kind = item.get("type") or "message"
        if kind not in _OF_AN_ITEM:
            raise Refused(f"{where}.type: only messages and function calls are served here, not {kind!r}", f"{where}.type")
        others = [
            name
            for name, value in item.items()
            if name not in ("type", "id", "status", *_OF_AN_ITEM[kind]) and value not in (None, "", [], {})
        ]
        if others:
            raise Refused(f"{where}.{others[0]} is not implemented here: leave it out", f"{where}.{others[0]}")
        _add(told, kind, item, where)
    return told


def _add(told: Placed, kind: str, item: dict[str, Any], where: str) -> None:
    """One item more. What an assistant thinks, says and calls in a row is one message."""
    last = told[-1][0] if told else {}
    own = last if last.get("role") == "assistant" else None
    if kind == "message" and item.get("role") != "assistant":
        told.append(({"role": item.get("role"), "content": text_of(item.get("content"), f"{where}.content")}, where))
    elif kind == "function_call_output":
        told.append(
            ({"role": "tool", "tool_call_id": item.get("call_id"), "content": text_of(item.get("output"), f"{where}.output")}, where)
        )
    else:
        if own is None:
            own = {"role": "assistant", "content": ""}
            told.append((own, where))
        if kind == "message":
            own["content"] += text_of(item.get("content"), f"{where}.content")
        elif kind == "reasoning":
            parts = [one.get("text") for one in item.get("content") or item.get("summary") or [] if isinstance(one, dict)]
            own["reasoning_content"] = own.get("reasoning_content", "") + "".join(one for one in parts if isinstance(one, str))
        else:
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            own.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})


def _tools_of(asked: ResponseRequest) -> list[dict[str, Any]] | None:
    """As of a chat. Raises :class:`Refused` for tools that are not functions."""
    if asked.tool_choice == "none" or not asked.tools:
        return None
    for place, tool in enumerate(asked.tools):
        if tool.get("type") != "function":
            raise Refused(f"tools.{place}.type: only functions are served here, not {tool.get('type')!r}", f"tools.{place}.type")
    return [{"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}} for tool in asked.tools]
