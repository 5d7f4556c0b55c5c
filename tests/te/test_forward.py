"""The Transformer Engine backend, with definitions in place of its kernels, computes the same as the torch backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

import model.transformer_engine as backend_module
from model.attention import packed_segments
from model.backend import Backend, TorchSpecProvider
from model.canonical_names import canonical_name
from model.config import GlmvConfig
from model.errors import WeightsError
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.transformer_engine import FUSED_KERNELS, TransformerEngineSpecProvider, on_device
from model.weights.load import SafetensorsFolder, load_weights
from tests.process_group import alone
from tests.reference import Element, Image, Text, Video, forward_inputs, make_sample, pack
from tests.te.definitions import kernels_by_definition
from tests.te.fake_ranks import pretended_gpu

TOLERANCE = 1e-5  # of logits at a scale of 1


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with alone():
        yield


class Provider(TransformerEngineSpecProvider):
    """The provider of a GPU, except that torch sorts tokens by expert: that kernel belongs to no module."""

    config_fields = FUSED_KERNELS | {"moe_permute_fusion": False}


def build(folder: Path, backend: Backend) -> GlmvModel:
    with pretended_gpu():
        model = GlmvModel(GlmvConfig.from_hf(folder), ParallelConfig(), backend=backend)
    load_weights([model], SafetensorsFolder(folder))
    return model


def run(model: GlmvModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of a pack's useful tokens, and the gradient of every parameter by its canonical name."""
    samples: list[list[Element]] = [[Text(3), Image(4, 6), Text(11)], [Text(25)], [Text(4), Video(2, 4, 4), Text(9)]]
    made = [make_sample(model.glmv_config, parts, seed=n) for n, parts in enumerate(samples)]
    batch = pack(made, seq_length=128)
    segments = zip(batch.cu_seqlens.tolist(), batch.segment_lengths.tolist(), strict=False)
    useful = [token for begin, length in segments for token in range(begin, begin + length)]
    logits = model(**forward_inputs(batch))[useful]
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * direction).sum().backward()
    gradients = {canonical_name(model, name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


@pytest.fixture(scope="module")
def expected(hf_folder: tuple[Path, nn.Module]) -> tuple[Tensor, dict[str, Tensor]]:
    with kernels_by_definition():  # megatron-core's router uses Transformer Engine wherever it finds it
        return run(build(hf_folder[0], TorchSpecProvider()))


Result = tuple[Tensor, dict[str, Tensor]]


def test_logits_and_gradients_equal_the_torch_backend(hf_folder: tuple[Path, nn.Module], expected: Result) -> None:
    with kernels_by_definition():
        logits, gradients = run(build(hf_folder[0], Provider()))
    assert (logits - expected[0]).abs().max() <= TOLERANCE
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[1][name]).norm() <= 2e-5 * expected[1][name].norm(), name


# --- mistakes that the comparison must notice -------------------------------------------------------------------------


def without_padding(segments: PackedSeqParams, device: torch.device) -> PackedSeqParams:
    """Return boundaries without the padding, for tokens with padding."""
    longest = segments.max_seqlen_q
    return on_device(PackedSeqParams("thd", segments.cu_seqlens_q, max_seqlen_q=longest, max_seqlen_kv=longest), device)


def one_segment(segments: PackedSeqParams, device: torch.device) -> PackedSeqParams:
    """Return the whole pack as one segment."""
    boundaries = on_device(segments, device).cu_seqlens_q[[0, -1]]
    longest = int(boundaries[-1])
    return PackedSeqParams("thd", boundaries, boundaries, max_seqlen_q=longest, max_seqlen_kv=longest)


@pytest.mark.parametrize("wrong", [without_padding, one_segment])
def test_wrong_segments_miss_the_tolerance(
    hf_folder: tuple[Path, nn.Module], expected: Result, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    monkeypatch.setattr(backend_module, "on_device", wrong)
    with kernels_by_definition():
        logits, _ = run(build(hf_folder[0], Provider()))
    assert not (logits - expected[0]).abs().max() <= 100 * TOLERANCE


@pytest.mark.parametrize(("mask", "other"), [("causal", "no_mask"), ("no_mask", "causal")])
def test_wrong_mask_misses_the_tolerance(
    hf_folder: tuple[Path, nn.Module], expected: Result, mask: str, other: str
) -> None:
    model = build(hf_folder[0], Provider())
    for module in model.modules():
        if getattr(module, "attn_mask_type", None) is AttnMaskType[mask]:
            module.attn_mask_type = AttnMaskType[other]
    with kernels_by_definition():
        logits, _ = run(model)
    assert (logits - expected[0]).abs().max() > 100 * TOLERANCE


class NoNorm(Provider):
    """Norms are neither separate modules nor part of a linear layer."""

    def column_parallel_layer_norm_linear(self) -> type:
        return self.column_parallel_linear()


class NormTwice(Provider):
    """Norms are both."""

    def fuse_layernorm_and_linear(self) -> bool:
        return False


@pytest.mark.parametrize(("wrong", "message"), [(NoNorm, "the model lacks"), (NormTwice, "holds .*layernorm.* twice")])
def test_missing_or_double_norm_is_refused(
    hf_folder: tuple[Path, nn.Module], wrong: type[Provider], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        build(hf_folder[0], wrong())


# --- segments ---------------------------------------------------------------------------------------------------------


def test_boundaries_are_copied_to_the_device_once_for_all_layers() -> None:
    """They include padding: 5 of 8, 16 of 16 and 3 of 8 tokens are useful."""
    segments = packed_segments(torch.tensor([0, 8, 24, 32], dtype=torch.int32), torch.tensor([5, 16, 3]))
    device = torch.device("meta")  # a machine without a GPU has no other second device
    first_layer, second_layer = on_device(segments, device), on_device(segments, device)
    assert first_layer is second_layer
    assert first_layer.cu_seqlens_q is first_layer.cu_seqlens_kv
    assert first_layer.cu_seqlens_q.device == device
    assert segments.cu_seqlens_q_padded.device.type == "cpu"  # rotary embedding reads it

    segments = packed_segments(torch.tensor([0, 8, 24, 32], dtype=torch.int32), torch.tensor([5, 16, 3]))
    copied = on_device(segments, torch.device("cpu"))
    assert copied.cu_seqlens_q.tolist() == [0, 8, 24, 32]
    assert (copied.cu_seqlens_q_padded, copied.cu_seqlens_kv_padded, copied.max_seqlen_q) == (None, None, 16)
