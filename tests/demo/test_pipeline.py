"""The demo runs the production path: megatron-core does the work, and every part of the model is trained."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest
import torch

from model.config import GlmvConfig
from model.weights.folder import SafetensorsFolder
from model.weights.random_weights import RandomWeights
from model.weights.source import whole

ROOT = Path(__file__).parent.parent.parent
SEED = 1234

PRODUCTION_PATH = {  # file of megatron-core: functions that a training step goes through
    "pipeline_parallel/schedules.py": ("forward_backward_no_pipelining", "backward_step"),
    "distributed/distributed_data_parallel.py": ("finish_grad_sync", "zero_grad_buffer"),
    "distributed/param_and_grad_buffer.py": ("start_grad_sync",),
    "optimizer/distrib_optimizer.py": ("step_with_ready_grads", "_copy_model_grads_to_main_grads"),
    "transformer/transformer_block.py": ("forward",),
    "transformer/moe/moe_layer.py": ("routed_experts_compute",),
    "dist_checkpointing/strategies/state_dict_saver.py": ("save_state_dict_async_plan",),
}


@pytest.fixture(scope="module")
def folder(small_shards: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps as the demo does, under coverage: run/ and .coverage."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "coveragerc").write_text("[run]\ninclude = */megatron/core/*\n")
    sources = ", ".join(f"{{path: {small_shards / name}}}" for name in ("captions", "interleaved", "text"))
    keys = {
        "data.sources": f"[{sources}]",
        "data.tokenizer": tokenizer_folder,
        "data.num_workers": 0,
        "optimizer.warmup_steps": 1,
        "train.steps": 2,
        "train.seed": SEED,
        "train.output_dir": folder / "run",
    }
    run(
        *("coverage", "run", f"--rcfile={folder / 'coveragerc'}", f"--data-file={folder / '.coverage'}"),
        *("-m", "pretrain.train", "--config", "configs/tiny/pretrain.yaml"),
        *(f"{key}={value}" for key, value in keys.items()),
    )
    return folder


def run(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_megatron_core_does_the_work(folder: Path) -> None:
    measured = coverage.CoverageData(str(folder / ".coverage"))
    measured.read()
    for file, functions in PRODUCTION_PATH.items():
        path = next(name for name in measured.measured_files() if name.endswith(f"megatron/core/{file}"))
        executed = set(measured.lines(path) or ())
        for function in functions:
            bodies = function_bodies(Path(path), function)
            assert any(body & executed for body in bodies), f"{function} of {file} did not run"


def function_bodies(path: Path, name: str) -> Iterator[set[int]]:
    """Yield the lines of every function called `name`, without its head, which runs on import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            yield set(range(node.body[0].lineno + 1, (node.end_lineno or 0) + 1))


def test_gradients_reach_every_weight(folder: Path) -> None:
    """Also in the attention of every layer of the vision tower. Weight decay alone scales a tensor as a whole."""
    run("tools.convert", "export", "--checkpoint", folder / "run", "--out", folder / "hf")
    config = GlmvConfig.from_preset("tiny_moe")
    trained, initial = SafetensorsFolder(folder / "hf"), RandomWeights(config, SEED)
    names = initial.names()
    assert sum(".visual.blocks." in name and ".attn.qkv." in name for name in names) == config.vision.depth
    assert [name for name in names if is_multiple(trained.tensor(name).double(), whole(initial, name).double())] == []


def is_multiple(tensor: torch.Tensor, of: torch.Tensor) -> bool:
    """Whether a tensor is another one times a number."""
    factor = (tensor * of).sum() / (of * of).sum().clamp(min=1e-12)
    return bool((tensor - factor * of).norm() <= 1e-5 * tensor.norm())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", ["moe", "dense"])
def test_whole_demo(variant: str) -> None:
    run("demo", "--variant", variant)


@pytest.mark.fast
def test_unknown_variant_is_refused() -> None:
    done = subprocess.run([sys.executable, "-m", "demo", "--variant", "huge"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --variant huge: choose one of moe, dense"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo.evaluate", "production", "/nowhere", "/nowhere"], "error: /nowhere is no checkpoint"),
        (["demo.readme_image", "--variant", "huge"], "error: --variant huge: choose one of moe, dense"),
    ],
)
def test_mistake_in_the_call_is_one_line(arguments: list[str], says: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(says)
