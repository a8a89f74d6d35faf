"""A chat's messages, from OpenAI's form to what chat templates take. What is not text is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tee_worker.serving.fields import Refused

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXTS = ("text", "input_text", "output_text")
_OF_A_PART = ("type", "text", "logprobs")
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_KNOWN = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


def messages_of(told: Sequence[dict[str, Any]], places: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """For a template; ``places``: where in the request each stands. Raises :class:`Refused` that names what is wrong."""
    if not told:
        raise Refused("messages: must be a list of messages with 'role' and 'content', and is empty", "messages")
    return [_message(one, place) for one, place in zip(told, places or [f"messages.{place}" for place in range(len(told))], strict=True)]


def _message(told: dict[str, Any], where: str) -> dict[str, Any]:
    role = told.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise Refused(f"{where}.role: must be one of {', '.join(_ROLES)}", f"{where}.role")
    for name, value in told.items():
        if name not in _KNOWN and value not in _EMPTY:
            raise Refused(f"{where}.{name} is not implemented here: leave it out", f"{where}.{name}")
    calls = told.get("tool_calls")
    message: dict[str, Any] = {"role": _ROLES[role]}
    if calls not in _EMPTY:
        message["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    content = told.get("content")
    if content is None and "tool_calls" not in message:
        raise Refused(f"{where}.content: must be a string or a list of parts", f"{where}.content")
    message["content"] = "" if content is None else text_of(content, f"{where}.content")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if told.get(name) is not None:
            if not isinstance(told[name], str):
                raise Refused(f"{where}.{name}: must be a string", f"{where}.{name}")
            message[name] = told[name]
    return message


def text_of(content: object, where: str) -> str:
    """The text of a message's content, which is a string or a list of parts. Raises :class:`Refused` for any other part."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"{where}: must be a string or a list of parts", where)
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS:
            raise Refused(f"{where}.{place}.type: only text is served here, not {kind!r}", f"{where}.{place}.type")
        others = [name for name, value in part.items() if name not in _OF_A_PART and value not in _EMPTY]
        if others:
            raise Refused(f"{where}.{place}.{others[0]} is not implemented here: leave it out", f"{where}.{place}.{others[0]}")
        if not isinstance(part.get("text"), str):
            raise Refused(f"{where}.{place}.text: must be a string", f"{where}.{place}.text")
        texts.append(part["text"])
    return " ".join(texts)


def _calls(told: object, where: str) -> list[dict[str, Any]]:
    """Their arguments as objects: templates go through them."""
    calls = []
    for place, call in enumerate(told if isinstance(told, list) else [told]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{where}.{place}.function: must have a name and arguments", f"{where}.{place}.function")
        arguments = function.get("arguments") or "{}"
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            raise Refused(f"{where}.{place}.function.arguments: must be JSON", f"{where}.{place}.function.arguments") from None
        calls.append({**call, "function": {**function, "arguments": parsed}})
    return calls
