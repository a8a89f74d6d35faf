"""Models of random weights by shape and seed: to measure a model's traffic and speed without having its checkpoint.

Every parameter depends on its name, its shape and the seed alone, so each side makes its own part, and both fit together.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from shmbroker.errors import BadInput
from shmbroker.models.checkpoint import Keep, causal_model, partial_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "mistral-7b": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""By name, as the models' own config.json gives them (huggingface.co/meta-llama, mistralai, Qwen, HuggingFaceTB)."""

_PERIOD = 1_048_583
"""Random numbers are made for so many elements and then repeated: a prime, so that no two rows of a matrix are alike."""

_DEVIATION = 0.02
"""What Hugging Face starts training with (``initializer_range``)."""


@dataclass(frozen=True, slots=True)
class RandomModel:
    """A model of random weights; used like a :class:`Checkpoint`."""

    shape: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise BadInput(f"shape {self.shape!r} is not known; there are: {', '.join(SHAPES)}")

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.shape}, random weights of seed {self.seed}"

    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        from transformers import AutoConfig

        config: PretrainedConfig = AutoConfig.for_model(**SHAPES[self.shape])
        return config

    def model(self, dtype: torch.dtype, keep: Keep | None = None) -> PreTrainedModel:
        """The causal language model with the parameters that ``keep`` names (all of them without it); the others are None."""
        from transformers.initialization import no_init_weights

        config = self.config()
        whole = causal_model(config)
        kind: Any = whole if keep is None else partial_model(whole, keep)
        with no_init_weights():  # memory that is not written costs nothing: what the other side has is never made here
            model = cast("PreTrainedModel", kind._from_config(config, dtype=dtype))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    self._fill(name, parameter)
                elif name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.fill_(1.0)
        if config.tie_word_embeddings:
            model.tie_weights()
        model.train(False)
        return model

    def _fill(self, name: str, parameter: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self.seed)
        period = torch.empty(min(_PERIOD, parameter.numel())).normal_(0.0, _DEVIATION, generator=generator).to(parameter.dtype)
        flat = parameter.view(-1)
        whole = flat.numel() // period.numel() * period.numel()
        flat[:whole].view(-1, period.numel()).copy_(period)
        flat[whole:].copy_(period[: flat.numel() - whole])
