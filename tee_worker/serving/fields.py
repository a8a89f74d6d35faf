"""The fields of requests: what each may be, and a refusal with its name for every other. No field is ignored.

docs/serve.md has the table for users; a test compares it with this file.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MOST_CHOICES = 128
MOST_LOGPROBS = 20
MOST_STOPS = 16


class Refused(Exception):
    """A request that cannot be answered: status, message, and the field that it is about."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    only: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that are taken with these values alone, at which they change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        left = {}
        for name, value in body.items():
            if value is None:
                continue  # as if it were not there
            if name not in cls.only:
                left[name] = value
            elif not any(value == one and type(value) is type(one) for one in cls.only[name]):
                allowed = " or ".join(json.dumps(one) for one in cls.only[name])
                raise Refused(f"{name}: only {allowed} is implemented here, not {json.dumps(value)[:100]}", name)
        return left


Fields = TypeVar("Fields", bound=_Fields)


class StreamOptions(_Fields):
    """How a stream is."""

    only = {"include_obfuscation": (False,)}
    include_usage: bool | None = None


class Asked(_Fields):
    """What requests for chats and for completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: str | list[str] | None = None
    user: str | None = None


class ChatRequest(Asked):
    """``/v1/chat/completions``."""

    only = {
        "store": (False,),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "parallel_tool_calls": (True,),
        "metadata": ({},),
        "functions": ([],),
        "response_format": ({"type": "text"},),
    }
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Asked):
    """``/v1/completions``."""

    only = {"best_of": (1,)}
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class ResponseRequest(_Fields):
    """``/v1/responses``."""

    only = {
        "store": (False,),
        "background": (False,),
        "service_tier": ("auto", "default"),
        "parallel_tool_calls": (True,),
        "metadata": ({},),
        "include": ([],),
        "truncation": ("disabled",),
        "text": ({"format": {"type": "text"}}, {}),
        "top_logprobs": (0,),
    }
    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    user: str | None = None


def parsed(kind: type[Fields], body: object) -> Fields:
    """A request's fields. Raises :class:`Refused` that names the first that cannot be."""
    if not isinstance(body, dict):
        raise Refused("the request's body must be a JSON object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(str(one) for one in first["loc"] if not _of_a_union(one))
        if first["type"] == "extra_forbidden":
            param = ".".join(str(one) for one in first["loc"])
            raise Refused(f"{param} is not implemented here: leave it out (docs/serve.md has the fields)", param) from None
        raise Refused(f"{param}: {first['msg'][0].lower()}{first['msg'][1:]}", param) from None


def _of_a_union(step: int | str) -> bool:
    """Whether a step of pydantic's path names one of several types rather than a field."""
    return isinstance(step, str) and (step in ("str", "int", "float", "bool") or "[" in step)
