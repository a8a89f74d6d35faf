"""Tiny models of any family, and a GPU worker for one in a thread: what crosses is the same as between processes, and starting takes no seconds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import shmbroker
from gpu_worker.device import CpuDevice
from gpu_worker.ops import register
from gpu_worker.weights import Weights
from shmbroker.models.checkpoint import Checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Weights with which every part matters: those of a fresh model leave logits near zero and attention even."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.numel() or not parameter.is_floating_point():
                continue
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and not any(part in name for part in ("A_log", "conv")):
                parameter.copy_(drawn / parameter.shape[-1] ** 0.5 * (4.0 if "embed" in name else 1.0))
            elif name.endswith("bias") or "sink" in name:
                parameter.copy_(drawn * 0.3)
            elif "norm" in name:
                parameter.add_(drawn * 0.1)
    return model


def tiny_family(folder: Path, family: str, **changes: Any) -> Path:
    """A checkpoint of a family of transformers, tiny: of ``SIZES`` but for ``changes``, of which None leaves a size out."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in {**SIZES, **changes}.items() if name not in changes or value is not None}
    config = AutoConfig.for_model(family, **sizes)
    lively(_auto(config).from_config(config)).save_pretrained(folder)
    return folder


def whole_model(folder: Path, **options: Any) -> PreTrainedModel:
    """The model in one process."""
    model: PreTrainedModel = _auto(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **options).eval()
    return model


def _auto(config: PretrainedConfig) -> Any:
    """What makes the model: for text, or for pictures too."""
    return AutoModelForCausalLM if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText


@contextlib.contextmanager
def served(folder: Path, service: str, dtype: torch.dtype = torch.float32) -> Iterator[str]:
    """The checkpoint served by a worker, for the length of a block; its service."""
    device = CpuDevice()
    worker = shmbroker.Worker(service)
    register(worker, Weights.load(Checkpoint.at(folder), dtype, device), device)
    ready = threading.Event()
    thread = threading.Thread(target=lambda: worker.serve(ready.set))
    thread.start()
    assert ready.wait(300)
    try:
        yield service
    finally:
        worker.stop()
        thread.join()
