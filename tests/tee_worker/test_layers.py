"""Split ``layer``: whole decoder layers on the worker, with the keys and values of each session."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import shmbroker
from shmbroker.models.checkpoint import Checkpoint
from tee_worker import Split, offload
from tee_worker.planning.own_part import own_part
from tests.tee_worker.conftest import gpu_worker
from tests.tee_worker.test_offload import PROMPT, generate


@pytest.fixture
def parts(client: shmbroker.Client, tiny: Path, tiny_worker: str) -> PreTrainedModel:
    model = own_part(Checkpoint.at(tiny), torch.float32, Split.LAYER)
    offload(model, client.channel(tiny_worker), Split.LAYER)
    return model


def test_nothing_of_a_layer_is_loaded_here(parts: PreTrainedModel) -> None:
    assert [name for name, parameter in parts.named_parameters() if parameter.numel()] == ["model.norm.weight"]


def test_a_batch_with_padding_is_generated_as_in_one_process(parts: PreTrainedModel, whole: PreTrainedModel) -> None:
    ids = torch.tensor([[0, 0, 0, 88, 41, 2, 60], [5, 17, 3, 9, 21, 33, 8]])
    mask = (ids != 0).long()
    assert torch.equal(generate(parts, ids, attention_mask=mask), generate(whole, ids, attention_mask=mask))


def test_sampling_and_several_generations_at_once_keep_their_sessions_apart(parts: PreTrainedModel, whole: PreTrainedModel) -> None:
    def step(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = model(ids, past_key_values=cache, use_cache=True).logits.clone()
        return result

    caches = [[DynamicCache(config=model.config) for _ in range(2)] for model in (parts, whole)]
    inputs = (PROMPT, PROMPT.flip(1), PROMPT[:, :1], PROMPT[:, 1:3])
    for number, ids in enumerate(inputs):
        ours, theirs = (step(model, ids, caches[which][number % 2]) for which, model in enumerate((parts, whole)))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert [cache.get_seq_length() for cache in caches[0]] == [8, 9]


def test_a_conversation_goes_on_from_its_cache(parts: PreTrainedModel, whole: PreTrainedModel) -> None:
    found = []
    for model in (parts, whole):
        cache = DynamicCache(config=model.config)
        first = generate(model, PROMPT, past_key_values=cache)
        second = torch.cat([first, PROMPT], dim=1)
        found.append(generate(model, second, past_key_values=cache))
    assert torch.equal(found[0], found[1])


def test_what_would_reorder_or_cut_the_cache_says_that_it_cannot_be_done_at_this_split(parts: PreTrainedModel) -> None:
    with pytest.raises(shmbroker.BadInput, match=r"beam search.* need split 'op'"):
        generate(parts, num_beams=2)


def test_a_cache_that_is_not_the_workers_is_refused(parts: PreTrainedModel, whole: PreTrainedModel) -> None:
    filled = DynamicCache(config=whole.config)
    generate(whole, past_key_values=filled)
    with pytest.raises(shmbroker.BadInput, match="was filled elsewhere"):
        parts(PROMPT[:, :1], past_key_values=filled)
    with pytest.raises(shmbroker.BadInput, match="StaticCache cannot be used"):
        parts(PROMPT, past_key_values=StaticCache(config=whole.config, max_cache_len=32), use_cache=True)


def test_the_worker_lets_go_of_sessions_whose_caches_have_died(client: shmbroker.Client, tiny: Path) -> None:
    """Told with the next call: its memory stays flat over many sessions."""
    with gpu_worker(tiny, "sessions") as pid:
        model = own_part(Checkpoint.at(tiny), torch.float32, Split.LAYER)
        offload(model, client.channel("sessions"), Split.LAYER)

        def resident() -> int:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        def many(count: int) -> None:
            for _ in range(count):
                with torch.inference_mode():
                    model(PROMPT.repeat(8, 20), use_cache=True)  # 8 x 140 tokens: 1 MiB of keys and values
            gc.collect()

        many(20)
        before = resident()
        many(60)
        assert resident() - before < 20 << 20


def test_a_generation_whose_worker_dies_ends_with_a_clear_error_and_never_goes_on_with_another_past(
    client: shmbroker.Client, tiny: Path
) -> None:
    with gpu_worker(tiny, "stateful"), gpu_worker(tiny, "stateful"):
        channel = client.failover_channel("stateful")
        model = own_part(Checkpoint.at(tiny), torch.float32, Split.LAYER)
        offload(model, channel, Split.LAYER)
        cache = DynamicCache(config=model.config)
        model(PROMPT, past_key_values=cache)
        os.kill(channel.worker_pid, signal.SIGKILL)
        with pytest.raises(shmbroker.RemoteOpError, match=r"has seen 0 tokens at layer 0 here, 7 at the client.*start the generation anew"):
            model(PROMPT[:, :1], past_key_values=cache)
        assert generate(model).shape[1] > PROMPT.shape[1], "a new generation goes on with the other worker"
