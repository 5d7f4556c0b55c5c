"""Rollouts: what an engine is asked for, what it gives, and the file in which one iteration's rollouts are kept.

A rollout is one response to a prompt; the rollouts of one prompt are a group. A file is numpy's .npz of arrays alone:

    head             JSON, as bytes: RolloutsHead
    prompts          JSON, as bytes: the id of the prompt of each rollout, and how it ended
    numbers, seeds, versions, forced         one per rollout
    ends             where each rollout's tokens end in the three arrays below
    tokens, log_probs, inserted              of all rollouts, one after another
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.files import replacing
from data_pipeline.encoding.batch import EncodedSample
from rl.errors import RolloutError

Finish = Literal["ended", "truncated", "media"]


@dataclass(frozen=True)
class RolloutPrompt:
    """A prompt that a response is to follow.

    Attributes:
        id: "shard.tar/KEY".
        sample: its tokens with expanded media tokens, positions, patches and grids. No token carries loss.
        images: encoded files as stored, for engines that decode them themselves.
        videos: likewise.
        thinks: whether the model is to think first.
    """

    id: str
    sample: EncodedSample
    images: tuple[bytes, ...]
    videos: tuple[bytes, ...]
    thinks: bool


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
    """

    temperature: float
    max_thinking_tokens: int
    max_answer_tokens: int
    force_answer: bool


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
        "tokens": joined("tokens", np.int64),
        "log_probs": joined("log_probs", np.float32),
        "inserted": joined("inserted", bool),
    }
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_rollouts(path: Path) -> tuple[RolloutsHead, list[Rollout]]:
    """Read a file of rollouts.

    Raises:
        RolloutError: it is damaged, or not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return _head(arrays), _rollouts(arrays)
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
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
        [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else [],
        strict=True,
    )
    tokens, log_probs, inserted = (arrays[name] for name in ("tokens", "log_probs", "inserted"))
    if {len(tokens), len(log_probs), len(inserted)} != {ends[-1] if ends else 0}:
        raise ValueError("its arrays are of unequal length")
    return [
        Rollout(prompt, number, seed, tokens[own], log_probs[own], inserted[own], finish, forced, version)
        for (prompt, finish), number, seed, version, forced, own in rows
    ]


def _json_bytes(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def _json(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())
