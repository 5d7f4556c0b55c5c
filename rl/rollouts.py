"""Rollouts: what an engine is asked for, what it gives, and the file in which one iteration's rollouts are kept.

A rollout is one response to a prompt; the rollouts of one prompt are a group. A file is numpy's .npz of arrays alone:

    head             JSON, as bytes: RolloutsHead
    prompts          JSON, as bytes: the id of the prompt of each rollout, and how it ended
    numbers, seeds, versions, forced         one per rollout
    ends             where each rollout's tokens end in the three arrays below
    tokens, log_probs, inserted              of all rollouts, one after another

and, where the engine has told which experts it chose (rollout.router_replay):

    response_experts                         of all rollouts' tokens
    prompt_experts, prompt_ends              of the tokens of prompts, one after another, and where each prompt ends
    prompt_of                                which of these prompts is that of each rollout
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.files import replacing
from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.encoding.encode import LongSample
from rl.errors import RolloutError

Finish = Literal["ended", "truncated", "media"]


@dataclass(frozen=True)
class RolloutPrompt:
    """A prompt that a response is to follow.

    Attributes:
        id: "shard.tar/KEY".
        sample: its tokens with expanded media tokens, positions and grids; patches once it is `decoded`. No token
            carries loss.
        images: encoded files as stored, for engines that decode them themselves.
        videos: likewise.
        thinks: whether the model is to think first.
        undecoded: what patches are made from; None: they are there, or are not needed.
    """

    id: str
    sample: EncodedSample
    images: tuple[bytes, ...]
    videos: tuple[bytes, ...]
    thinks: bool
    undecoded: LongSample | None = None

    def decoded(self) -> RolloutPrompt:
        """Return the prompt with its patches.

        Raises:
            BadSample: An image or video cannot be decoded.
        """
        if self.undecoded is None:
            return self
        return replace(self, sample=self.undecoded.piece(0, len(self.undecoded)), undecoded=None)


@dataclass(frozen=True)
class Request:
    """A group of rollouts of one prompt, one per seed."""

    prompt: RolloutPrompt
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: from the model's whole distribution.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        max_thinking_tokens: tokens of a thought; where it has not ended by then, its end is inserted (`force_answer`).
        max_answer_tokens: tokens after the thought; without thinking, of the whole response.
        force_answer: whether a thought that is too long is ended. Without it the response is truncated.
        routed_experts: whether rollouts are to tell which experts were chosen (router replay).
    """

    temperature: float
    max_thinking_tokens: int
    max_answer_tokens: int
    force_answer: bool
    routed_experts: bool = False


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """The experts that an engine has chosen, uint8 [tokens, layers with experts, experts per token].

    Attributes:
        prompt: for the prompt's tokens; one array for all rollouts that it was read once for.
        response: for the response's. The last one was never read by the engine: NOT_ROUTED.
    """

    prompt: np.ndarray
    response: np.ndarray


@dataclass(frozen=True, eq=False)
class Rollout:
    """One response.

    Attributes:
        prompt_id: of its prompt.
        number: in its group.
        seed: with which it was drawn.
        tokens: int64 [drawn], what follows the prompt: inserted tokens and the token that ended it included.
        log_probs: float32 [drawn], by the engine, of the distribution at the temperature; nan where inserted.
        inserted: bool [drawn], put there to end the thought. Such tokens carry no loss.
        finish: `ended` by an end-of-turn token, `truncated` by a limit, or by a `media` token, which is its last.
        forced: whether the thought was ended by inserted tokens.
        version: of the weights that drew it.
        experts: which experts were chosen, if `Sampling` asks for them.
    """

    prompt_id: str
    number: int
    seed: int
    tokens: np.ndarray
    log_probs: np.ndarray
    inserted: np.ndarray
    finish: Finish
    forced: bool
    version: int
    experts: RoutedExperts | None = None


