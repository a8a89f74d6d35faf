"""The endpoint above trust ``plain``: it tells its mode, and a lie makes it unavailable."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
import torch

import shmbroker
from shmbroker.models import model_digest
from shmbroker.models.checkpoint import Checkpoint
from tests.tee_worker.conftest import talking
from tests.tee_worker.test_serve import ask_chat, chat_prompt, expected, serving
from tests.trust.conftest import worker

__all__ = ["talking"]

TOKENS = 8
CALLS = 3 * 4 + 1
"""Of a pass: three layers at split ``fused``, and the head."""


def test_a_blind_endpoint_answers_until_its_worker_lies(broker: shmbroker.LocalBroker, talking: Path) -> None:
    digest = model_digest(Checkpoint.at(talking).model(torch.float32))
    lie_at = str(CALLS * TOKENS + 5)  # in the second answer's first pass
    options = ("--trust", "blind", "--model-digest", digest, "--failover", "0", "--pads", "4")
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
