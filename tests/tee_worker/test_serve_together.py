"""Many requests at once: each gets the text that it would get alone, whoever comes, goes or dies meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests

import shmbroker
from shmbroker.memory.reaper import objects
from tests.processes import run, wait_until
from tests.tee_worker.conftest import gpu_worker
from tests.tee_worker.test_failover import workers_of
from tests.tee_worker.test_serve import Server, ask_chat, chat_prompt, expected, serving

QUESTIONS = [f"question {number}{' and more' * (number % 5)}" for number in range(16)]
TOKENS = 24


@pytest.fixture(scope="module")
def texts(talking: Path) -> dict[str, str]:
    return {question: expected(talking, chat_prompt(question), TOKENS) for question in QUESTIONS}


@pytest.fixture(scope="module")
def worker(broker: shmbroker.LocalBroker, talking: Path) -> Iterator[str]:
    with gpu_worker(talking, "together"):
        yield "together"


@pytest.fixture(scope="module")
def server(worker: str, talking: Path) -> Iterator[Server]:
    with serving(talking, worker) as server:
        yield server


def figures(server: Server) -> dict[str, float]:
    """Of ``/metrics``."""
    text = requests.get(server.url.removesuffix("/v1") + "/metrics", timeout=60).text
    return {name: float(value) for name, value in re.findall(r"^shmbroker_serve_(\S+) (\S+)$", text, re.MULTILINE)}


def idle(server: Server) -> bool:
    now = figures(server)
    return (now["running"], now["waiting"], now["cache_blocks_used"]) == (0, 0, 0)


def all_at_once(ask: Callable[[str], str], questions: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(len(questions)) as pool:
        return dict(zip(questions, pool.map(ask, questions), strict=True))


@pytest.mark.parametrize("split", ["linear", "fused", "op"])
def test_sixteen_texts_at_once_are_those_of_one_process(worker: str, talking: Path, texts: dict[str, str], split: str) -> None:
    with serving(talking, worker, "--split", split) as server:
        assert all_at_once(lambda question: ask_chat(server, question, TOKENS), QUESTIONS) == texts
        wait_until(lambda: idle(server))
        now = figures(server)
        assert now["generated_tokens_total"] == 16 * TOKENS
        assert now["passes"] < 16 * TOKENS, "they were computed together"


def test_a_prompt_longer_than_a_pass_and_short_ones_beside_it(worker: str, talking: Path) -> None:
    questions = ["y" * 150, "one", "z" * 120, "two"]
    with serving(talking, worker, "--max-concurrency", "3") as server:
        found = all_at_once(lambda question: ask_chat(server, question, 16), questions)
    assert found == {question: expected(talking, chat_prompt(question), 16) for question in questions}


def test_greedy_ones_beside_sampled_ones_keep_their_texts(server: Server, texts: dict[str, str]) -> None:
    def ask(question: str) -> str:
        if QUESTIONS.index(question) % 2 == 0:
            return ask_chat(server, question, TOKENS)
        answer = server.client.chat.completions.create(
            model="talking", messages=[{"role": "user", "content": question}], max_tokens=TOKENS, temperature=1.5, seed=5, top_p=0.9
        )
        return answer.choices[0].message.content or ""

    found, again = all_at_once(ask, QUESTIONS), all_at_once(ask, QUESTIONS)
    assert {question: found[question] for question in QUESTIONS[::2]} == {question: texts[question] for question in QUESTIONS[::2]}
    assert any(found[question] != texts[question] for question in QUESTIONS[1::2])
    assert found == again, "a seed is a request's own, whoever is computed beside it"


def test_a_temperature_beyond_float32_is_the_likeliest_token_and_harms_nobody(server: Server, texts: dict[str, str]) -> None:
    def ask(question: str) -> str:
        hot = question == QUESTIONS[0]
        answer = server.client.chat.completions.create(
            model="talking", messages=[{"role": "user", "content": question}], max_tokens=TOKENS, temperature=1e-40 if hot else 0
        )
        return answer.choices[0].message.content or ""

    assert all_at_once(ask, QUESTIONS[:4]) == {question: texts[question] for question in QUESTIONS[:4]}


def test_scored_prompts_beside_generations(server: Server, texts: dict[str, str]) -> None:
    def ask(question: str) -> str:
        if QUESTIONS.index(question) % 2:
            return ask_chat(server, question, TOKENS)
        answer = server.client.completions.create(model="talking", prompt=question, max_tokens=1, echo=True, logprobs=1, temperature=0)
        return str(answer.choices[0].logprobs and len(answer.choices[0].logprobs.tokens or []))

    found = all_at_once(ask, QUESTIONS)
    assert found == {question: texts[question] if place % 2 else str(len(question) + 1) for place, question in enumerate(QUESTIONS)}


def test_all_streams_go_on_when_their_worker_is_killed(broker: shmbroker.LocalBroker, talking: Path) -> None:
    questions = QUESTIONS[:8]
    texts = {question: expected(talking, chat_prompt(question), 100) for question in questions}
    killed: list[int] = []
    with gpu_worker(talking, "mortals") as first, gpu_worker(talking, "mortals") as second, serving(talking, "mortals") as server:
        wait_until(lambda: workers_of("mortals") == 2)

        def ask(question: str) -> str:
            text = ""
            for chunk in server.client.chat.completions.create(
                model="talking", messages=[{"role": "user", "content": question}], max_tokens=100, temperature=0, stream=True
            ):
                text += chunk.choices[0].delta.content or ""
                if question == questions[0] and len(text) == 20:
                    used = [one for one in (first, second) if f"-{one}" in server.health().json()["worker"]]
                    killed.extend(used)
                    os.kill(used[0], signal.SIGKILL)
            return text

        assert all_at_once(ask, questions) == texts
        assert killed
        assert server.health().status_code == 200


def test_when_patience_is_over_all_fail_with_the_reason_and_the_next_is_served(broker: shmbroker.LocalBroker, talking: Path) -> None:
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(gpu_worker(talking, "gone"))
        server = stack.enter_context(serving(talking, "gone", "--failover", "0.2"))

        def ask(question: str) -> str:
            try:
                for chunk in server.client.chat.completions.create(
                    model="talking", messages=[{"role": "user", "content": question}], max_tokens=150, temperature=0, stream=True
                ):
                    if question == QUESTIONS[0] and chunk.choices[0].delta.content:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(worker, signal.SIGKILL)
            except openai.APIError as error:
                return str(error)
            return "it ended"

        assert all("took over" in error for error in all_at_once(ask, QUESTIONS[:4]).values())
        with pytest.raises(openai.APIError, match="took over"):
            list(server.client.responses.create(model="talking", input="x", stream=True))
        with pytest.raises(openai.InternalServerError, match="took over") as refused:
            ask_chat(server, "x")
        assert refused.value.status_code == 503
        stack.enter_context(gpu_worker(talking, "gone"))
        wait_until(lambda: server.health().status_code == 200)
        assert ask_chat(server, "x") == expected(talking, chat_prompt("x"))


def test_clients_that_go_away_leave_nothing(server: Server, broker: shmbroker.LocalBroker) -> None:
    def open_files() -> int:
        return len(os.listdir(f"/proc/{server.process.pid}/fd"))

    ask_chat(server, "warm", 4)
    wait_until(lambda: idle(server))
    files, segments = open_files(), [one.file for one in objects(broker.instance)]
    chance = random.Random(1)

    def leave(number: int) -> None:
        body = {"prompt": f"number {number}", "max_tokens": 60, "temperature": 0, "stream": number % 2 == 0}
        with contextlib.suppress(requests.RequestException):
            answer = requests.post(server.url + "/completions", json=body, timeout=chance.choice([0.05, 0.2, 60]), stream=True)
            for place, _ in enumerate(answer.iter_lines()):
                if place >= chance.randrange(40):
                    break
            answer.close()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(leave, range(200)))
    wait_until(lambda: idle(server))
    wait_until(lambda: open_files() <= files)
    assert [one.file for one in objects(broker.instance)] == segments
    assert ask_chat(server, "x") == ask_chat(server, "x")


def test_a_stream_of_events_tells_what_went_wrong_in_its_midst(broker: shmbroker.LocalBroker, talking: Path) -> None:
    with gpu_worker(talking, "broken") as worker, serving(talking, "broken", "--failover", "0") as server:

        def read() -> None:
            for event in server.client.responses.create(model="talking", input="x", temperature=0, max_output_tokens=150, stream=True):
                if event.type == "response.output_text.delta":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)

        with pytest.raises(openai.APIError, match="died"):
            read()


def test_the_end_is_told_to_who_waits_for_a_worker(broker: shmbroker.LocalBroker, talking: Path) -> None:
    """Also to one whose prompt is scored."""
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(gpu_worker(talking, "ends"))
        server = stack.enter_context(serving(talking, "ends", "--failover", "600"))
        os.kill(worker, signal.SIGKILL)
        pool = stack.enter_context(ThreadPoolExecutor(2))

        def ask(body: dict[str, object]) -> requests.Response:
            return requests.post(server.url + "/completions", json=body, timeout=300)

        answers = [pool.submit(ask, {"prompt": "x", **more}) for more in ({}, {"echo": True, "logprobs": 1})]
        wait_until(lambda: "waiting" in server.health().text)
        server.process.send_signal(signal.SIGTERM)
        for answer in answers:
            assert answer.result().status_code == 503
            assert set(answer.result().json()["error"]) == {"message", "type", "param", "code"}
        assert server.process.wait(300) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--api-key", ""), "--api-key"),
        (("--split", "layer", "--max-concurrency", "4"), "or give --max-concurrency 1"),
        (("--split", "block", "--max-concurrency", "2"), "keeps keys and values"),
        (("--split", "fused:0-1,linear:2", "--max-concurrency", "2"), "for all layers"),
        (("--pipeline", "2", "--max-concurrency", "2"), "--pipeline"),
    ],
)
def test_splits_at_which_requests_would_see_one_another_are_refused(
    broker: shmbroker.LocalBroker, talking: Path, options: tuple[str, ...], words: str
) -> None:
    done = run(sys.executable, "-m", "tee_worker", "serve", "--model", str(talking), "--port", "0", *options)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
