"""Every layout trains like one process: losses, gradient norms, routing and parameters after three steps.

The packs contain images, videos and text. In each step some micro-batches have no image; the second step has none at
all. With two data-parallel ranks, one has all images of a step. Balance loss, expert-bias updates and overlapped
communication are on. Gradients are compared with those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.model import layout_cases
from tests.model.broken_variants import VARIANTS
from tests.model.layout_cases import samples_of_step
from tests.processes import Processes
from tests.reference import reference_gradients, transformers_loss

EXACT = 1e-5
GRADIENTS = 2e-5  # relative, by the norm of a tensor

MOE_ON_TWO = [
    "DP2",
    "EP2",
    "ETP2",
    "TP2 SP",
    "TP2 SP vision=tensor",
    "TP2 SP EP2",
    "PP2",
    "PP2 VPP2",
    "CP2",
    "CP2 EP2",
    "PP2 stages=E|ttttL",
    "PP2 VPP2 stages=Et|tt||tL",
]
DENSE_ON_TWO = ["DP2", "TP2", "TP2 vision=tensor", "TP2 SP", "PP2", "PP2 VPP2", "CP2"]
MOE_ON_FOUR = [
    "EP2 DP4",
    "EP4",
    "EP2 ETP2",
    "TP4 SP",
    "TP2 SP EP2 DP2",
    "TP2 SP EP2 ETP2",
    "TP2 SP CP2",
    "TP2 SP CP2 vision=tensor",
    "TP2 SP PP2",
    "TP2 SP PP2 VPP2",
    "PP4",
    "PP2 EP2",
    "PP2 VPP2 EP2",
    "PP2 CP2",
    "PP2 VPP2 CP2",
    "CP4",
    "CP2 EP4",
    "EP2 CP2",
]
DENSE_ON_FOUR = [
    "DP4",
    "TP4",
    "TP2 SP DP2",
    "TP2 CP2",
    "TP2 CP2 vision=tensor",
    "TP2 SP CP2",
    "TP2 PP2",
    "TP2 SP PP2 VPP2",
    "PP4",
    "PP2 VPP2 DP2",
    "PP2 CP2",
    "CP4",
    "PP4 stages=E|tt|tt|L",
]
# The layouts of make test-fast: each kind of parallelism once.
FAST_MOE = ["DP2", "EP2", "TP2 SP", "PP2", "CP2", "CP2 EP2", "ETP2", "PP2 VPP2", "TP2 SP CP2", "EP2 ETP2", "PP2 CP2"]
FAST_DENSE = ["TP2", "TP2 vision=tensor", "CP2", "PP2 VPP2", "TP2 CP2", "TP2 PP2"]
FAST = {("glm4v_moe", name) for name in FAST_MOE} | {("glm4v", name) for name in FAST_DENSE}
SAME_COUNTS = ("tokens", "samples", "images", "patches", "padding_fraction")


def cases(moe: list[str], dense: list[str]) -> list[Any]:
    pairs = [("glm4v_moe", name) for name in moe] + [("glm4v", name) for name in dense]
    return [pytest.param(*pair, marks=pytest.mark.fast if pair in FAST else ()) for pair in pairs]


def variant_of(hf_folder: tuple[Path, nn.Module]) -> str:
    """Return the variant of the model in the folder."""
    return str(hf_folder[1].config.model_type)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def expected(
    one_process: Processes, hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], str]:
    """The reports of one process and the file of its parameters after three steps."""
    saved = str(tmp_path_factory.mktemp("reference") / "parameters.pt")
    variant, folder = variant_of(hf_folder), str(hf_folder[0])
    answer = one_process.run(layout_cases.train, variant=variant, folder=folder, layout="", save_to=saved)[0]
    return answer["reports"], f"{saved}.0"


# --- three steps against one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("hf_folder", "layout"), cases(MOE_ON_TWO, DENSE_ON_TWO), indirect=["hf_folder"])
def test_two_ranks_train_like_one_process(two_processes: Processes, hf_folder, expected, layout: str) -> None:
    trains_like_one_process(two_processes, hf_folder, expected, layout)


@pytest.mark.parametrize(("hf_folder", "layout"), cases(MOE_ON_FOUR, DENSE_ON_FOUR), indirect=["hf_folder"])
def test_four_ranks_train_like_one_process(four_processes: Processes, hf_folder, expected, layout: str) -> None:
    trains_like_one_process(four_processes, hf_folder, expected, layout)


def trains_like_one_process(processes: Processes, hf_folder, expected, layout: str) -> None:
    reports, saved = expected
    answers = processes.run(
        layout_cases.train, variant=variant_of(hf_folder), folder=str(hf_folder[0]), layout=layout, compare_with=saved
    )
    for answer in answers:
        reports_agree(answer["reports"], reports)
    assert whole_model_difference(answers) <= EXACT
    for name, error in tensor_errors(answer["differences"] for answer in answers).items():
        if name.endswith("expert_bias"):
            assert error == 0, name
        elif not name.endswith("linear_qkv.bias"):  # contains biases of keys, some of whose gradients are zero
            assert error <= 1e-4, name


@pytest.mark.parametrize(
    ("hf_folder", "layout"), [("glm4v_moe", "DP2"), ("glm4v", "TP2 SP"), ("glm4v", "PP2 VPP2")], indirect=["hf_folder"]
)
def test_overlap_in_many_buckets_trains_like_one_process(
    two_processes: Processes, hf_folder, expected, layout: str
) -> None:
    reports, saved = expected
    answers = two_processes.run(
        layout_cases.train_in_many_buckets,
        bucket_size=100_000,
        variant=variant_of(hf_folder),
        folder=str(hf_folder[0]),
        layout=layout,
        compare_with=saved,
    )
    for answer in answers:
        reports_agree(answer["reports"], reports)
    assert whole_model_difference(answers) <= EXACT


@pytest.mark.parametrize(("hf_folder", "layout"), [("glm4v", "PP2 VPP2 DP2")], indirect=["hf_folder"])
def test_weights_of_a_virtual_stage_are_gathered_while_the_one_before_computes(
    four_processes: Processes, hf_folder, layout: str
) -> None:
    for weights, events in four_processes.run(
        layout_cases.gathers_of_the_second_step,
        variant=variant_of(hf_folder),
        folder=str(hf_folder[0]),
        layout=layout,
    ):
        first_forward = events.index("stage 0")
        assert sum(events[:first_forward]) == weights
        assert set(events[first_forward:]) == {"stage 0", "stage 1"}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("hf_folder", "layout"), [("glm4v_moe", "TP2 SP"), ("glm4v_moe", "TP2 SP EP2")], indirect=["hf_folder"]
)
def test_gradient_norm_counts_unmarked_experts_of_two_tensor_ranks(
    two_processes: Processes, hf_folder, expected, layout: str
) -> None:
    unmarked_experts_train_like_one_process(two_processes, hf_folder, expected, layout)


@pytest.mark.parametrize(
    ("hf_folder", "layout"), [("glm4v_moe", "TP4 SP"), ("glm4v_moe", "TP2 SP EP2 ETP2")], indirect=["hf_folder"]
)
def test_gradient_norm_counts_unmarked_experts_of_four_ranks(
    four_processes: Processes, hf_folder, expected, layout: str
) -> None:
    unmarked_experts_train_like_one_process(four_processes, hf_folder, expected, layout)


def unmarked_experts_train_like_one_process(processes: Processes, hf_folder, expected, layout: str) -> None:
    """The expert layers do not mark their weights as tensor parallel; the gradient norm must count them all."""
    answers = processes.run(
        layout_cases.train_with_unmarked_experts,
        variant=variant_of(hf_folder),
        folder=str(hf_folder[0]),
        layout=layout,
    )
    for answer in answers:
        reports_agree(answer["reports"], expected[0])


@pytest.mark.fast
@pytest.mark.parametrize(("hf_folder", "layout"), [("glm4v_moe", "CP2"), ("glm4v", "TP2")], indirect=["hf_folder"])
def test_image_tokens_that_do_not_fit_stop_every_rank(two_processes: Processes, hf_folder, layout: str) -> None:
    errors = two_processes.run(
        layout_cases.image_token_error, variant=variant_of(hf_folder), folder=str(hf_folder[0]), layout=layout
    )
    for error in errors:
        assert error.startswith("image 1 has 8 image tokens in input_ids, its grid needs 1 ")


@pytest.mark.parametrize(
    ("hf_folder", "layout"), [("glm4v_moe", "PP2 VPP2"), ("glm4v_moe", "CP2"), ("glm4v", "TP2")], indirect=["hf_folder"]
)
def test_all_processes_create_the_same_groups(two_processes: Processes, hf_folder, layout: str) -> None:
    """Otherwise they would wait for each other on GPUs."""
    one, other = two_processes.run(
        layout_cases.created_groups, variant=variant_of(hf_folder), folder=str(hf_folder[0]), layout=layout
    )
    assert one == other
    assert one


def reports_agree(reports: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Compare everything that the steps report."""
    for step, (got, want) in enumerate(zip(reports, expected, strict=True), start=1):
        assert got["loss"] == pytest.approx(want["loss"], rel=EXACT), f"loss of step {step}"
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=EXACT), f"gradient norm of step {step}"
        assert got["domain_losses"] == pytest.approx(want["domain_losses"], rel=EXACT)
        assert got["moe"] == pytest.approx(want["moe"], rel=EXACT)
        assert got["part_norms"] == pytest.approx(want["part_norms"], rel=EXACT)
        assert {key: got[key] for key in SAME_COUNTS} == {key: want[key] for key in SAME_COUNTS}


