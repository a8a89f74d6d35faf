"""``tee-worker serve``: the OpenAI client against real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shmbroker
from shmbroker.memory.reaper import objects
from shmbroker.trace import reader
from tests.processes import run, running, wait_until
from tests.tee_worker.conftest import gpu_worker
from tests.tee_worker.test_failover import workers_of

MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
TOKENS = 24


def expected(model: Path, prompt: str, tokens: int = TOKENS) -> str:
    """What Hugging Face gives in one process, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        output = AutoModelForCausalLM.from_pretrained(model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def chat_prompt(content: str) -> str:
    return f"user:{content};a:"


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    def health(self) -> requests.Response:
        return requests.get(self.url.removesuffix("/v1") + "/health", timeout=60)


@contextlib.contextmanager
def serving(model: Path, service: str, *options: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "tee_worker", "serve", "--model", str(model), "--service", service, "--port", "0", *options]
    with running(*command) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline().decode()
        assert line.startswith("ready: "), process.stderr.read().decode()
        yield Server(process, line.split()[1])


@pytest.fixture(scope="module")
def server(broker: shmbroker.LocalBroker, talking: Path) -> Iterator[Server]:
    with gpu_worker(talking, "talk"), serving(talking, "talk") as server:
        yield server


def ask_chat(server: Server, content: str, tokens: int = TOKENS) -> str:
    answer = server.client.chat.completions.create(
        model="talking", messages=[{"role": "user", "content": content}], max_tokens=tokens, temperature=0
    )
    return answer.choices[0].message.content or ""


def test_an_answer_is_what_the_model_gives_in_one_process(server: Server, talking: Path) -> None:
    answer = server.client.chat.completions.create(model="talking", messages=MESSAGES, max_tokens=TOKENS, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == expected(talking, chat_prompt("Why is the sky blue?"))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == TOKENS


def test_a_stream_is_the_same_text_in_pieces(server: Server, talking: Path) -> None:
    stream = server.client.chat.completions.create(model="talking", messages=MESSAGES, max_tokens=TOKENS, temperature=0, stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == expected(talking, chat_prompt("Why is the sky blue?"))
    assert len(pieces) > 3


def test_plain_completions_and_the_list_of_models(server: Server, talking: Path) -> None:
    answer = server.client.completions.create(model="talking", prompt="Once upon", max_tokens=TOKENS, temperature=0)
    assert answer.choices[0].text == expected(talking, "Once upon")
    assert [one.id for one in server.client.models.list()] == ["talking"]


def test_requests_at_once_each_get_their_own_text(server: Server, talking: Path) -> None:
    questions = ["one", "another one, longer", "a third"]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda question: ask_chat(server, question), questions))
    assert answers == [expected(talking, chat_prompt(question)) for question in questions]


def test_curl_streams(server: Server, talking: Path) -> None:
    done = run(
        "curl", "-sN", f"{server.url}/completions", "-H", "Content-Type: application/json",
        "-d", '{"prompt": "Once upon", "max_tokens": 4, "temperature": 0, "stream": true}',
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith("data: {")
    assert '"finish_reason":"length"' in done.stdout


def test_sampling_follows_the_seed_and_not_the_greedy_choice(server: Server, talking: Path) -> None:
    def sampled(seed: int) -> str:
        return server.client.completions.create(model="talking", prompt="Once", max_tokens=32, temperature=1.5, seed=seed).choices[0].text

    assert sampled(1) == sampled(1)
    assert len({sampled(1), sampled(2), expected(talking, "Once", 32)}) == 3


def test_an_answer_ends_where_the_context_does(server: Server) -> None:
    answer = server.client.completions.create(model="talking", prompt="x" * 180, max_tokens=100, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "gpt-5", "messages": MESSAGES}, "'talking'"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "--max-context"),
        ({"messages": []}, "messages: must be"),
        ({"messages": MESSAGES, "max_tokens": 0}, "at least one token"),
        ({"messages": MESSAGES, "max_tokens": "many"}, "max_tokens: input should be"),
        ({"messages": MESSAGES, "temperature": "hot"}, "temperature: input should be"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(server: Server, body: dict[str, object], words: str) -> None:
    answer = requests.post(server.url + "/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert words in answer.text


@pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/systemone"])
def test_other_endpoints_of_the_library_are_not_there(server: Server, path: str) -> None:
    assert requests.post(server.url.removesuffix("/v1") + path, json={"model": "talking"}, timeout=60).status_code == 404


def test_a_wrong_name_is_an_error_of_the_client_library(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="gpt-5"):
        server.client.chat.completions.create(model="gpt-5", messages=MESSAGES)  # type: ignore[arg-type]


def test_another_worker_takes_over_in_the_midst_of_an_answer(broker: shmbroker.LocalBroker, talking: Path) -> None:
    whole = expected(talking, chat_prompt("x"), 100)
    with gpu_worker(talking, "pair") as first, gpu_worker(talking, "pair") as second, serving(talking, "pair") as server:
        wait_until(lambda: workers_of("pair") == 2)
        stream = server.client.chat.completions.create(
            model="talking", messages=[{"role": "user", "content": "x"}], max_tokens=100, temperature=0, stream=True
        )
        text = ""
        for chunk in stream:
            if not text and chunk.choices[0].delta.content:
                os.kill(first, signal.SIGKILL)
            text += chunk.choices[0].delta.content or ""
        assert text == whole
        # Whichever was in use: one of the two is dead, and the endpoint is well.
        assert server.health().status_code == 200
        os.kill(second, 0)


def test_health_tells_of_the_worker_and_a_request_without_one_fails(broker: shmbroker.LocalBroker, talking: Path) -> None:
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(gpu_worker(talking, "single"))
        server = stack.enter_context(serving(talking, "single", "--failover", "0.2"))
        assert server.health().json()["status"] == "ok"
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: server.health().status_code == 503)
        assert "died" in server.health().json()["reason"]
        with pytest.raises(openai.InternalServerError, match="took over"):
            ask_chat(server, "x")
        with pytest.raises(openai.APIError):
            list(server.client.completions.create(model="talking", prompt="x", stream=True))
        body = {"prompt": "x", "stream": True}
        streamed = requests.post(server.url + "/completions", json=body, timeout=60).text
        assert '"error"' in streamed
        assert "took over" in streamed
        stack.enter_context(gpu_worker(talking, "single"))
        wait_until(lambda: server.health().status_code == 200)
        assert ask_chat(server, "x") == expected(talking, chat_prompt("x"))


def test_a_request_waits_for_a_worker_that_comes_back(broker: shmbroker.LocalBroker, talking: Path) -> None:
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(gpu_worker(talking, "back"))
        server = stack.enter_context(serving(talking, "back", "--failover", "120"))
        os.kill(worker, signal.SIGKILL)
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(ask_chat(server, "x")))
        thread.start()
        wait_until(lambda: server.health().status_code == 503)
        stack.enter_context(gpu_worker(talking, "back"))
        thread.join(300)
        assert answers == [expected(talking, chat_prompt("x"))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_nothing(broker: shmbroker.LocalBroker, talking: Path, number: signal.Signals) -> None:
    before = set(objects(broker.instance))
    with gpu_worker(talking, "ending"), serving(talking, "ending", "--split", "layer") as server:
        assert ask_chat(server, "x")
        server.process.send_signal(number)
        assert server.process.wait(300) == 0
        assert server.process.stderr is not None
        assert b"Traceback" not in server.process.stderr.read()
        mine = [one.file for one in objects(broker.instance) if one not in before and one.kind == "segment"]
        assert mine == []


def test_a_signal_while_a_request_waits_for_a_worker_ends_it_too(broker: shmbroker.LocalBroker, talking: Path) -> None:
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(gpu_worker(talking, "never"))
        server = stack.enter_context(serving(talking, "never", "--failover", "600"))
        os.kill(worker, signal.SIGKILL)

        def fail() -> None:
            with contextlib.suppress(openai.APIError):
                ask_chat(server, "x")

        thread = threading.Thread(target=fail)
        thread.start()
        wait_until(lambda: "waiting" in server.health().text)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(300) == 0
        thread.join(300)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "loopback"),
        (["--max-context", "100000"], "sees up to"),
        (["--split", "everything"], "split"),
        (["--service", "nobody"], "nobody"),
    ],
)
def test_what_cannot_be_served_is_one_line(broker: shmbroker.LocalBroker, talking: Path, options: list[str], words: str) -> None:
    done = run(sys.executable, "-m", "tee_worker", "serve", "--model", str(talking), "--port", "0", *options)
    assert done.returncode == 1
    assert words in done.stderr
    assert len([line for line in done.stderr.splitlines() if "so far)" not in line]) == 1, done.stderr


