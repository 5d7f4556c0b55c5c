"""A streamed checkpoint loads at any layout, and a checkpoint of any layout is exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import streaming.limits
from model.weights.folder import SafetensorsFolder
from tests.hf_folders import VARIANTS, save_weights
from tests.processes import Processes
from tests.streaming import layout_cases
from tools.conversion import ConversionOptions, export_checkpoint, import_folder

ONE = ConversionOptions(processes=1)
LAYOUTS = {
    "glm4v_moe": ("TP2 SP", "EP2", "PP2 VPP2", "TP2 SP vision=tensor"),
    "glm4v": ("TP2", "PP2 VPP2", "TP2 vision=tensor"),
}
CASES = [(variant, layout) for variant, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of both variants, and their checkpoints, in blocks of a few rows."""
    root = tmp_path_factory.mktemp("layouts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.limits, "LARGEST_BLOCK", 40_000)
        for variant in VARIANTS:
            save_weights(variant, root / variant)
            import_folder(root / variant, root / f"{variant}_checkpoint", ONE)
    return root


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_streamed_checkpoint_loads_at_any_layout(variant: str, layout: str, folders: Path, pair: Processes) -> None:
    answers = pair.run(
        layout_cases.difference,
        variant=variant,
        layout=layout,
        folder=str(folders / variant),
        checkpoint=str(folders / f"{variant}_checkpoint"),
    )
    assert answers == [[], []]


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_checkpoint_of_any_layout_is_exported(
    variant: str, layout: str, folders: Path, pair: Processes, tmp_path: Path
) -> None:
    pair.run(
        layout_cases.save,
        variant=variant,
        layout=layout,
        folder=str(folders / variant),
        checkpoint=str(tmp_path / "checkpoint"),
        hf_files=str(folders / variant),
    )
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "exported", options=ONE)
    given, exported = SafetensorsFolder(folders / variant), SafetensorsFolder(tmp_path / "exported")
    assert sorted(given.names()) == sorted(exported.names())
    for name in given.names():
        assert torch.equal(given.tensor(name), exported.tensor(name)), name