def whole_model_difference(answers: list[dict[str, Any]]) -> float:
    """Return the norm of the difference of all parameters of all ranks, relative to the norm of the parameters."""
    squares = [pair for answer in answers for pair in answer["differences"].values()]
    return (sum(d for d, _ in squares) / sum(s for _, s in squares)) ** 0.5


def tensor_errors(of_ranks: Iterator[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Return the relative difference of every tensor by norm, over the parts of all ranks."""
    sums: dict[str, tuple[float, float]] = {}
    for squares in of_ranks:
        for name, (difference, size) in squares.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + difference, before[1] + size)
    return {name: (difference / max(size, 1e-12)) ** 0.5 for name, (difference, size) in sums.items()}


# --- gradients against transformers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_gradients(hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of transformers' gradients of the first step, without balance loss."""
    model = hf_folder[1]
    model.zero_grad()
    samples = [sample for packed in samples_of_step(variant_of(hf_folder), 1) for sample in packed]
    transformers_loss(model, samples).backward()
    path = tmp_path_factory.mktemp("gradients") / "gradients.pt"
    torch.save(reference_gradients(model), path)
    return str(path)


def gradient_errors(
    processes: Processes, hf_folder, expected: str, layout: str, break_by: str = ""
) -> dict[str, float]:
    answers = processes.run(
        layout_cases.gradients,
        variant=variant_of(hf_folder),
        folder=str(hf_folder[0]),
        layout=layout,
        expected=expected,
        break_by=break_by,
    )
    return tensor_errors(iter(answers))


GRADIENT_CASES_ON_TWO = cases(["PP2 VPP2", "DP2"], ["PP2 VPP2", "DP2"])
GRADIENT_CASES_ON_FOUR = cases(["TP2 SP CP2", "EP2 CP2"], ["TP2 CP2", "CP2 DP2"])


@pytest.mark.parametrize(("hf_folder", "layout"), GRADIENT_CASES_ON_TWO, indirect=["hf_folder"])
def test_gradients_of_two_ranks_equal_transformers(
    two_processes: Processes, hf_folder, transformers_gradients: str, layout: str
) -> None:
    errors = gradient_errors(two_processes, hf_folder, transformers_gradients, layout)
    assert max(errors.values()) <= GRADIENTS, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize(("hf_folder", "layout"), GRADIENT_CASES_ON_FOUR, indirect=["hf_folder"])
def test_gradients_of_four_ranks_equal_transformers(
    four_processes: Processes, hf_folder, transformers_gradients: str, layout: str
) -> None:
    errors = gradient_errors(four_processes, hf_folder, transformers_gradients, layout)
    assert max(errors.values()) <= GRADIENTS, max(errors, key=errors.__getitem__)


BROKEN = [
    ("glm4v_moe", "CP2", "mask one segment off"),
    ("glm4v", "PP2", "mask one segment off"),
    ("glm4v_moe", "CP2", "positions of another rank"),
    ("glm4v", "CP2", "tokens of another rank"),
    ("glm4v", "TP2 SP", "norm gradient not reduced"),
    ("glm4v_moe", "TP2 SP", "tower not reduced"),
    ("glm4v", "CP2", "embeddings at wrong positions"),
    ("glm4v_moe", "TP2 SP", "experts reduced over wrong ranks"),
]


@pytest.mark.parametrize(("hf_folder", "layout", "break_by"), BROKEN, indirect=["hf_folder"])
def test_broken_variant_misses_the_tolerance_a_hundredfold(
    two_processes: Processes, hf_folder, transformers_gradients: str, layout: str, break_by: str
) -> None:
    errors = gradient_errors(two_processes, hf_folder, transformers_gradients, layout, break_by)
    assert max(errors.values()) >= 100 * GRADIENTS


def test_every_broken_variant_is_tested() -> None:
    assert {break_by for _, _, break_by in BROKEN} == set(VARIANTS)


# --- samples that share a pack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["", "CP2", "PP2", "TP2 SP"])
def test_sample_does_not_attend_to_its_neighbour(
    one_process: Processes, two_processes: Processes, hf_folder, layout: str
) -> None:
    processes = two_processes if layout else one_process
    one, other = (
        processes.run(
            layout_cases.losses_beside,
            variant=variant_of(hf_folder),
            folder=str(hf_folder[0]),
            layout=layout,
            seed=seed,
        )[0]
        for seed in (1, 2)
    )
    assert abs(one["chat"] - other["chat"]) > 1e-3
    assert abs(one["text"] - other["text"]) <= 1e-6


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hf_folder", "layout"),
    [("glm4v_moe", "EP2 CP2"), ("glm4v_moe", "TP2 SP PP2 VPP2"), ("glm4v", "TP2 CP2")],
    indirect=["hf_folder"],
)
def test_layout_gives_the_same_bits_twice(four_processes: Processes, hf_folder, tmp_path: Path, layout: str) -> None:
    first, second = (
        four_processes.run(
            layout_cases.train,
            variant=variant_of(hf_folder),
            folder=str(hf_folder[0]),
            layout=layout,
            save_to=str(tmp_path / run),
        )
        for run in ("first", "second")
    )
    assert first == second
    for rank in range(4):
        one, other = (torch.load(tmp_path / f"{run}.{rank}", weights_only=True) for run in ("first", "second"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


# --- bf16 -------------------------------------------------------------------------------------------------------------

STEPS = tuple(range(1, 21))


def test_bf16_losses_follow_fp32_in_two_layouts(one_process: Processes, two_processes: Processes, hf_folder) -> None:
    case: dict[str, Any] = {"variant": variant_of(hf_folder), "folder": str(hf_folder[0]), "steps": STEPS}
    fp32 = one_process.run(layout_cases.train, layout="", **case)[0]["reports"]
    assert fp32[-1]["loss"] < fp32[0]["loss"] - 0.2
    for layout in ("TP2 SP", "PP2"):
        bf16 = two_processes.run(layout_cases.train, layout=layout, dtype="bfloat16", timeout=300, **case)[0]["reports"]
        for got, want in zip(bf16, fp32, strict=True):
            assert got["loss"] == pytest.approx(want["loss"], abs=5e-3)
