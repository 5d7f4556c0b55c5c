"""The policy loss on packs with images, against transformers one rollout at a time with a loss of its own.

With router replay the routers of both are told to choose experts at random, which none of them would choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.model.layout_cases import SEQ_LENGTH
from tests.model.test_layouts import tensor_errors, variant_of, whole_model_difference
from tests.processes import Processes
from tests.reference import reference_gradients, save_transformers_model, small_config
from tests.rl import policy_cases
from tests.rl.chosen_experts import random_experts
from tests.rl.policy_cases import PROMPTS, response_log_probs, samples_of, transformers_policy_loss

WHOLE, OF_TENSOR, LOSS = 2e-5, 1e-4, 1e-6
ONE_BATCH = 1e-6  # relative difference of gradients of the same rollouts in other packs
TWO = ["DP2", "TP2 SP", "PP2", "PP2 VPP2", "CP2"]
FOUR = ["TP2 SP CP2", "PP2 CP2", "TP2 SP PP2"]
LAYOUTS_OF_TWO = [("glm4v_moe", name) for name in [*TWO, "EP2"]] + [("glm4v", name) for name in TWO]
LAYOUTS_OF_FOUR = [("glm4v_moe", name) for name in [*FOUR, "EP2 CP2"]] + [("glm4v", name) for name in FOUR]


NO_EXPERTS: list[np.ndarray | None] = [None] * len(PROMPTS)


def all_log_probs(model: nn.Module, variant: str, experts: Sequence[np.ndarray | None]) -> list[torch.Tensor]:
    with torch.no_grad():
        each = zip(samples_of(variant), PROMPTS, experts, strict=True)
        return [response_log_probs(model, sample, drawn, chosen) for sample, (_, drawn), chosen in each]


@pytest.fixture(scope="module")
def case(hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return policy_of_transformers(variant_of(hf_folder), tmp_path_factory.mktemp("policy"), NO_EXPERTS)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same with experts chosen at random."""
    config, rng = small_config("glm4v_moe"), np.random.default_rng(8)
    experts = [random_experts(len(sample.encoded), config.decoder, rng) for sample in samples_of("glm4v_moe")]
    return policy_of_transformers("glm4v_moe", tmp_path_factory.mktemp("replayed"), experts)


def policy_of_transformers(variant: str, folder: Path, experts: Sequence[np.ndarray | None]) -> dict[str, Any]:
    """Return transformers' policy after an update that it took itself: its loss, gradients, and what came before."""
    model = save_transformers_model(small_config(variant), folder)
    old = all_log_probs(model, variant, experts)
    rng = np.random.default_rng(3)
    engine = [values + torch.from_numpy(rng.normal(0, 0.3, len(values)).astype(np.float32)) for values in old]
    before, drew = ([values.numpy() for values in both] for both in (old, engine))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    transformers_policy_loss(model, variant, before, drew, experts)[0].backward()
    optimizer.step()
    model.save_pretrained(folder)  # type: ignore[operator]
    model.zero_grad()
    loss, clipped = transformers_policy_loss(model, variant, before, drew, experts)
    loss.backward()
    file = folder / "expected.pt"
    told = [torch.from_numpy(chosen) for chosen in experts if chosen is not None]
    torch.save({"old": old, "engine": engine, "experts": told, "gradients": reference_gradients(model)}, file)
    with torch.no_grad():
        own_choice, _ = transformers_policy_loss(model, variant, before, drew)
    return {
        "arguments": {"variant": variant, "folder": str(folder), "expected": str(file)},
        "loss": loss.item(),
        "loss of own choice": own_choice.item(),
        "clipped": clipped,
        "log_probs": all_log_probs(model, variant, experts),
    }


def equals_transformers(processes: Processes, case: dict[str, Any], layout: str, **options: Any) -> None:
    answers = processes.run(policy_cases.policy_gradients, layout=layout, **case["arguments"], **options)
    assert 0.02 < case["clipped"] < 0.9
    for answer in answers:
        assert answer["loss"] == pytest.approx(case["loss"], abs=LOSS)
    assert whole_model_difference(answers) <= WHOLE
    errors = tensor_errors(answer["differences"] for answer in answers)
    assert max(errors.values()) <= OF_TENSOR, max(errors, key=errors.__getitem__)


def test_loss_and_gradients_equal_transformers(one_process: Processes, case) -> None:
    equals_transformers(one_process, case, "")


@pytest.mark.parametrize(("hf_folder", "layout"), LAYOUTS_OF_TWO, indirect=["hf_folder"])
def test_two_ranks_equal_transformers(two_processes: Processes, case, layout: str) -> None:
    equals_transformers(two_processes, case, layout)


