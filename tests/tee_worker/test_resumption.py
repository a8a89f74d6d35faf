"""A stream that goes on elsewhere: cut after each of its chunks, it is the stream that it would have been."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tee_worker.serving.endpoint import Endpoint
from tee_worker.serving.resumption import EXTENSION, AnswerSoFar, Journal, Resumption, Step
from tee_worker.serving.sampling import Choices
from tee_worker.serving.sequential import SequentialEngine
from tee_worker.serving.service import Service
from tee_worker.trust.session import plain_report

MESSAGES = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def service(talking: Path) -> Iterator[Service]:
    model = AutoModelForCausalLM.from_pretrained(talking)
    choices, engine = Choices(model), SequentialEngine(model)
    tokenizer = AutoTokenizer.from_pretrained(talking)
    yield Service("talking", model, tokenizer, engine, choices, 192, lambda: "", lambda: "here", plain_report)
    engine.close()


@dataclass
class Stream:
    """What came: the events of the body, and the journal as it was after each."""

    status: int = 0
    events: list[str] = field(default_factory=list)
    after: list[Resumption] = field(default_factory=list)
    resumable: bool = False


def stream(service: Service, path: str, body: dict[str, Any], resumption: Resumption | None = None) -> Stream:
    """Ask for it, as a replica does."""
    found = Stream()
    journal = Journal(copy.deepcopy(resumption))
    so_far = copy.deepcopy(resumption)
    sent = [json.dumps({**body, "stream": True}).encode()]

    async def receive() -> dict[str, Any]:
        if sent:
            return {"type": "http.request", "body": sent.pop()}
        await asyncio.Future()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal so_far
        if message["type"] == "http.response.start":
            found.status, found.resumable = message["status"], journal.resumable
            so_far = so_far or Resumption(journal.created, 0, [AnswerSoFar() for _ in range(journal.answers)])
        elif message.get("body"):
            found.events.append(message["body"].decode())
            steps = journal.taken()
            if steps is not None:
                assert so_far is not None
                so_far.add(msgspec.msgpack.decode(msgspec.msgpack.encode(steps), type=list[Step]))
                found.after.append(copy.deepcopy(so_far))

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"x-request-id", b"one")]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http", "method": "POST", "path": path,
        "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers, "client": None, "server": None,
        "extensions": {EXTENSION: journal},
    }  # fmt: skip
    asyncio.run(Endpoint(service)(scope, receive, send))
    return found


CHAT = "/v1/chat/completions"
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": MESSAGES, "max_tokens": 9, "temperature": 0}),
    "chat-usage": (CHAT, {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, "stream_options": {"include_usage": True}}),
    "chat-logprobs": (CHAT, {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 3}),
    "chat-penalty": (
        CHAT,
        {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "frequency_penalty": 1.5, "logit_bias": {"40": 2.0}},
    ),
    "chat-two": (CHAT, {"messages": MESSAGES, "max_tokens": 5, "temperature": 0, "n": 2, "stream_options": {"include_usage": True}}),
    "completion-echo": (
        "/v1/completions",
        {"prompt": ["ab", "cd"], "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 2, "stream_options": {"include_usage": True}},
    ),
    "response": ("/v1/responses", {"input": "Why?", "max_output_tokens": 7, "temperature": 0}),
}


def cut_everywhere(service: Service, path: str, body: dict[str, Any]) -> None:
    whole = stream(service, path, body)
    assert whole.status == 200
    assert whole.resumable
    assert len(whole.after) > 4
    for count, so_far in enumerate(whole.after, start=1):
        assert so_far.chunks == count
        rest = stream(service, path, body, so_far)
        assert rest.status == 200
        assert rounded(whole.events[:count] + rest.events) == rounded(whole.events)


def rounded(events: list[str]) -> list[str]:
    """Without the last digits of log probabilities: a prompt's rows are computed together, those of an answer one by one."""
    return [re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.4f}", event) for event in events]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stream_that_is_cut_after_any_chunk_goes_on_as_it_would_have(service: Service, name: str) -> None:
    cut_everywhere(service, *REQUESTS[name])


def test_a_stream_is_cut_before_a_stop_string_wherever_it_goes_on(service: Service) -> None:
    path, body = REQUESTS["chat-penalty"]
    text = "".join(delta(event) for event in stream(service, path, body).events)
    assert len(set(text)) > 3
    cut_everywhere(service, path, {**body, "stop": [text[7:10], text[2:4] + "no"]})


def delta(event: str) -> str:
    told = event.removeprefix("data: ").strip()
    return "" if told == "[DONE]" else (json.loads(told)["choices"][0]["delta"].get("content") or "")


def test_a_sampled_stream_says_that_it_cannot_go_on_elsewhere(service: Service) -> None:
    path, body = REQUESTS["chat"]
    assert not stream(service, path, {**body, "temperature": 1.0, "seed": 3}).resumable


def test_a_stream_of_another_model_is_refused(service: Service) -> None:
    path, body = REQUESTS["chat"]
    foreign = Resumption(1, 2, [AnswerSoFar([[100_000]])])
    found = stream(service, path, body, foreign)
    assert found.status == 400
    assert "none of this model's" in found.events[0]


def test_nothing_that_a_client_sends_is_read_as_a_resumption(service: Service) -> None:
    path, body = REQUESTS["chat"]
    for name in ("resumption", "resume", EXTENSION):
        assert stream(service, path, {**body, name: [1, 2, []]}).status == 400
