"""Cases of tests/streaming/test_layouts.py that run in processes of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from model.checkpoint import load_checkpoint, save_checkpoint
from model.glmv import build_model_chunks
from model.process_groups import initialize_model_parallel
from model.weights.load import SafetensorsFolder, load_weights, local_tensors
from tests.model.layout_cases import layout_of
from tests.reference import small_config


def difference(variant: str, layout: str, folder: str, checkpoint: str) -> list[str]:
    """Return the tensors of this rank that a checkpoint fills with other values than the folder does."""
    parallel, stages = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    chunks = build_model_chunks(small_config(variant), parallel, pipeline_layout=stages)
    load_weights(chunks, SafetensorsFolder(folder))
    expected = [(name, tensor.clone()) for chunk in chunks for name, tensor in local_tensors(chunk)]
    with torch.no_grad():
        for chunk in chunks:
            for _, tensor in local_tensors(chunk):
                tensor.fill_(7.0)
    load_checkpoint(Path(checkpoint), chunks)
    found = [named for chunk in chunks for named in local_tensors(chunk)]
    return [name for (name, a), (_, b) in zip(expected, found, strict=True) if not torch.equal(a, b)]


def save(variant: str, layout: str, folder: str, checkpoint: str, hf_files: str) -> None:
    """Save the weights of a folder."""
    parallel, stages = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    chunks = build_model_chunks(small_config(variant), parallel, pipeline_layout=stages)
    load_weights(chunks, SafetensorsFolder(folder))

    def copy_config(inside: Path) -> None:
        shutil.copy(Path(hf_files) / "config.json", inside)

    save_checkpoint(Path(checkpoint), chunks, hf_files=copy_config)
