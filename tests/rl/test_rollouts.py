"""Rollouts' seeds, and the file that keeps them: what numpy reads of it, and damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.errors import RolloutError
from rl.rollouts import (
    Rollout,
    RolloutsHead,
    RoutedExperts,
    fingerprint,
    read_rollouts,
    seed_of,
    write_rollouts,
)

pytestmark = pytest.mark.fast

HEAD = RolloutsHead(iteration=3, version=2, run_seed=7, settings="00ff")
NAN = float("nan")


def rollout(number: int, tokens: list[int], log_probs: list[float], **others: Any) -> Rollout:
    fields = {"finish": "ended", "forced": False, "version": 2, **others}
    inserted = np.isnan(np.array(log_probs, np.float32))
    return Rollout(
        "ocr-000.tar/7",
        number,
        2**63 - 1 - number,
        np.array(tokens, np.int64),
        np.array(log_probs, np.float32),
        inserted,
        **fields,
    )


ROLLOUTS = [
    rollout(0, [5, 6, 7], [-0.5, NAN, -0.25], forced=True, version=1),
    rollout(1, [], [], finish="truncated"),
    rollout(2, [9], [-1.5], finish="media"),
]


def test_file_of_rollouts_is_read_as_written(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "a.npz", HEAD, ROLLOUTS)
    head, read = read_rollouts(tmp_path / "a.npz")
    assert head == HEAD
    assert len(read) == len(ROLLOUTS)
    for one, other in zip(read, ROLLOUTS, strict=True):
        for name, value in vars(other).items():
            np.testing.assert_array_equal(getattr(one, name), value, err_msg=name)
            if isinstance(value, np.ndarray):
                assert getattr(one, name).dtype == value.dtype, name
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_file_holds_plain_arrays_and_the_same_bytes_for_the_same_rollouts(tmp_path: Path) -> None:
    for name in "ab":
        write_rollouts(tmp_path / f"{name}.npz", HEAD, ROLLOUTS)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    arrays = np.load(tmp_path / "a.npz", allow_pickle=False)
    assert arrays["tokens"].tolist() == [5, 6, 7, 9]
    assert arrays["ends"].tolist() == [3, 3, 4]


def routed() -> list[Rollout]:
    """Return the rollouts with chosen experts: the first two are of one prompt, of four tokens."""
    rng = np.random.default_rng(4)

    def experts(tokens: int) -> np.ndarray:
        return rng.integers(0, 256, (tokens, 3, 2), dtype=np.uint8)

    prompts = [experts(4), experts(6)]
    return [
        replace(each, experts=RoutedExperts(prompts[number // 2], experts(len(each.tokens))))
        for number, each in enumerate(ROLLOUTS)
    ]


def test_chosen_experts_are_read_as_written_and_those_of_a_prompt_are_kept_once(tmp_path: Path) -> None:
    written = routed()
    write_rollouts(tmp_path / "a.npz", HEAD, written)
    _, read = read_rollouts(tmp_path / "a.npz")
    for one, other in zip(read, written, strict=True):
        assert one.experts is not None
        assert other.experts is not None
        for name in ("prompt", "response"):
            found, expected = getattr(one.experts, name), getattr(other.experts, name)
            np.testing.assert_array_equal(found, expected)
            assert (found.dtype, found.shape) == (np.uint8, expected.shape)
    prompts = [each.experts.prompt for each in read if each.experts]
    assert prompts[0] is prompts[1] is not prompts[2]
    arrays = np.load(tmp_path / "a.npz", allow_pickle=False)
    assert arrays["prompt_experts"].shape == (10, 3, 2)
    assert arrays["response_experts"].shape == (4, 3, 2)
    assert arrays["prompt_of"].tolist() == [0, 0, 1]
    write_rollouts(tmp_path / "b.npz", HEAD, read)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("damage", ["short responses", "short prompts", "unknown prompt", "no prompts"])
def test_damaged_experts_are_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "step.npz"
    write_rollouts(path, HEAD, routed())
    arrays = dict(np.load(path))
    changes = {
        "short responses": {"response_experts": arrays["response_experts"][:3]},
        "short prompts": {"prompt_experts": arrays["prompt_experts"][:9]},
        "unknown prompt": {"prompt_of": arrays["prompt_of"] + 1},
        "no prompts": {"prompt_ends": arrays["prompt_ends"][:0]},
    }
    np.savez(path, **{**arrays, **changes[damage]})
    with pytest.raises(RolloutError, match=r"step\.npz is not a readable file of rollouts"):
        read_rollouts(path)


def test_iteration_without_rollouts(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "none.npz", HEAD, [])
    assert read_rollouts(tmp_path / "none.npz") == (HEAD, [])


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickled", "other arrays", "short"])
def test_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "step.npz"
    write_rollouts(path, HEAD, ROLLOUTS)
    content, arrays = path.read_bytes(), dict(np.load(path))
    if damage == "pickled":
        np.savez(path, **{**arrays, "head": np.array([HEAD.__dict__], dtype=object)})
    elif damage == "other arrays":
        np.savez(path, tokens=arrays["tokens"])
    elif damage == "short":
        np.savez(path, **{**arrays, "tokens": arrays["tokens"][:2]})
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"rollouts"}[damage])
    with pytest.raises(RolloutError, match=r"step\.npz is not a readable file of rollouts"):
        read_rollouts(path)


def test_absent_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="No such file"):
        read_rollouts(tmp_path / "absent.npz")


def test_seeds_differ_in_every_argument_and_are_the_same_in_every_process() -> None:
    seeds = [
        seed_of(run, iteration, prompt, number)
        for run in range(3)
        for iteration in (1, 11, 111)
        for prompt in ("a.tar/1", "a.tar/11", "1/a.tar/1")
        for number in range(40)
    ]
    assert len(set(seeds)) == len(seeds) == 1080
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sum(seed >> 62 for seed in seeds) / len(seeds) == pytest.approx(0.5, abs=0.06)
    assert seed_of(42, 1, "a.tar/1", 0) == 6701652648921555916


def test_fingerprint_depends_on_values_and_not_on_their_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})
