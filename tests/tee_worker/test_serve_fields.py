"""Every field of the endpoint does what it says, or is refused by name: real requests, the OpenAI client and others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shmbroker
from tests.tee_worker.conftest import gpu_worker
from tests.tee_worker.test_serve import MESSAGES, Server, chat_prompt, expected, serving

KEY = "a secret"


@pytest.fixture(scope="module", params=["8", "1"], ids=["at once", "one by one"])
def server(request: pytest.FixtureRequest, broker: shmbroker.LocalBroker, talking: Path) -> Iterator[Server]:
    with (
        gpu_worker(talking, f"fields-{request.param}"),
        serving(talking, f"fields-{request.param}", "--max-concurrency", request.param) as server,
    ):
        yield server


def complete(server: Server, prompt: Any = "Once upon", **fields: Any) -> Any:
    return server.client.completions.create(model="talking", prompt=prompt, **{"max_tokens": 12, "temperature": 0, **fields})


def chat(server: Server, **fields: Any) -> Any:
    return server.client.chat.completions.create(model="talking", messages=MESSAGES, **{"max_tokens": 12, "temperature": 0, **fields})  # type: ignore[call-overload]


def test_n_gives_so_many_answers_each_with_its_own_chance(server: Server) -> None:
    answers = chat(server, n=3, temperature=1.5, seed=3)
    assert [one.index for one in answers.choices] == [0, 1, 2]
    texts = [one.message.content for one in answers.choices]
    assert len(set(texts)) == 3
    assert [one.message.content for one in chat(server, n=3, temperature=1.5, seed=3).choices] == texts
    assert answers.usage.completion_tokens == 36


def test_a_stream_of_several_answers_is_the_answers(server: Server) -> None:
    whole = [one.message.content for one in chat(server, n=2, temperature=1.5, seed=3).choices]
    parts = ["", ""]
    ends = []
    for chunk in chat(server, n=2, temperature=1.5, seed=3, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
            ends += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage
    assert parts == whole
    assert ends == ["length", "length"]
    assert usage.completion_tokens == 24


def test_an_answer_is_cut_before_a_stop_string_also_across_tokens(server: Server, talking: Path) -> None:
    text = expected(talking, "Once upon", 12)
    stop = text[4:7]
    cut = text[: text.index(stop)]
    answer = complete(server, stop=stop)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    assert "".join(chunk.choices[0].text for chunk in complete(server, stop=["§", stop], stream=True)) == cut
    assert complete(server, stop=[]).choices[0].text == text


def test_log_probabilities_are_the_models(server: Server, talking: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(talking), AutoModelForCausalLM.from_pretrained(talking)
    prompt = tokenizer(chat_prompt("Why is the sky blue?"), add_special_tokens=False)["input_ids"]
    answer = chat(server, logprobs=True, top_logprobs=3, max_tokens=5)
    content = answer.choices[0].logprobs.content
    assert "".join(one.token for one in content) == answer.choices[0].message.content
    ids = prompt + [tokenizer.convert_tokens_to_ids(one.token) for one in content]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    for place, one in enumerate(content):
        row = logprobs[len(prompt) - 1 + place]
        assert one.logprob == pytest.approx(float(row[ids[len(prompt) + place]]), abs=1e-3)
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    streamed = [
        one.token
        for chunk in chat(server, logprobs=True, max_tokens=5, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for one in choice.logprobs.content
    ]
    assert streamed == [one.token for one in content]


def test_a_prompt_is_scored_where_it_is_asked_back(server: Server, talking: Path) -> None:
    """As lm-eval asks: token ids, echo, logprobs."""
    tokenizer, model = AutoTokenizer.from_pretrained(talking), AutoModelForCausalLM.from_pretrained(talking)
    ids = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    answer = complete(server, [ids], echo=True, logprobs=1, max_tokens=1, seed=1234).choices[0]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    told = answer.logprobs
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1 : len(ids)] == pytest.approx([float(logprobs[at, ids[at + 1]]) for at in range(len(ids) - 1)], abs=1e-3)
    assert "".join(told.tokens) == answer.text
    assert answer.text.startswith("Once upon a time")
    assert [answer.text[at] for at in told.text_offset] == told.tokens
    only = complete(server, "Once", echo=True, max_tokens=0).choices[0]
    assert (only.text, only.finish_reason) == ("Once", "length")


def test_lists_of_prompts_as_text_and_as_token_ids(server: Server, talking: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talking)
    prompts = ["Once upon", "There was"]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    texts = [expected(talking, prompt, 12) for prompt in prompts]
    for given in (prompts, ids):
        assert [one.text for one in complete(server, given).choices] == texts
    assert complete(server, ids[0]).choices[0].text == texts[0]
    twice = complete(server, prompts, n=2).choices
    assert [(one.index, one.text) for one in twice] == list(enumerate([texts[0], texts[0], texts[1], texts[1]]))


def test_bias_forbids_and_forces(server: Server, talking: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talking)
    wanted = tokenizer.convert_tokens_to_ids("q")
    assert complete(server, logit_bias={str(wanted): 100}).choices[0].text == "q" * 12
    penalized = complete(server, logit_bias={str(wanted): 3.0}, frequency_penalty=2, presence_penalty=2).choices[0].text
    assert penalized.count("q") < 12


def test_a_penalty_below_zero_repeats(server: Server) -> None:
    assert complete(server, frequency_penalty=-2, max_tokens=40).choices[0].finish_reason == "length"


def test_responses_whole_and_streamed(server: Server, talking: Path) -> None:
    text = expected(talking, chat_prompt("Why"), 12)
    whole = server.client.responses.create(model="talking", input="Why", max_output_tokens=12, temperature=0)
    assert whole.output_text == text
    assert whole.status == "incomplete"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12
    events = list(server.client.responses.create(model="talking", input=MESSAGES, max_output_tokens=12, temperature=0, stream=True))  # type: ignore[call-overload]
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == expected(
        talking, chat_prompt("Why is the sky blue?"), 12
    )
    body = requests.post(server.url + "/responses", json={"input": "Why", "max_output_tokens": 2}, timeout=60).json()
    assert body["object"] == "response", "no stream unless one is asked for"


def test_the_model_is_found_by_its_name(server: Server) -> None:
    assert server.client.models.retrieve("talking").id == "talking"
    with pytest.raises(openai.NotFoundError, match="'talking'"):
        server.client.models.retrieve("other/model")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": MESSAGES, "audio": {"voice": "x"}}, "audio"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ("chat/completions", {"messages": MESSAGES, "logit_bias": {"x": 1}}, "logit_bias"),
        ("chat/completions", {"messages": MESSAGES, "logit_bias": {"100000": 1}}, "logit_bias"),
        ("chat/completions", {"messages": MESSAGES, "stop": [""]}, "stop"),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"messages": MESSAGES, "model": "gpt-5"}, "model"),
        ("chat/completions", {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ("chat/completions", {"messages": MESSAGES, "chat_template_kwargs": {"return_tensors": "pt"}}, "chat_template_kwargs"),
        ("chat/completions", {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 100000}]}, "messages.0.content"),
        ("chat/completions", {"messages": MESSAGES, "logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ("chat/completions", {"messages": MESSAGES, "str": 1}, "str"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}], "instructions": "x"}, "input.0.content.0.type"),
        ("responses", {"input": [{"role": "user", "content": "x", "cache": 1}]}, "input.0.cache"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [100000]}, "prompt"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": ["x"] * 129}, "prompt"),
        ("responses", {"input": [{"type": "image"}]}, "input.0.type"),
        ("responses", {"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_cannot_be_done_is_refused_in_openais_form(server: Server, path: str, body: dict[str, Any], param: str, stream: bool) -> None:
    answer = requests.post(f"{server.url}/{path}", json={**body, "stream": stream}, timeout=60)
    if param == "stream_options" and stream:
        assert answer.status_code == 200
        return
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100000, b'{"messages": "\\ud800"}'])
def test_what_is_no_request_is_refused_in_openais_form(server: Server, body: bytes) -> None:
    answer = requests.post(f"{server.url}/chat/completions", data=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_other_methods_and_paths_are_errors_in_openais_form(server: Server) -> None:
    assert requests.get(f"{server.url}/chat/completions", timeout=60).json()["error"]["message"].startswith("GET /v1/chat/completions")
    assert requests.get(f"{server.url}/odd", timeout=60).status_code == 404


def test_a_page_in_a_browser_is_not_answered(server: Server) -> None:
    """Neither what a form may send anywhere, nor by another name that leads to loopback."""
    assert requests.post(f"{server.url}/completions", data='{"prompt": "x"}', timeout=60).status_code == 415
    for host in ("evil.example", "evil.example:80", ""):
        assert requests.get(f"{server.url}/models", headers={"Host": host}, timeout=60).status_code in (400, 403)
    assert requests.get(f"{server.url}/models", headers={"Host": "[::1]:8000"}, timeout=60).status_code == 200


def test_a_talk_goes_on_with_what_the_server_gave(server: Server, talking: Path) -> None:
    first = server.client.responses.create(model="talking", input="Why", max_output_tokens=4, temperature=0)
    talk = [{"role": "user", "content": "Why"}, *[one.model_dump() for one in first.output], {"role": "user", "content": "And"}]
    second = server.client.responses.create(model="talking", input=talk, max_output_tokens=4, temperature=0)  # type: ignore[arg-type]
    assert second.output_text == expected(talking, f"user:Why;assistant:{first.output_text};user:And;a:", 4)


def test_a_stream_with_the_prompt_has_the_offsets_of_the_whole(server: Server) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 4}
    whole = complete(server, "Once", **fields).choices[0].logprobs
    offsets, tokens = [], []
    for chunk in complete(server, "Once", stream=True, **fields):
        for choice in chunk.choices:
            if choice.logprobs:
                offsets += choice.logprobs.text_offset
                tokens += choice.logprobs.tokens
    assert (offsets, tokens) == (whole.text_offset, whole.tokens)


def test_metrics_tell_of_tokens_and_time_and_the_batch(server: Server) -> None:
    complete(server)
    text = requests.get(server.url.removesuffix("/v1") + "/metrics", timeout=60).text
    for name in (
        "time_to_first_token_seconds_count",
        "generated_tokens_total",
        "running",
        "waiting",
        "cache_blocks_used",
        "max_concurrency",
    ):
        assert f"\nshmbroker_serve_{name} " in text
    assert 'shmbroker_serve_requests_total{path="/v1/completions",status="200"}' in text


def test_a_key_is_asked_for_and_a_line_told_of_each_request(broker: shmbroker.LocalBroker, talking: Path) -> None:
    with gpu_worker(talking, "locked"), serving(talking, "locked", "--api-key", KEY) as server:
        assert server.health().status_code == 200
        client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        assert client.completions.create(model="talking", prompt="SECRET", max_tokens=4).choices[0].text
        with pytest.raises(openai.AuthenticationError, match="API key"):
            complete(server)
        for headers in ({}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer ä"}):
            encoded = {name: value.encode() for name, value in headers.items()}
            assert requests.get(server.url + "/models", headers=encoded, timeout=60).status_code == 401
        assert requests.get(server.url.removesuffix("/v1") + "/metrics", timeout=60).status_code == 401
        server.process.terminate()
        server.process.wait(120)
        assert server.process.stderr is not None
        log = server.process.stderr.read().decode()
    assert "'/v1/completions' 200 " in log
    assert "6 tokens of prompt, 4 generated, the first after" in log
    assert "SECRET" not in log
    assert KEY not in log


def test_the_tables_of_the_documents_are_the_code() -> None:
    """docs/serve.md names every field, as implemented or as taken at one value alone."""
    from tee_worker.serving import fields

    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    for kind in (fields.ChatRequest, fields.CompletionRequest, fields.ResponseRequest):
        for name in {*kind.model_fields, *kind.only}:
            assert f"`{name}`" in text, name
    assert json.dumps(fields.MOST_LOGPROBS) in text
