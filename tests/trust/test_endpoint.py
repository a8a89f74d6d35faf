"""The endpoint above trust ``plain``: it tells its mode, and a lie makes it unavailable."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

import shmbroker
from shmbroker.models import model_digest
from shmbroker.models.checkpoint import Checkpoint
from tests.tee_worker.conftest import talking
from tests.tee_worker.test_serve import Server, ask_chat, chat_prompt, expected, serving
from tests.trust.conftest import worker

__all__ = ["talking"]

TOKENS = 8
CALLS = 3 * 4 + 1
"""Of a pass: three layers at split ``fused``, and the head."""


def options_of(talking: Path) -> tuple[str, ...]:
    digest = model_digest(Checkpoint.at(talking).model(torch.float32))
    return ("--trust", "blind", "--model-digest", digest, "--failover", "0", "--pads", "4")


def test_a_blind_endpoint_answers_until_its_worker_lies(broker: shmbroker.LocalBroker, talking: Path) -> None:
    lie_at = str(CALLS * TOKENS + 5)  # in the second answer's first pass
    options = (*options_of(talking), "--max-concurrency", "1")
    with (
        worker(talking, "lying-endpoint", "--lie", "change", "--lie-at", lie_at, command="misbehave"),
        serving(talking, "lying-endpoint", *options) as server,
    ):
        assert ask_chat(server, "one", TOKENS) == expected(talking, chat_prompt("one"), TOKENS)
        health = server.health()
        assert health.status_code == 200
        trust = health.json()["trust"]
        assert (trust["mode"], trust["rejected"], trust["pads_reused"]) == ("blind", 0, 0)
        assert trust["checked"] == trust["pads_taken"] > 0
        with pytest.raises(openai.APIError, match="gave a wrong result"):
            ask_chat(server, "two", TOKENS)
        health = server.health()
        assert health.status_code == 503
        assert "this session has ended" in health.json()["reason"]
        assert health.json()["trust"]["rejected"] == 1


def test_a_lie_ends_every_sequence_of_its_pass_and_nothing_of_it_comes_out(broker: shmbroker.LocalBroker, talking: Path) -> None:
    """T3: many at once."""
    questions = ["one", "another", "a third", "four"]
    texts = {question: expected(talking, chat_prompt(question), 32) for question in questions}
    seen: dict[str, str] = {}

    def read(server: Server, question: str) -> str:
        """The error that the stream ends with."""
        stream = server.client.chat.completions.create(
            model="talking", messages=[{"role": "user", "content": question}], max_tokens=32, temperature=0, stream=True
        )
        seen[question] = ""
        try:
            for chunk in stream:
                seen[question] += chunk.choices[0].delta.content or ""
        except openai.APIError as error:
            return str(error)
        return ""

    with (
        worker(talking, "lying-batch", "--lie", "change", "--lie-at", str(CALLS * 20), command="misbehave"),
        serving(talking, "lying-batch", *options_of(talking)) as server,
        ThreadPoolExecutor(len(questions)) as pool,
    ):
        errors = list(pool.map(lambda question: read(server, question), questions))
        assert all("gave a wrong result" in error for error in errors), errors
        assert all(texts[question].startswith(seen[question]) and len(seen[question]) < 32 for question in questions), seen
        assert server.health().status_code == 503
        with pytest.raises(openai.APIError, match="this session has ended"):
            ask_chat(server, "two", TOKENS)