def test_a_port_that_is_taken_is_one_line(server: Server, talking: Path) -> None:
    port = server.url.rsplit(":", 1)[1].split("/")[0]
    done = run(sys.executable, "-m", "tee_worker", "serve", "--model", str(talking), "--service", "talk", "--port", port)
    assert done.returncode == 1
    assert "another --port" in done.stderr


def test_the_embedded_model_answers_a_question(broker: shmbroker.LocalBroker, embedded: Path) -> None:
    with gpu_worker(embedded, "real"), serving(embedded, "real", "--served-model-name", "smol", "--max-context", "256") as server:
        answer = server.client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": "What is the capital of France? Answer in one word."}],
            max_tokens=12,
            temperature=0,
        )
        assert "Paris" in (answer.choices[0].message.content or "")


def test_every_program_can_write_a_trace(broker: shmbroker.LocalBroker, talking: Path, tmp_path: Path) -> None:
    its, served, generated = (str(tmp_path / f"{name}.json") for name in ("worker", "serve", "generate"))
    with gpu_worker(talking, "traced", "--trace", its), serving(talking, "traced", "--max-concurrency", "1", "--trace", served) as server:
        assert ask_chat(server, "x", 4)
        done = run(
            sys.executable, "-m", "tee_worker", "generate", "--model", str(talking), "--service", "traced", "--prompt", "x",
            "--max-new-tokens", "4", "--trace", generated, "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(300) == 0
    ran = {event["id"] for event in reader.read(its) if event["ph"] == "t"}
    assert ran == {event["id"] for path in (served, generated) for event in reader.read(path) if event["ph"] == "s"}
    assert len(ran) == 2 * 4 * (3 * 4 + 2), "calls of four tokens at split fused, three layers, twice"
