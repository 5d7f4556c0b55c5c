"""Recompute needs less memory and changes neither gradients, token counts, expert biases nor the balance loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import ConfigError
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.recompute import RecomputeConfig
from tests.model import recompute_cases
from tests.model.layout_cases import packs_of_step
from tests.processes import Processes
from tests.reference import forward_inputs
from tests.training import step_cases
from tests.training.step_cases import case_of
from training.step import forward

# `full` runs the same operations again. So does `selective`, but in float32 the gradients of a norm's input, which the
# norm uses several times, are then added in another order.
GRADIENTS = {("full", torch.float32): 0.0, ("selective", torch.float32): 2e-6, ("selective", torch.bfloat16): 0.0}


@pytest.mark.parametrize("part", ["decoder", "vision"])
@pytest.mark.parametrize(("recompute", "dtype"), GRADIENTS)
def test_step_with_recompute_equals_one_without(
    hf_folder: tuple[Path, nn.Module], single_process: None, recompute: str, dtype: torch.dtype, part: str
) -> None:
    folder, reference = hf_folder
    variant = str(reference.config.model_type)  # type: ignore[union-attr]
    without, with_ = (
        recompute_cases.one_step(variant, folder, ParallelConfig(), choice, dtype)
        for choice in (RecomputeConfig(), RecomputeConfig(**{part: recompute}))
    )
    assert_equal(recompute_cases.differences(without, with_), GRADIENTS[recompute, dtype])
    tokens, choices = without.report.tokens, 2  # the tiny model's num_experts_per_tok
    assert [int(counts.sum()) for counts in with_.expert_tokens] == [tokens * choices] * len(with_.expert_tokens)


def assert_equal(difference: dict[str, Any], tolerance: float) -> None:
    assert difference["gradients"] <= tolerance
    without, with_ = difference["reports"]
    for norms in ("grad_norm", "part_norms"):
        assert with_.pop(norms) == pytest.approx(without.pop(norms), rel=1e-6)
    assert with_ == without
    assert difference["expert tokens"]
    assert difference["expert biases"]


LAYOUTS = [
    # variant, layout, recompute
    ("glm4v_moe", "TP2 SP", "full"),
    ("glm4v_moe", "EP2", "selective"),
    ("glm4v_moe", "CP2", "full"),
    ("glm4v_moe", "PP2 VPP2", "selective"),
    ("glm4v", "TP2 SP", "selective"),
    ("glm4v", "PP2 VPP2", "full"),
]


@pytest.mark.parametrize(("hf_folder", "layout", "recompute"), LAYOUTS, indirect=["hf_folder"])
def test_step_of_two_processes_with_recompute_equals_one_without(
    two_processes: Processes, hf_folder, layout: str, recompute: str
) -> None:
    for difference in two_processes.run(
        recompute_cases.compare, layout=layout, recompute=recompute, **case_of(hf_folder)
    ):
        assert_equal(difference, GRADIENTS[recompute, torch.float32])


@pytest.fixture(scope="module")
def without_recompute(two_processes: Processes, hf_folder, tmp_path_factory: pytest.TempPathFactory):
    """The answer of one process about three steps, and the file of its parameters after them."""
    kept = str(tmp_path_factory.mktemp("without_recompute") / "parameters.pt")
    with Processes(1) as one:
        return one.run(step_cases.train, keep_in=kept, **case_of(hf_folder))[0], kept


AGAINST_ONE = [
    # variant, layout, recompute of the decoder, of the tower
    ("glm4v_moe", "TP2 SP", "selective", "full"),
    ("glm4v_moe", "TP2 SP vision=tensor", "full", "selective"),
    ("glm4v_moe", "EP2", "full", "selective"),
    ("glm4v_moe", "CP2", "selective", "full"),
    ("glm4v_moe", "PP2 VPP2", "full", "full"),
    ("glm4v_moe", "PP2 VPP2", "selective", "selective"),
]


@pytest.mark.parametrize(("hf_folder", "layout", "decoder", "vision"), AGAINST_ONE, indirect=["hf_folder"])
def test_two_processes_with_recompute_train_like_one_without(
    two_processes: Processes, hf_folder, without_recompute, layout: str, decoder: str, vision: str
) -> None:
    one, kept = without_recompute
    two = two_processes.run(
        step_cases.train,
        layout=layout,
        recompute={"decoder": decoder, "vision": vision},
        compare_with=kept,
        **case_of(hf_folder),
    )
    step_cases.train_alike(two, one)


@pytest.mark.fast
@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_recompute_keeps_fewer_activations(build: Callable[..., GlmvModel], part: str) -> None:
    none, selective, full = (
        kept_bytes(build(recompute=RecomputeConfig(**{part: choice})), part) for choice in ("none", "selective", "full")
    )
    assert none > 1.1 * selective
    assert selective > 2 * full


def kept_bytes(model: GlmvModel, part: str) -> int:
    """Return the bytes that the forward pass of the tower or the model keeps for the backward pass, without weights."""
    pack = packs_of_step(model.glmv_config.variant, 1)[0]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if part == "vision":
            model.vision_model(pack.patches, pack.grid_thw, pack.frames_per_image)
        else:
            forward(model, pack)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for storage, size in storages.items() if storage not in weights)


@pytest.mark.fast
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_recompute_does_not_change_a_forward_pass_without_gradients(
    model: GlmvModel, build: Callable[..., GlmvModel], recompute: str, training: bool
) -> None:
    inputs = forward_inputs(packs_of_step(model.glmv_config.variant, 1)[0])
    expected = model(**inputs)
    assert torch.equal(build(recompute=RecomputeConfig(recompute, recompute)).train(training)(**inputs), expected)


@pytest.mark.fast
def test_unknown_choice_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"recompute.vision='some': choose one of none, selective, full"):
        RecomputeConfig(vision="some")
