"""FP8 through Transformer Engine: close to bf16, reproducible, and checkpoints without a trace of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor, nn

from model.backend import gpu, select_backend
from model.canonical_names import canonical_name
from model.config import ConfigError
from model.fp8 import Fp8Config
from model.fp8_rules import check_gpu, is_quantised
from model.glmv import GlmvModel
from model.installed import has_transformer_engine
from tests.gpu.test_bf16 import distance
from tests.gpu.test_runs import BF16, EXACT, run_here, set_back
from tests.launch import metrics
from tests.model.test_parity import PACK, sample
from tests.reference import forward_inputs, pack
from tests.training.test_resume import trace

pytestmark = pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")

# Relative distances from bf16 by norm. A value in e4m3 is off by up to 2^-4, in e5m2 by up to 2^-3: independent errors
# of that size, over the layers of the tiny models, give distances of this order. Blocks are closer than whole tensors.
LOGITS, GRADIENT = 0.12, 0.35
LEAST = 1e-3  # a model that is as close as this was not computed in FP8


@pytest.fixture(params=["tensorwise", "delayed", "blockwise", "mxfp8"])
def recipe(request: pytest.FixtureRequest) -> str:
    found = gpu()
    assert found is not None
    try:
        check_gpu(Fp8Config(recipe=request.param), found)
    except ConfigError as error:
        pytest.skip(str(error))
    return request.param


def computed(model: GlmvModel, passes: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits, and gradients of the loss by canonical name; of the last of some passes."""
    batch = pack([sample(model, name) for name in PACK], seq_length=256)
    for _ in range(passes):  # the scales of delayed need one
        model.zero_grad()
        losses = model.train()(**forward_inputs(batch), labels=batch.labels)
        ((losses.cpu() * batch.loss_mask).sum() / batch.loss_mask.sum()).backward()
    with torch.no_grad():
        logits = model.eval()(**forward_inputs(batch)).float().cpu()
    gradients = {
        canonical_name(model, n): p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None
    }
    return logits, gradients


def joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("vision", [False, True], ids=["decoder", "vision"])
def test_logits_and_gradients_are_close_to_bf16(
    build: Callable[..., GlmvModel], reference: nn.Module, recipe: str, vision: bool
) -> None:
    fp8 = Fp8Config(recipe=recipe, vision=vision)
    expected, expected_gradients = computed(build(dtype=torch.bfloat16, backend=select_backend("transformer_engine")))
    model = build(dtype=torch.bfloat16, backend=select_backend("transformer_engine"), fp8=fp8)
    found, gradients = computed(model, passes=3)
    assert LEAST < distance(found, expected) < LOGITS
    assert gradients.keys() == expected_gradients.keys()
    assert LEAST < distance(joined(gradients), joined(expected_gradients)) < GRADIENT
    layers = model.glmv_config.decoder.num_hidden_layers
    for name in gradients:
        if is_quantised(name, fp8, layers) and expected_gradients[name].any():
            assert distance(gradients[name], expected_gradients[name]) > LEAST, name


def test_run_follows_bf16_and_resumes(config_file: Path, tmp_path: Path, recipe: str) -> None:
    """Bit for bit, except with delayed, whose scales are not saved."""
    plain = run_here(config_file, tmp_path / "plain", *BF16, "model.backend=transformer_engine")
    options = [*(BF16 if recipe == "delayed" else EXACT), f"fp8.recipe={recipe}", "model.backend=transformer_engine"]
    folder = run_here(config_file, tmp_path / "fp8", *options)
    for line, expected in zip(metrics(folder), metrics(plain), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-2)
    assert trace(folder) != trace(plain)
    whole = trace(folder)
    set_back(folder)
    run_here(config_file, folder, *options)
    if recipe != "delayed":
        assert trace(folder) == whole


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_weights_kept_in_fp8_resume_bit_for_bit_and_load_without_fp8(
    config_file: Path, tmp_path: Path, recipe: str, overlap: str
) -> None:
    if recipe not in ("tensorwise", "blockwise"):
        pytest.skip("weights are not kept in FP8 with this recipe")
    common = ["model.backend=transformer_engine", f"optimizer.overlap_param_gather={overlap}"]
    options = [*EXACT, *common, f"fp8.recipe={recipe}", "fp8.param_gather=true"]
    folder = run_here(config_file, tmp_path / "gathered", *options)
    cached = run_here(config_file, tmp_path / "cached", *EXACT, *common, f"fp8.recipe={recipe}")
    for line, expected in zip(metrics(folder), metrics(cached), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=2e-2)
    whole = trace(folder)
    set_back(folder)
    run_here(config_file, folder, *options)
    assert trace(folder) == whole
    set_back(folder)
    run_here(config_file, folder, *BF16, "model.backend=torch")
    assert len(metrics(folder)) == 6


def test_parameters_are_in_fp8_only_where_asked(build: Callable[..., GlmvModel], recipe: str) -> None:
    if recipe not in ("tensorwise", "blockwise"):
        pytest.skip("weights are not kept in FP8 with this recipe")
    backend = select_backend("transformer_engine")
    fp8 = Fp8Config(recipe=recipe, param_gather=True)
    model = build(dtype=torch.bfloat16, backend=backend, fp8=fp8)
    layers = model.glmv_config.decoder.num_hidden_layers
    for name, parameter in model.named_parameters():
        assert is_float8tensor(parameter) == is_quantised(canonical_name(model, name), fp8, layers), name
