"""The Transformer Engine backend loads and saves Hugging Face folders, and checkpoints of the torch backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.backend import Backend, TorchSpecProvider
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import GlmvConfig
from model.errors import CheckpointError
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from model.transformer_engine import TransformerEngineSpecProvider
from model.weights.load import SafetensorsFolder, load_weights
from tests.model_tensors import hf_tensors
from tests.te.fake_ranks import pretended_gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(ParallelConfig(), seed=1)
    yield
    dist.destroy_process_group()


def build(folder: Path, backend: Backend) -> GlmvModel:
    """Build a model with NaN in all parameters."""
    with pretended_gpu():
        model = GlmvModel(GlmvConfig.from_hf(folder), ParallelConfig(), backend=backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


def assert_holds(model: GlmvModel, folder: Path) -> None:
    """Check that the model equals what transformers wrote, bit for bit."""
    source = SafetensorsFolder(folder)
    exported = dict(hf_tensors(model))
    assert set(exported) == set(source.names())
    for name, tensor in exported.items():
        assert torch.equal(tensor, source.tensor(name)), name


def test_hugging_face_folder_is_loaded_and_exported(hf_folder: tuple[Path, nn.Module]) -> None:
    folder, _ = hf_folder
    model = build(folder, TransformerEngineSpecProvider())
    load_weights([model], SafetensorsFolder(folder))
    assert_holds(model, folder)


def test_checkpoint_of_the_torch_backend_loads(hf_folder: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """A process without Transformer Engine writes it."""
    folder, _ = hf_folder
    without_te = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "tests.te.torch_checkpoint", str(folder), str(tmp_path / "step_0000001")]
    subprocess.run(command, cwd=ROOT, env=without_te, check=True)
    model = build(folder, TransformerEngineSpecProvider())
    load_checkpoint(tmp_path / "step_0000001", [model])
    assert_holds(model, folder)


def test_checkpoint_of_this_backend_loads_into_the_torch_backend(
    hf_folder: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    folder, _ = hf_folder
    fused = build(folder, TransformerEngineSpecProvider())
    load_weights([fused], SafetensorsFolder(folder))
    save_checkpoint(tmp_path / "step_0000001", [fused], hf_files=lambda folder: None)
    model = build(folder, TorchSpecProvider())
    load_checkpoint(tmp_path / "step_0000001", [model])
    assert_holds(model, folder)


def test_without_the_map_of_keys_it_would_not_load(
    hf_folder: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = hf_folder
    plain = build(folder, TorchSpecProvider())
    save_checkpoint(tmp_path / "step_0000001", [plain], hf_files=lambda folder: None)
    monkeypatch.setattr("model.decoder.FUSED_NORMS", {})
    model = build(folder, TransformerEngineSpecProvider())
    with pytest.raises(CheckpointError, match="layer_norm_weight"):
        load_checkpoint(tmp_path / "step_0000001", [model])
