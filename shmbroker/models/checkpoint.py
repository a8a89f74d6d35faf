"""A local Hugging Face checkpoint, of which each side loads only its own part.

A model class is subclassed so that, right after construction on the ``meta`` device, the modules of the other side lose their parameters.
Hugging Face's own loading then reads exactly the weights that are left, with all it knows of sharding, renamed keys, tied weights and GGUF.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from shmbroker.arena.spec import NAME_OF, dtype_named
from shmbroker.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Keep = Callable[["PreTrainedModel", torch.nn.Module], bool]
"""Whether the parameters that belong directly to a module of a model are to be loaded."""

GGUF_SUFFIX = ".gguf"

LONGEST_REASON = 300
"""Characters of a library's own words that are passed on."""

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def model_dtype(name: str) -> torch.dtype:
    """The dtype of weights and activations by its name. Raises :class:`BadInput`."""
    dtype = dtype_named(name)
    if dtype not in MODEL_DTYPES:
        raise BadInput(f"a model cannot be in {name}; there are: {', '.join(NAME_OF[dtype] for dtype in MODEL_DTYPES)}")
    return dtype


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with ``config.json`` and safetensors, or a GGUF file."""

    folder: Path
    gguf_file: str | None = None

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """The checkpoint at ``path``: a folder, or a GGUF file. Raises :class:`BadInput` when there is none."""
        place = Path(path)
        if place.suffix == GGUF_SUFFIX and place.is_file():
            return cls(place.parent, place.name)
        if not place.is_dir():
            raise BadInput(f"model {str(place)!r} is neither a folder nor a .gguf file")
        if (place / "config.json").is_file():
            if not any(place.glob("*.safetensors")):
                raise BadInput(f"model folder {str(place)!r} has a config.json but no *.safetensors: the weights are missing")
            return cls(place)
        found = sorted(file.name for file in place.glob("*" + GGUF_SUFFIX))
        if len(found) == 1:
            return cls(place, found[0])
        raise BadInput(
            f"model folder {str(place)!r} has no config.json"
            + (f" and several GGUF files: name one of {', '.join(found)}" if found else "")
        )

    @property
    def name(self) -> str:
        """For messages: the path as far as it is known."""
        return str(self.folder / self.gguf_file) if self.gguf_file else str(self.folder)

    @property
    def _where(self) -> dict[str, Any]:
        options: dict[str, Any] = {"local_files_only": True}
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        return options

    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        from transformers import AutoConfig

        with self._readable():
            config: PretrainedConfig = AutoConfig.from_pretrained(self.folder, **self._where)
            return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        with self._readable():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder, **self._where)
            return tokenizer

    def model(self, dtype: torch.dtype, keep: Keep | None = None) -> PreTrainedModel:
        """The causal language model with the parameters that ``keep`` names (all of them without it); the others are None."""
        kind = causal_model(self.config())
        with self._readable():
            loaded: Any = (kind if keep is None else partial_model(kind, keep)).from_pretrained(
                self.folder, dtype=dtype, output_loading_info=True, **self._where
            )
        model, found = loaded
        missing = sorted([*found["missing_keys"], *[str(key) for key in found["mismatched_keys"]]])
        if missing:
            raise BadInput(
                f"model {self.name!r} does not have the weights that its config.json asks for: {len(missing)} are missing or of another size, "
                f"first {missing[0]!r}; config and weights are not of one model"
            )
        if keep is not None:
            fill_buffers(model, kind, dtype)
        return cast("PreTrainedModel", model)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library of many makers raises over a broken file
            words = " ".join(str(error).split())
            short = words if len(words) <= LONGEST_REASON else words[:LONGEST_REASON] + " ..."
            raise BadInput(f"model {self.name!r} cannot be read: {type(error).__name__}: {short}") from error


def causal_model(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of the causal language model of ``config``, or of the one that takes pictures too. Raises :class:`BadInput` when there is none."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            kind: type[PreTrainedModel] = auto._model_mapping[type(config)]  # type: ignore[assignment]
            return kind
    raise BadInput(f"{type(config).__name__} is not the configuration of a causal language model")


def partial_model(kind: type[PreTrainedModel], keep: Keep) -> type[PreTrainedModel]:
    """``kind``, but its instances have only the parameters that ``keep`` names."""

    class Partial(kind):  # type: ignore[valid-type, misc]
        """Keeps the modules that it is told to; what a checkpoint holds for the others is passed over."""

        _keys_to_ignore_on_load_unexpected = (r".*",)

        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            if not keep(self, self.get_input_embeddings()):
                config.tie_word_embeddings = False  # nothing is left here to tie
                self._tied_weights_keys: dict[str, str] = {}
                self.all_tied_weights_keys: dict[str, str] = {}
            for module in [module for module in self.modules() if not keep(self, module)]:
                hollow(module)

    Partial.__name__ = Partial.__qualname__ = kind.__name__
    return Partial


def fill_buffers(model: PreTrainedModel, kind: type[PreTrainedModel], dtype: torch.dtype) -> None:
    """Give a model that was made without memory the buffers that no checkpoint holds, as the classes' own code makes them.

    A model of the same configuration is made for them, whose parameters have no memory. Raises :class:`BadInput` for a buffer that so has no value.
    """
    with _parameters_on_meta():
        made = dict(kind._from_config(copy.deepcopy(model.config), dtype=dtype).named_buffers())  # type: ignore[no-untyped-call]
    for name, module in model.named_modules():
        for own in module._non_persistent_buffers_set:
            buffer, filled = module._buffers[own], made.get(f"{name}.{own}".lstrip("."))
            if buffer is None:
                continue
            if filled is None or filled.is_meta or filled.shape != buffer.shape:
                raise BadInput(
                    f"the buffer {own!r} of {name!r} is in no checkpoint, and {kind.__name__} does not make it: load the whole model"
                )
            module._buffers[own] = filled.to(buffer.dtype)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """For the duration, a parameter of a model that this thread makes has a shape and no memory, and is not initialized."""
    from transformers.initialization import no_init_weights

    register, here = torch.nn.Module.register_parameter, threading.get_ident()

    def register_on_meta(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == here:
            param = torch.nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


MISSING = "_shmbroker_missing"
"""Where a hollow module keeps what is known of the parameters that it has no longer."""


def missing_parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters that were not loaded here: shapes and dtypes, on the ``meta`` device."""
    return getattr(module, MISSING, {})


def hollow(module: torch.nn.Module) -> None:
    """Take a module's own parameters away; their shapes and dtypes stay. It can no longer be called."""
    missing = {name: parameter.detach().to("meta") for name, parameter in module._parameters.items() if parameter is not None}
    setattr(module, MISSING, missing)
    for name in missing:
        module.register_parameter(name, None)
    module._is_hf_initialized = True  # type: ignore[assignment]
