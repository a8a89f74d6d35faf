"""A split model that is ready to be served, whoever carries the requests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shmbroker.client import FailoverChannel
from shmbroker.errors import BadInput
from shmbroker.models import Checkpoint
from tee_worker.planning.splits import Splits
from tee_worker.run_options import LONGEST_CONTEXT, ServeOptions
from tee_worker.serving.endpoint import Endpoint
from tee_worker.serving.engines import engine_for, places
from tee_worker.serving.sampling import Choices
from tee_worker.serving.service import Service
from tee_worker.serving.told_while import told_while
from tee_worker.split_run import SplitRun, failover_channel, split_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What an endpoint is made of."""

    name: str
    options: ServeOptions
    running: SplitRun[FailoverChannel]
    tokenizer: PreTrainedTokenizerBase
    choices: Choices
    max_context: int
    at_once: int
    """Sequences that are to be computed together, at most."""

    def distrust(self) -> str:
        """Why the GPU worker is believed no more, for good; empty while it is."""
        return self.running.sealed.session.trouble if self.running.sealed is not None else ""

    def trouble(self) -> str:
        """Why no call can be made now; empty when one can."""
        return self.distrust() or self.running.channel.trouble()

    async def endpoint(self, stack: contextlib.ExitStack, on_note: Callable[[str], None]) -> Endpoint:
        """The application, checked; ``stack`` ends what generates for it. Raises :class:`ShmBrokerError`."""
        running, asked = self.running, self.options.max_concurrency is not None
        engine = await engine_for(running.model, self.at_once, self.max_context, asked=asked, on_note=on_note)
        stack.callback(engine.close)
        service = Service(
            self.name,
            running.model,
            self.tokenizer,
            engine,
            self.choices,
            self.max_context,
            self.trouble,
            lambda: running.channel.worker_name,
            running.trust_report,
        )
        return Endpoint(service, api_key=self.options.api_key, access=on_note)


@contextlib.contextmanager
def served_model(
    options: ServeOptions,
    on_note: Callable[[str], None] = lambda note: None,
    *,
    peers: contextlib.AbstractContextManager[object] | None = None,
    wait: float | None = None,
) -> Iterator[ServedModel]:
    """Load and split a model, for the length of a block. ``peers``, ``wait``: as of :func:`split_run`. Raises :class:`ShmBrokerError`."""
    at_once = places(Splits.named(options.split), options)
    checkpoint = Checkpoint.at(options.model)
    max_context = context_of(checkpoint, options.max_context)
    tokenizer = checkpoint.tokenizer()
    with (
        told_while(f"loading {checkpoint.name}", on_note) as loaded,
        split_run(
            options,
            checkpoint,
            failover_channel,
            prompt_tokens=max_context,
            new_tokens=1,
            spare=_spare(checkpoint, at_once, max_context),
            name=options.command,
            peers=peers,
            wait=wait,
            on_note=on_note,
        ) as running,
    ):
        loaded()
        name = options.served_model_name or _name_of(checkpoint)
        yield ServedModel(name, options, running, tokenizer, Choices(running.model), max_context, at_once)


def context_of(checkpoint: Checkpoint, told: int | None) -> int:
    """Tokens of prompt and answer together, at most. Raises :class:`BadInput` for more than the model sees."""
    of_model = getattr(checkpoint.config().get_text_config(), "max_position_embeddings", None) or LONGEST_CONTEXT
    if told is None:
        return int(min(of_model, LONGEST_CONTEXT))
    if not 2 <= told <= of_model:
        raise BadInput(f"--max-context {told}: this model sees up to {of_model} tokens; give 2 to {of_model}")
    return told


def _spare(checkpoint: Checkpoint, at_once: int, max_context: int) -> int:
    """So many largest tensors more than one request's: a pass has the logits of ``at_once``."""
    config = checkpoint.config().get_text_config()
    return int(-(-2 * (at_once - 1) * config.vocab_size // (max_context * config.hidden_size)))


def _name_of(checkpoint: Checkpoint) -> str:
    return (checkpoint.gguf_file or checkpoint.folder.resolve().name).removesuffix(".gguf")
