"""One process group of this process alone, and pairs of equal models: ours and transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.glmv import GlmvModel
from model.hf_weights import SafetensorsFolder, load_weights
from model.parallel import ParallelConfig, initialize_model_parallel
from tests.reference import save_transformers_model, small_config

VARIANTS = ("glm4v_moe", "glm4v")


@pytest.fixture(scope="session")
def single_process() -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(ParallelConfig(), seed=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session", params=VARIANTS)
def hf_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A Hugging Face folder written by transformers, and its model."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_transformers_model(small_config(request.param), folder)


@pytest.fixture
def reference(hf_folder: tuple[Path, nn.Module]) -> nn.Module:
    model = hf_folder[1]
    model.zero_grad()
    return model


@pytest.fixture
def build(single_process: None, hf_folder: tuple[Path, nn.Module]) -> Callable[..., GlmvModel]:
    """Makes our model with the reference's weights."""
    folder, reference = hf_folder

    def make(**options: object) -> GlmvModel:
        model = GlmvModel(small_config(reference.config.model_type), ParallelConfig(), **options)  # type: ignore[arg-type]
        load_weights(model, SafetensorsFolder(folder))
        return model

    return make


@pytest.fixture
def model(build: Callable[..., GlmvModel]) -> GlmvModel:
    return build().eval()
