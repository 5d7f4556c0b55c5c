r"""One response while it is drawn: what ends it, and how a thought that is too long is ended.

With max_thinking_tokens 3 and max_answer_tokens 2, a model that thinks `t`, and GLM-4.5V's form:

    drawn  t t t                              the thought has not ended: its end is inserted
           t t t </think> \n                  and two tokens are left for the answer
           t t t </think> \n a <|user|>       ended, forced
    drawn  t </think> a a                     its own end; truncated after two tokens of the answer

An engine draws at most `budget` tokens and gives them to `extend`, until `finish` says how the response ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.encoding.tokenizer import GlmTokenizer
from model.config import GlmvConfig
from rl.errors import EngineError
from rl.rollouts import Finish, Request, Rollout, RoutedExperts, Sampling

# What ends a thought that is too long, in each form of chats.
FORCED = {"glm45v": "</think>\n", "glm46v": "</think>\n", "glm41v": "</think><answer>"}


@dataclass(frozen=True)
class ResponseTokens:
    """The tokens that mean something in a response.

    Attributes:
        ends: they end a turn, and are the last of a response.
        media: begin, end and content of images and videos. A model that draws one has no image for it: it is the last.
        think_end: </think>.
        forced: inserted to end a thought.
    """

    ends: tuple[int, ...]
    media: tuple[int, ...]
    think_end: int
    forced: tuple[int, ...]

    @classmethod
    def of(cls, model: GlmvConfig, tokenizer: GlmTokenizer, chat_form: str) -> ResponseTokens:
        """Return those of a model, its tokenizer and the form in which it writes chats.

        Raises:
            EngineError: The tokenizer lacks </think>.
        """
        if "</think>" not in tokenizer.special:
            raise EngineError(
                f"data.tokenizer {tokenizer.folder} has no token </think>: the end of a thought cannot be seen"
            )
        return cls(
            ends=model.decoder.eos_token_id,
            media=tuple(model.token_ids.values()),
            think_end=tokenizer.special["</think>"],
            forced=tuple(tokenizer.encode_tagged(FORCED[chat_form])),
        )

    @property
    def stops(self) -> tuple[int, ...]:
        """All tokens after which nothing is drawn."""
        return tuple(dict.fromkeys((*self.ends, *self.media)))


class Response:
    """A response that is being drawn.

    Args:
        special: The tokens that end it.
        sampling: Its limits.
        thinks: Whether the model is to think first.

    Attributes:
        tokens: All so far, inserted ones included.
        log_probs: Of each token, nan where inserted.
        inserted: Of each token, whether it was inserted.
        finish: How it ended; None: it has not.
        forced: Whether its thought was ended by inserted tokens.
    """

    def __init__(self, special: ResponseTokens, sampling: Sampling, thinks: bool) -> None:
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.inserted: list[bool] = []
        self.finish: Finish | None = None
        self.forced = False
        self._special, self._sampling = special, sampling
        self._in_thought = thinks
        limit = sampling.max_answer_tokens
        if thinks:
            limit = sampling.max_thinking_tokens + (0 if sampling.force_answer else limit)
        self.budget = limit  # tokens that may be drawn before the response ends, or something is inserted

    def extend(self, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """Add tokens that were drawn one after another. Those after the end of the response are dropped.

        Tokens after an inserted end of the thought are dropped too: they were drawn without it.
        """
        for token, log_prob in zip(tokens, log_probs, strict=True):
            inserted = self.forced
            self.add(token, log_prob)
            if self.finish or self.forced != inserted:
                break

    def add(self, token: int, log_prob: float) -> None:
        """Add one token that was drawn."""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        self.inserted.append(False)
        self.budget -= 1
        if token in self._special.ends:
            self.finish = "ended"
        elif token in self._special.media:
            self.finish = "media"
        elif self._in_thought and token == self._special.think_end:
            self._in_thought = False
            left = self._sampling.max_answer_tokens
            self.budget = left if self._sampling.force_answer else min(self.budget, left)
        if not self.finish and self.budget == 0:
            self._end_thought_or_response()

    def _end_thought_or_response(self) -> None:
        if not (self._in_thought and self._sampling.force_answer):
            self.finish = "truncated"
            return
        self.tokens += self._special.forced
        self.log_probs += [math.nan] * len(self._special.forced)
        self.inserted += [True] * len(self._special.forced)
        self.forced, self._in_thought = True, False
        self.budget = self._sampling.max_answer_tokens

    def rollout(self, request: Request, number: int, version: int, experts: RoutedExperts | None = None) -> Rollout:
        """Return the finished response as the rollout `number` of a group."""
        assert self.finish is not None
        return Rollout(
            prompt_id=request.prompt.id,
            number=number,
            seed=request.seeds[number],
            tokens=np.array(self.tokens, np.int64),
            log_probs=np.array(self.log_probs, np.float32),
            inserted=np.array(self.inserted, bool),
            finish=self.finish,
            forced=self.forced,
            version=version,
            experts=experts,
        )
