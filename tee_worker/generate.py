"""Generating text with a split model, from the command line's arguments to the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from shmbroker.client import Report
from shmbroker.control.status import ask
from shmbroker.errors import BadInput
from shmbroker.models import Checkpoint, model_dtype
from shmbroker.settings import mib
from tee_worker.analytic import Analytic, compare
from tee_worker.own_peers import own_peers
from tee_worker.private_memory import private_bytes
from tee_worker.run_options import GenerateOptions
from tee_worker.split_run import channel_as_asked, check, compute_with, split_run
from tee_worker.trust.session import TrustReport

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


OnText = Callable[[str], None]


class Outcome(msgspec.Struct, frozen=True):
    """What came of it."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    split: str
    seconds: float
    """Of ``generate()``, from the first token's prefill to the last."""
    tokens_per_second: float
    private_bytes: int
    """Private resident memory of this process at the end: the shared segment is not in it."""
    parameter_bytes: int
    """Of the model's parameters that were loaded here."""
    report: Report
    analytic: Analytic
    trust: TrustReport


class Reference(msgspec.Struct, frozen=True):
    """What came of the same in one process."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    seconds: float
    """Of ``generate()``, as in :class:`Outcome`."""
    tokens_per_second: float


def generate(options: GenerateOptions, on_text: OnText | None = None, on_note: OnText = lambda note: None) -> Outcome:
    """Run one greedy generation. ``on_text`` is given the text as it comes, ``on_note`` what goes on before. Raises :class:`ShmBrokerError`."""
    check(options)
    checkpoint = Checkpoint.at(options.model)
    if not options.local:
        ask(options.instance)  # before anything is loaded: a missing broker is told at once
    tokenizer = checkpoint.tokenizer()
    ids = _prompt(options, checkpoint, tokenizer)
    prompt_tokens = ids.shape[1]
    on_note("loading the model's own part ...")
    with split_run(
        options,
        checkpoint,
        channel_as_asked,
        prompt_tokens=prompt_tokens,
        new_tokens=options.max_new_tokens,
        peers=own_peers(options, on_note, "--model", options.model) if options.local else None,
        on_note=on_note,
    ) as running:
        begun = time.perf_counter()
        tokens = run(running.model, tokenizer, ids, options.max_new_tokens, on_text)
        seconds = time.perf_counter() - begun
        report = running.channel.report()
        trust = running.trust_report()
    return Outcome(
        text=_text(tokenizer, tokens),
        tokens=tuple(tokens),
        prompt_tokens=prompt_tokens,
        split=str(running.splits),
        seconds=seconds,
        tokens_per_second=len(tokens) / seconds,
        private_bytes=private_bytes(),
        parameter_bytes=sum(parameter.nbytes for parameter in running.model.parameters()),
        report=report,
        analytic=compare(running.traffic(prompt_tokens, len(tokens)), report),
        trust=trust,
    )


def reference(options: GenerateOptions, on_text: OnText | None = None, on_note: OnText = lambda note: None) -> Reference:
    """The same model in this process alone, as Hugging Face generates: no broker, no other process. Callables as of :func:`generate`."""
    checkpoint = Checkpoint.at(options.model)
    compute_with(options.threads)
    tokenizer = checkpoint.tokenizer()
    ids = _prompt(options, checkpoint, tokenizer)
    on_note("loading the whole model ...")
    model = checkpoint.model(model_dtype(options.dtype))
    begun = time.perf_counter()
    tokens = run(model, tokenizer, ids, options.max_new_tokens, on_text)
    seconds = time.perf_counter() - begun
    return Reference(_text(tokenizer, tokens), tuple(tokens), ids.shape[1], seconds, len(tokens) / seconds)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _prompt(options: GenerateOptions, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    ids = encode(tokenizer, options.prompt, options.chat)
    check_context(checkpoint.config(), ids.shape[1], options.max_new_tokens)
    return ids


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """The prompt's token ids, ``[1, tokens]`` int64; with ``chat`` as a user's message in the model's chat template."""
    if chat:
        if tokenizer.chat_template is None:
            raise BadInput("this model has no chat template: leave --chat out")
        message = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if ids.shape[1] == 0:
        raise BadInput("the prompt is empty: give --prompt some text")
    return ids


def check_context(config: PretrainedConfig, prompt_tokens: int, new_tokens: int) -> None:
    """Raise :class:`BadInput` when prompt and answer are longer than the model can see."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt_tokens + new_tokens > context:
        raise BadInput(
            f"the prompt has {prompt_tokens} tokens and {new_tokens} new ones are asked for, the model's context is {context}: shorten the "
            "prompt or lower --max-new-tokens"
        )


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, new_tokens: int, on_text: OnText | None
) -> list[int]:
    """Greedy generation by Hugging Face's ``generate()``; returns the new tokens."""
    streamer = None if on_text is None else _streamer(tokenizer, on_text)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, streamer=streamer
        )
    return [int(token) for token in output[0, ids.shape[1] :]]


def _streamer(tokenizer: PreTrainedTokenizerBase, on_text: OnText) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Hands finished words on."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def summary(outcome: Outcome) -> str:
    """A line for people, and those on trust."""
    analytic = outcome.analytic
    return (
        f"{_speed(outcome)}, split {outcome.split}; {mib(outcome.parameter_bytes)} of weights and "
        f"{mib(outcome.private_bytes)} of private memory here; analytic model: {analytic.calls} calls, {analytic.sent_bytes} bytes out, "
        f"{analytic.received_bytes} back, {'equal' if analytic.equal else 'NOT EQUAL'} to what was counted\n{outcome.trust.render()}"
    )


def reference_summary(outcome: Reference) -> str:
    """One line for people."""
    return f"{_speed(outcome)}, in this process alone"


def _speed(outcome: Outcome | Reference) -> str:
    return (
        f"{len(outcome.tokens)} tokens after a prompt of {outcome.prompt_tokens} in {outcome.seconds:.2f} s "
        f"({outcome.tokens_per_second:.1f} tokens/s)"
    )
