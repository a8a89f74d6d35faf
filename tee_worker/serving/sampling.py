"""How the tokens of one sequence are chosen: greedily or by chance, with its own biases, penalties and random numbers, whoever it is computed with."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from transformers import GenerationConfig, LogitsProcessorList

from tee_worker.serving.chosen import Chosen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_THE_WHOLE = ("guidance_scale", "num_beams", "num_return_sequences", "stop_strings", "max_time", "cache_implementation")
"""Of a model's generation configuration: what is not of single tokens, and so is not taken from it."""


LEAST_TEMPERATURE = 1e-4
"""Below it the likeliest token is chosen: nothing else has any probability left in float32."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for. None: as the model's generation configuration says."""

    temperature: float | None = None
    """0: the likeliest token."""
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    """Of its own random numbers; None: others each time."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that it was generated."""
    presence_penalty: float = 0.0
    """Taken off once, when it was."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of tokens."""
    logprobs: int | None = None
    """So many likeliest tokens are told beside each chosen one, with their log probabilities; None: not even its own."""

    def of(self, index: int) -> Sampling:
        """For one of several answers to the same prompt: with a seed, each has another, and always the same."""
        return self if self.seed is None or index == 0 else msgspec.structs.replace(self, seed=(self.seed + index) % (1 << 63))


class Choices:
    """What a model's tokens are chosen by. Takes its generation configuration, and leaves it a greedy one: the choosers do all the rest."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        told = model.generation_config or GenerationConfig()  # type: ignore[no-untyped-call]
        self._config = copy.deepcopy(told)
        for name in _OF_THE_WHOLE:
            setattr(self._config, name, None)
        ends = told.eos_token_id if told.eos_token_id is not None else model.config.get_text_config().eos_token_id
        self.ends = frozenset(one for one in ([ends] if isinstance(ends, int) else ends or []) if one >= 0)
        """The tokens that end an answer."""
        self._config._eos_token_tensor = torch.tensor(sorted(self.ends)) if self.ends else None
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, bos_token_id=told.bos_token_id, eos_token_id=sorted(self.ends) or None, pad_token_id=_padding(told, self.ends)
        )

    def chooser(self, prompt: Sequence[int], sampling: Sampling) -> Chooser:
        """For one sequence, whose prompt is given as token ids. Raises ValueError for what the model's processors cannot take."""
        config = self._with(sampling)
        processors: LogitsProcessorList = self._model._get_logits_processor(  # type: ignore[operator]
            config, input_ids_seq_length=len(prompt), device="cpu"
        )
        return Chooser(prompt, sampling, processors, sampled=bool(config.do_sample))

    def _with(self, sampling: Sampling) -> GenerationConfig:
        """The model's generation configuration with a request's own values."""
        config = copy.deepcopy(self._config)
        if sampling.temperature is not None:
            config.do_sample = sampling.temperature >= LEAST_TEMPERATURE
            config.temperature = sampling.temperature if config.do_sample else 1.0
        if sampling.top_p is not None:
            config.top_p = sampling.top_p
        if sampling.top_k is not None:
            config.top_k = sampling.top_k
        return config


def _padding(told: GenerationConfig, ends: frozenset[int]) -> int | None:
    """Never seen: batches have no padding. ``generate()`` asks for one and tells of it."""
    found: int | None = told.pad_token_id
    return found if found is not None else next(iter(ends), None)


class Chooser:
    """Chooses the tokens of one sequence, one after the other. Used by one thread at a time."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, processors: LogitsProcessorList, *, sampled: bool) -> None:
        """``processors``: applied to ids ``[1, tokens]`` and scores ``[1, vocabulary]``; ``sampled``: chosen by chance among what they leave."""
        self._sampled = sampled
        self._processors = processors
        self._penalties = sampling.frequency_penalty, sampling.presence_penalty
        self._biased = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(sampling.logit_bias.values()))
        self._logprobs = sampling.logprobs
        self._ids = torch.tensor(list(prompt), dtype=torch.long)
        self._length = len(prompt)
        self._generated: Counter[int] = Counter()
        self.error: Exception | None = None
        """What went wrong in choosing: of this sequence alone."""
        self.tells = sampling.logprobs is not None
        """Whether log probabilities are asked for."""
        self.chosen: list[Chosen] = []
        """Where log probabilities are asked for, the tokens so far."""
        self.plain = not (sampled or processors or any(self._penalties) or sampling.logit_bias or self._logprobs is not None)
        """Whether the token is the one with the largest logit, and nothing else is to be done."""
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> Chooser:
        """The sequence's one and only, also where a scheduler begins it anew."""
        return self

    @property
    def greedy(self) -> bool:
        """Whether every token is the likeliest: the same prompt gives the same tokens, wherever it is."""
        return not self._sampled

    def resume(self, tokens: Sequence[int], chosen: Sequence[Chosen]) -> None:
        """Take ``tokens`` for chosen already, and ``chosen`` for what is told of them."""
        for token in tokens:
            self._generated[token] += 1
            self._append(token)
        self.chosen.extend(chosen)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, from the model's logits, float32 ``[vocabulary]``."""
        scores = logits.clone()
        if len(self._bias):
            scores[self._biased] += self._bias
        frequency, presence = self._penalties
        if (frequency or presence) and self._generated:
            scores[list(self._generated)] -= frequency * torch.tensor(list(self._generated.values())) + presence
        if self._processors:
            scores = self._processors(self._ids[None, : self._length], scores[None])[0]  # type: ignore[arg-type]
        if self._sampled:
            token = int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self._generator))
        else:
            token = int(scores.argmax())
        if self._logprobs is not None:
            self.chosen.append(told(logits, token, self._logprobs))
        self._generated[token] += 1
        self._append(token)
        return token

    def _append(self, token: int) -> None:
        if self._length == len(self._ids):
            self._ids = torch.cat([self._ids, self._ids.new_empty(max(64, self._length))])
        self._ids[self._length] = token
        self._length += 1


LEAST_LOGPROB = -9999.0
"""Told of what cannot be, as JSON has no infinity; OpenAI's figure."""


def told(logits: torch.Tensor, token: int, count: int) -> Chosen:
    """A token's log probability, and the ``count`` likeliest, from logits ``[vocabulary]``."""
    logprobs = torch.log_softmax(logits, dim=-1).nan_to_num(nan=LEAST_LOGPROB, neginf=LEAST_LOGPROB)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return Chosen(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
