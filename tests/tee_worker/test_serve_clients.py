"""Clients of other people, as they come: LangChain's against the endpoint. (The OpenAI client is in the other files.)"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

import shmbroker
from tests.tee_worker.conftest import gpu_worker
from tests.tee_worker.test_serve import Server, expected, serving

TOKENS = 16


@pytest.fixture(scope="module")
def server(broker: shmbroker.LocalBroker, talking: Path) -> Iterator[Server]:
    with gpu_worker(talking, "clients"), serving(talking, "clients") as server:
        yield server


def chat(server: Server, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="talking", base_url=server.url, api_key="none", temperature=0, max_completion_tokens=TOKENS, max_retries=0, **options
    )  # type: ignore[arg-type]


def test_a_chat_whole_streamed_and_with_what_was_said_before(server: Server, talking: Path) -> None:
    text = expected(talking, "user:Why?;a:", TOKENS)
    answer = chat(server).invoke("Why?")
    assert answer.content == text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == TOKENS
    assert "".join(str(piece.content) for piece in chat(server).stream("Why?")) == text
    talk = [SystemMessage("Be brief."), HumanMessage("Why?"), AIMessage("x"), HumanMessage("And?")]
    assert chat(server).invoke(talk).content == expected(talking, "system:Be brief.;user:Why?;assistant:x;user:And?;a:", TOKENS)


def test_a_batch_with_log_probabilities_and_stop(server: Server, talking: Path) -> None:
    questions = [f"Why {number}?" for number in range(6)]
    answers = chat(server, logprobs=True, top_logprobs=2).batch(questions)
    assert [one.content for one in answers] == [expected(talking, f"user:{question};a:", TOKENS) for question in questions]
    assert all(len(one.response_metadata["logprobs"]["content"]) == TOKENS for one in answers)
    text = str(answers[0].content)
    assert chat(server, stop=[text[3:5]]).invoke(questions[0]).content == text[: text.index(text[3:5])]


def test_completions_of_several_prompts(server: Server, talking: Path) -> None:
    llm = OpenAI(model="talking", base_url=server.url, api_key="none", temperature=0, max_tokens=TOKENS, max_retries=0)  # type: ignore[arg-type]
    prompts = ["Once upon", "There was"]
    assert [one[0].text for one in llm.generate(prompts).generations] == [expected(talking, prompt, TOKENS) for prompt in prompts]


def test_what_is_not_implemented_is_an_error_of_the_client(server: Server) -> None:
    with pytest.raises(Exception, match="reasoning_effort is not implemented here"):
        chat(server, reasoning_effort="high").invoke("Why?")


def test_many_at_once(server: Server, talking: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: chat(server).invoke(f"{number}?").content, range(8)))
    assert answers == [expected(talking, f"user:{number}?;a:", TOKENS) for number in range(8)]