@pytest.mark.parametrize(("hf_folder", "layout"), LAYOUTS_OF_FOUR, indirect=["hf_folder"])
def test_four_ranks_equal_transformers(four_processes: Processes, case, layout: str) -> None:
    equals_transformers(four_processes, case, layout)


def test_gradient_of_packs_is_that_of_one_big_batch(
    one_process: Processes, two_processes: Processes, case: dict[str, Any]
) -> None:
    """In one pack, in several micro-steps, and over two data-parallel ranks, as the planner divides them."""

    def gradients(processes: Processes, layout: str, seq_length: int) -> dict[str, Any]:
        *_, answer = processes.run(
            policy_cases.repacked_gradients, layout=layout, seq_length=seq_length, **case["arguments"]
        )
        return answer

    whole = gradients(one_process, "", 448)
    assert [[len(pack) for pack in packs] for packs in whole["planned"]] == [[len(PROMPTS)]]
    size = sum(each.double().square().sum() for each in whole["gradients"].values()).sqrt()
    for processes, layout, packs in ((one_process, "", [3]), (two_processes, "DP2", [2, 2])):
        divided = gradients(processes, layout, SEQ_LENGTH)
        assert [len(of_rank) for of_rank in divided["planned"]] == packs
        squares = [
            (each.double() - divided["gradients"][name].double()).square().sum()
            for name, each in whole["gradients"].items()
        ]
        assert torch.stack(squares).sum().sqrt() <= ONE_BATCH * size
        assert divided["loss"] == pytest.approx(whole["loss"], abs=LOSS)


# --- router replay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_replayed_experts_equal_transformers(one_process: Processes, replayed, recompute: str) -> None:
    assert abs(replayed["loss"] - replayed["loss of own choice"]) > 1000 * LOSS
    equals_transformers(one_process, replayed, "", recompute=recompute)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        *((layout, "none") for layout in [*TWO, "EP2"]),
        ("PP2 VPP2", "full"),
        ("TP2 SP", "full"),
        ("EP2", "selective"),
    ],
)
def test_replayed_experts_of_two_ranks(two_processes: Processes, replayed, layout: str, recompute: str) -> None:
    equals_transformers(two_processes, replayed, layout, recompute=recompute)


@pytest.mark.parametrize("layout", [*FOUR, "EP2 CP2"])
def test_replayed_experts_of_four_ranks(four_processes: Processes, replayed, layout: str) -> None:
    equals_transformers(four_processes, replayed, layout)


@pytest.mark.parametrize("layout", ["", "EP2", "TP2 SP", "CP2", "PP2"])
def test_log_probabilities_with_replayed_experts(
    one_process: Processes, two_processes: Processes, replayed, layout: str
) -> None:
    expected = policy_cases.spread(
        [values.numpy() for values in replayed["log_probs"]], policy_cases.learned_rollouts("glm4v_moe")
    )
    processes = two_processes if layout else one_process
    for answer in processes.run(policy_cases.replayed_log_probs, layout=layout, **replayed["arguments"]):
        for got, want in zip(answer, expected, strict=True):
            is_drawn = got != 0
            torch.testing.assert_close(got[is_drawn], want[is_drawn], rtol=0, atol=1e-5)


# --- the first update -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["", "CP2", "PP2", "TP2 SP", "DP2"])
def test_first_update_is_on_policy(
    one_process: Processes, two_processes: Processes, hf_folder: tuple[Path, nn.Module], layout: str
) -> None:
    """The ratio of the first update is exactly 1; old log-probabilities are transformers'; the second update moved."""
    variant = variant_of(hf_folder)
    expected = policy_cases.spread(
        [values.numpy() for values in all_log_probs(hf_folder[1], variant, NO_EXPERTS)],
        policy_cases.learned_rollouts(variant),
    )
    processes = two_processes if layout else one_process
    answers = processes.run(policy_cases.first_update, variant=variant, folder=str(hf_folder[0]), layout=layout)
    for rank, answer in enumerate(answers):
        first, second = answer["metrics"]
        assert first["policy/max_ratio_deviation"] == 0
        assert first["policy/kl"] == 0
        assert first["policy/clip_fraction"] == 0
        assert second["policy/max_ratio_deviation"] > 0.01
        wanted = expected[rank::2] if layout == "DP2" else expected
        for got, want in zip(answer["log_probs"], wanted, strict=True):
            is_drawn = got != 0
            torch.testing.assert_close(got[is_drawn], want[is_drawn], rtol=0, atol=1e-5)
        assert answer["mismatch"] == answers[0]["mismatch"]
