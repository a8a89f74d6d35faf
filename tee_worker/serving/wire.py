"""What goes over the wire besides answers: OpenAI's error object, and a stream's events. Needs no torch."""

from __future__ import annotations

import json
from typing import Any

REQUEST_ID = "x-request-id"

MOST_BYTES = 8 << 20
"""Of a request."""

INTERNAL_ERROR = "internal_error"
"""The type of an error that is the server's own fault, and nobody else's."""


def error_object(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """In OpenAI's form."""
    return {"message": message, "type": kind, "param": param, "code": code}


def error_response(error: dict[str, Any]) -> bytes:
    """The body of a response that tells of it."""
    return json.dumps({"error": error}, ensure_ascii=False, separators=(",", ":")).encode()


def event(chunk: dict[str, Any], *, named: bool) -> str:
    """One of a stream; ``named``: with its type before it."""
    data = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
    return f"event: {chunk['type']}\ndata: {data}\n\n" if named else f"data: {data}\n\n"


def error_event(error: dict[str, Any], *, named: bool, number: int) -> str:
    """The last event of a stream that fails; ``number``: of the events before it."""
    if not named:
        return event({"error": error}, named=False)
    parts = {name: error[name] for name in ("code", "message", "param")}
    return event({"type": "error", "sequence_number": number, "error": error, **parts}, named=True)
