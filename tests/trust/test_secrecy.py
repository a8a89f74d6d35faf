"""What lies in shared memory: after each call the whole segment is searched for what must not be there."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shmbroker
from shmbroker.trust.pads import Pad, Pads
from tee_worker import offload
from tee_worker.trust.sealed import SealedLayer
from tests.shared_memory import path_of
from tests.trust.conftest import BLIND, IDS, MODES, SHARES, generate, sealed, whole_model

WHOLE_EVERY = 16
"""Calls between two looks at every byte; in between at every word of 32 bits, where tensors lie."""


PAD = "a pad"


class Segment:
    """The bytes of a client's segment, as any process of the same user has them."""

    def __init__(self, client: shmbroker.Client) -> None:
        with open(path_of(client.segment.name), "rb") as file:
            self._map = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, prot=mmap.PROT_READ)

    def holds(self, windows: np.ndarray, phases: int) -> bool:
        """Whether any of the windows, sorted, stands anywhere in it, at every byte if there are four ``phases``, else at every word."""
        raw = np.frombuffer(self._map, dtype=np.uint8)
        for phase in range(phases):
            here = windows_of(raw[phase:])
            places = np.searchsorted(windows, here)
            places[places == len(windows)] = 0
            if len(windows) and bool((windows[places] == here).any()):
                return True
        return False

    def holds_ids(self) -> bool:
        """Whether any run of token ids stands anywhere in it: small numbers, of which a counter or a size may be like one or two."""
        ids = IDS.flatten()
        runs = [ids[first : first + 4].to(dtype).numpy().tobytes() for dtype in (torch.int64, torch.int32) for first in range(len(ids) - 3)]
        return any(self._map.find(run) >= 0 for run in runs)

    def close(self) -> None:
        self._map.close()


def windows_of(raw: np.ndarray) -> np.ndarray:
    """A number for each window of four words of 32 bits, at each word; windows with two equal words, as rows of zeros, are left out."""
    words = raw[: len(raw) // 4 * 4].view(np.uint32).astype(np.uint64)
    if len(words) < 4:
        return np.empty(0, dtype=np.uint64)
    a, b, c, d = (words[shift : len(words) - 3 + shift] for shift in range(4))
    mixed = ((a * np.uint64(0x9E3779B97F4A7C15) + b) * np.uint64(0xC2B2AE3D27D4EB4F) + c) * np.uint64(0x165667B19E3779F9) + d
    different = (a != b) & (b != c) & (c != d) & (a != c) & (b != d)
    found: np.ndarray = mixed[different]
    return found


def windows_of_tensor(tensor: torch.Tensor) -> np.ndarray:
    return windows_of(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy())


class Watch:
    """Collects every secret of a model's calls, and looks for them all after each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, segments: list[Segment]) -> None:
        self.found: list[str] = []
        self.calls = 0
        self._secrets: dict[str, list[np.ndarray]] = {}
        self._segments = segments
        run, take = SealedLayer.run, Pads.take

        def watched_take(pads: Pads, rows: int) -> list[Pad]:
            found = take(pads, rows)
            for pad in found:
                self._add(PAD, pad.masks)
                self._add("what a weight makes of a pad", pad.products)
            return found

        def watched_run(layer: SealedLayer, call: int, x: torch.Tensor) -> torch.Tensor:
            self._add("an input", x)
            norms = x.double().norm(dim=1, keepdim=True)
            self._add("an input as integers", (x.double() * (layer.limit / norms)).round().to(torch.int32))
            out = run(layer, call, x)
            self._add("an output", out)
            self.look()
            return out

        monkeypatch.setattr(Pads, "take", watched_take)
        monkeypatch.setattr(SealedLayer, "run", watched_run)

    def _add(self, what: str, tensor: torch.Tensor) -> None:
        self._secrets.setdefault(what, []).append(windows_of_tensor(tensor))

    def look(self) -> None:
        self.calls += 1
        if any(segment.holds_ids() for segment in self._segments):
            self.found.append("token ids")
        phases = 4 if self.calls % WHOLE_EVERY == 0 else 1
        for what, windows in self._secrets.items():
            together = np.sort(np.concatenate(windows))
            # At shares the second worker is given the pads: its segment may hold them, and nothing else.
            searched = self._segments[:1] if what == PAD else self._segments
            if any(segment.holds(together, phases) for segment in searched):
                self.found.append(what)
        self._secrets = {what: windows[-8:] for what, windows in self._secrets.items()}  # of the last calls: a block is free again soon


@pytest.fixture
def small_clients(broker: shmbroker.LocalBroker) -> Any:
    with shmbroker.connect(arena="1M") as first, shmbroker.connect(arena="1M") as second:
        yield first, second


def watched(
    monkeypatch: pytest.MonkeyPatch, clients: tuple[shmbroker.Client, shmbroker.Client], tiny: Path, workers: tuple[str, str], mode: str
) -> Watch:
    first, second = clients
    segments = [Segment(first)] + ([Segment(second)] if mode == "shares" else [])
    watch = Watch(monkeypatch, segments)
    model = whole_model(tiny)
    options = {"blind": BLIND, "shares": SHARES}.get(mode, MODES[mode])
    with sealed(model, first.channel(workers[0]), options, second.channel(workers[1])):
        generate(model)
    for segment in segments:
        segment.close()
    assert watch.calls >= 60
    return watch


@pytest.mark.parametrize("mode", ["blind", "shares"])
def test_no_window_of_any_secret_stands_in_the_segment_after_any_call(
    monkeypatch: pytest.MonkeyPatch, small_clients: Any, tiny: Path, workers: tuple[str, str], mode: str
) -> None:
    """T1."""
    assert watched(monkeypatch, small_clients, tiny, workers, mode).found == []


def test_the_search_finds_what_is_there(monkeypatch: pytest.MonkeyPatch, small_clients: Any, tiny: Path, workers: tuple[str, str]) -> None:
    """At ``verify`` the integers lie there in plain."""
    assert "an input as integers" in watched(monkeypatch, small_clients, tiny, workers, "verify").found


def test_the_search_finds_token_ids_where_they_are(small_clients: Any, tiny: Path, workers: tuple[str, str]) -> None:
    """At ``plain`` the worker looks the embedding up."""
    client, _ = small_clients
    segment = Segment(client)
    model = whole_model(tiny)
    offload(model, client.channel(workers[0]), check=False)
    assert not segment.holds_ids()
    with torch.inference_mode():
        model(IDS)
    assert segment.holds_ids()
    segment.close()
