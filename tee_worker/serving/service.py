"""What is served: one split model, its tokenizer, the engine that generates, and the counts of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tee_worker.serving.answers import Answer, TextStream
from tee_worker.serving.engine import Engine, Generation, SequenceToGenerate
from tee_worker.serving.fields import MOST_STOPS, Refused
from tee_worker.serving.resumption import AnswerSoFar, Resumption
from tee_worker.serving.sampling import Choices, Sampling
from tee_worker.trust.session import TrustReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.chat_parsing import ResponseParser

    from tee_worker.serving.fields import Asked


LONGEST_TOKEN = 256
"""Characters. A text with more than so many for each token that there is room for is too long without being looked at."""

MOST_BIASES = 1024

_LONGEST_ID = 10
"""Digits."""


@dataclass(slots=True)
class Service:
    """One model, for the handlers of all endpoints. Used in the event loop's thread."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    choices: Choices
    max_context: int
    trouble: Callable[[], str]
    """Why no call can be made now; empty when one can."""
    worker: Callable[[], str]
    """The GPU worker's name."""
    trust: Callable[[], TrustReport]
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, asked: str | None) -> None:
        """Raise :class:`Refused` for another model than the one that is served."""
        if asked is not None and asked != self.name:
            raise Refused(
                f"model: this server serves {self.name!r}, not {asked!r}",
                "model",
                code="model_not_found",
            )

    def answer(
        self,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        new_tokens: int | None,
        stops: Sequence[str],
        parser: ResponseParser | None = None,
        resumption: Resumption | None = None,
    ) -> Answer:
        """Begin to generate one answer to a prompt of token ids, or go on with it.

        ``new_tokens``: at most, those of before included; None: as many as there is room for.
        """
        left = self.room(prompt)
        ends = self.choices.ends
        try:
            chooser = self.choices.chooser(prompt, sampling)
        except ValueError as error:
            raise Refused(f"the request's sampling cannot be done: {error}") from None
        resumed = self._resumed(resumption, index)
        tokens = [token for arrival in resumed.arrivals for token in arrival] if resumed else []
        if resumed is not None:
            chooser.resume(tokens, resumed.chosen)
        sequence = SequenceToGenerate([*prompt, *tokens], min(new_tokens or left, left) - len(tokens), ends, chooser)
        generation = Generation(sequence)
        answer = Answer(index, generation, TextStream(self.tokenizer, stops, special=parser is not None), parser, resumed=resumed)
        if answer.finish_reason or answer.text.stopped or sequence.new_tokens < 1 or (tokens and tokens[-1] in ends):
            generation.put([])
        else:
            self.engine.start(generation)
        return answer

    def _resumed(self, resumption: Resumption | None, index: int) -> AnswerSoFar | None:
        """What was told of an answer. Raises :class:`Refused` for what cannot be of this model's."""
        if resumption is None:
            return None
        vocabulary = self.model.config.get_text_config().vocab_size
        if index >= len(resumption.answers) or any(
            not 0 <= token < vocabulary for arrival in resumption.answers[index].arrivals for token in arrival
        ):
            raise Refused("the stream to go on with is none of this model's: all servers behind one endpoint must serve the same")
        return resumption.answers[index]

    def room(self, prompt: Sequence[int]) -> int:
        """For how many tokens there is room after a prompt. Raises :class:`Refused` where there is none."""
        if not prompt:
            raise Refused("the prompt is empty", "prompt")
        left = self.max_context - len(prompt)
        if left < 1:
            raise Refused(
                f"the prompt has {len(prompt)} tokens; this server takes {self.max_context} with the answer (--max-context): shorten it",
                code="context_length_exceeded",
            )
        return left

    def sampling(self, asked: Asked, logprobs: int | None) -> Sampling:
        """What a request says of sampling. Raises :class:`Refused`."""
        vocabulary = self.model.config.get_text_config().vocab_size
        if len(asked.logit_bias or {}) > MOST_BIASES:
            raise Refused(f"logit_bias: at most {MOST_BIASES} tokens", "logit_bias")
        bias: dict[int, float] = {}
        for token, value in (asked.logit_bias or {}).items():
            if not token.isdecimal() or len(token) > _LONGEST_ID or int(token) >= vocabulary:
                raise Refused(f"logit_bias: {token!r} is no token id: this model has 0 to {vocabulary - 1}", "logit_bias")
            if not -100 <= value <= 100:
                raise Refused(f"logit_bias: {value!r} for token {token} is not in -100 to 100", "logit_bias")
            bias[int(token)] = value
        return Sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=asked.seed,
            frequency_penalty=asked.frequency_penalty or 0.0,
            presence_penalty=asked.presence_penalty or 0.0,
            logit_bias=bias,
            logprobs=logprobs,
        )

    def stops(self, asked: Any) -> list[str]:
        """The strings at which a request wants its answer to stop. Raises :class:`Refused`."""
        stops = [asked] if isinstance(asked, str) else list(asked or [])
        if any(not stop for stop in stops) or len(stops) > MOST_STOPS:
            raise Refused(f"stop: give up to {MOST_STOPS} strings, none of them empty", "stop")
        return stops

    def check_length(self, text: str, param: str) -> None:
        """Raise :class:`Refused` for a text that cannot fit, before it is divided into tokens."""
        if len(text) > self.max_context * LONGEST_TOKEN:
            raise Refused(
                f"{param}: {len(text)} characters cannot be {self.max_context} tokens (--max-context): shorten it",
                param,
                code="context_length_exceeded",
            )

    def text_of(self, token: int) -> str:
        """Of one token."""
        return str(self.tokenizer.decode([token]))