def seed_of(run_seed: int, iteration: int, prompt_id: str, number: int) -> int:
    """Return the seed of one rollout, in [0, 2**63): a function of its arguments alone.

    Args:
        run_seed: train.seed.
        iteration: from 1.
        prompt_id: "shard.tar/KEY".
        number: of the rollout in its group.
    """
    return _hash(f"{run_seed}/{iteration}/{number}/{prompt_id}") >> 1


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return a hash of settings (JSON types): what rollouts depend on beside weights and seeds."""
    return f"{_hash(json.dumps(settings, sort_keys=True)):016x}"


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


# --- the file of one iteration ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutsHead:
    """What a file of rollouts was drawn with. A resumed run uses it again if its own is equal.

    Attributes:
        iteration: from 1.
        version: of the weights.
        run_seed: from which `seed_of` makes the rollouts' seeds.
        settings: the fingerprint of prompts, sampling and engine.
    """

    iteration: int
    version: int
    run_seed: int
    settings: str


def write_rollouts(path: Path, head: RolloutsHead, rollouts: Sequence[Rollout]) -> None:
    """Write rollouts to a file, completely or not at all."""

    def joined(name: str, dtype: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(getattr(rollout, name) for rollout in rollouts)]).astype(dtype)

    arrays = {
        "head": _json_bytes(asdict(head)),
        "prompts": _json_bytes([[rollout.prompt_id, rollout.finish] for rollout in rollouts]),
        "numbers": np.array([rollout.number for rollout in rollouts], np.int64),
        "seeds": np.array([rollout.seed for rollout in rollouts], np.int64),
        "versions": np.array([rollout.version for rollout in rollouts], np.int64),
        "forced": np.array([rollout.forced for rollout in rollouts], bool),
        "ends": np.cumsum([len(rollout.tokens) for rollout in rollouts], dtype=np.int64),
        "tokens": joined("tokens", np.int32),  # half the file: a vocabulary has less than 2**31 tokens
        "log_probs": joined("log_probs", np.float32),
        "inserted": joined("inserted", bool),
        **_expert_arrays([rollout.experts for rollout in rollouts if rollout.experts is not None]),
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _expert_arrays(experts: Sequence[RoutedExperts]) -> dict[str, np.ndarray]:
    """Return the arrays of a file that hold chosen experts, those of a group's prompt once."""
    if not experts:
        return {}
    prompts = {id(each.prompt): each.prompt for each in experts}
    places = {key: place for place, key in enumerate(prompts)}
    return {
        "response_experts": np.concatenate([each.response for each in experts]),
        "prompt_experts": np.concatenate(list(prompts.values())),
        "prompt_ends": np.cumsum([len(prompt) for prompt in prompts.values()], dtype=np.int64),
        "prompt_of": np.array([places[id(each.prompt)] for each in experts], np.int64),
    }


def read_rollouts(path: Path) -> tuple[RolloutsHead, list[Rollout]]:
    """Read a file of rollouts.

    Raises:
        RolloutError: it is damaged, or not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return _head(arrays), _rollouts(arrays)
    except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise RolloutError(
            f"{path} is not a readable file of rollouts ({error}): delete it, to draw them again"
        ) from None


def _head(arrays: Mapping[str, np.ndarray]) -> RolloutsHead:
    content = _json(arrays["head"])
    head = RolloutsHead(**content)
    if any(type(getattr(head, field.name)).__name__ != field.type for field in fields(head)):
        raise ValueError(f"its head is {content}")
    return head


def _rollouts(arrays: Mapping[str, np.ndarray]) -> list[Rollout]:
    prompts, ends = _json(arrays["prompts"]), arrays["ends"].tolist()
    rows = zip(
        prompts,
        arrays["numbers"].tolist(),
        arrays["seeds"].tolist(),
        arrays["versions"].tolist(),
        arrays["forced"].tolist(),
        _spans(ends),
        _experts(arrays, _spans(ends)),
        strict=True,
    )
    tokens, log_probs, inserted = arrays["tokens"].astype(np.int64), arrays["log_probs"], arrays["inserted"]
    if {len(tokens), len(log_probs), len(inserted)} != {ends[-1] if ends else 0}:
        raise ValueError("its arrays are of unequal length")
    return [
        Rollout(prompt, number, seed, tokens[own], log_probs[own], inserted[own], finish, forced, version, experts)
        for (prompt, finish), number, seed, version, forced, own, experts in rows
    ]


def _experts(arrays: Mapping[str, np.ndarray], responses: Sequence[slice]) -> Sequence[RoutedExperts | None]:
    """Return the chosen experts of each rollout, None if the file has none."""
    if "response_experts" not in arrays:
        return [None] * len(responses)
    of_responses, of_prompts = arrays["response_experts"], arrays["prompt_experts"]
    spans = _spans(arrays["prompt_ends"].tolist())
    if (len(of_responses), len(of_prompts)) != (responses[-1].stop, spans[-1].stop):
        raise ValueError("its arrays are of unequal length")
    prompts = [of_prompts[own] for own in spans]
    return [
        RoutedExperts(prompts[place], of_responses[own])
        for place, own in zip(arrays["prompt_of"].tolist(), responses, strict=True)
    ]


def _spans(ends: Sequence[int]) -> list[slice]:
    """Return the places of what lies one after another."""
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []


def _json_bytes(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def _json(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())
