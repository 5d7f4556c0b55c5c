"""Rolling out on several processes: the same prompts for all, waiting for each other, and which files are kept."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.media.image_files import decode_image
from data_pipeline.sharding.build import build_shards
from model.glmv import GlmvModel
from rl.rolls import remove_before, thumbnail
from tests.data_pipeline.media_files import encoded, pattern
from tests.processes import Processes
from tests.rl.rolls_cases import read, wait_for_the_last
from training.determinism import weights_checksum

IMAGE = encoded(pattern(84, 112), "JPEG")
OTHER_IMAGE = encoded(pattern(90, 60, 1), "PNG")


@pytest.fixture
def folders(tmp_path: Path, tokenizer_folder: Path) -> list[str]:
    """The same shard of three prompts in two folders."""
    (tmp_path / "a.jpg").write_bytes(IMAGE)
    (tmp_path / "b.png").write_bytes(OTHER_IMAGE)
    records = [
        {"question": "<image>How many dots?", "answer": "7", "image": "a.jpg"},
        {"question": "<image>Which digit?", "answer": "3", "image": "b.png"},
        {"question": "1 + 1?", "answer": "2"},
    ]
    (tmp_path / "dots.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    one = tmp_path / "one"
    build_shards([tmp_path / "dots.jsonl"], one, tokenizer=tokenizer_folder, settings=("verifier=exact",), name="dots")
    return [str(one), str(shutil.copytree(one, tmp_path / "other"))]


def damage(folder: str) -> None:
    """Change a byte of the second prompt's image."""
    [tar] = Path(folder).glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[data.index(OTHER_IMAGE) + 100] ^= 1
    tar.write_bytes(data)


@pytest.mark.parametrize("damaged", [0, 1])
def test_prompt_that_one_process_cannot_read_is_used_by_none(
    two_processes: Processes, folders: list[str], tokenizer_folder: Path, damaged: int
) -> None:
    """Otherwise the processes would answer other prompts than they train on, or wait for each other."""
    damage(folders[damaged])
    both = two_processes.run(read, folders=folders, tokenizer=str(tokenizer_folder), layout="DP2")
    assert both[0] == both[1]
    prompts, unused = both[0]
    assert [row for row, *_ in prompts] == [2, 0, 0]
    assert [line["shard"] for line in unused] == ["dots-00000-00000.tar"]


def test_ranks_that_share_packs_get_prompts_without_patches(
    two_processes: Processes, folders: list[str], tokenizer_folder: Path
) -> None:
    lead, other = two_processes.run(read, folders=folders, tokenizer=str(tokenizer_folder), layout="TP2")
    assert [(row, id) for row, id, *_ in lead[0]] == [(row, id) for row, id, *_ in other[0]]
    assert [patches > 0 for _, _, patches, _ in lead[0]] == [False, True, True, True]
    assert [images for *_, images in lead[0]] == [0, 1, 1, 1]
    assert {(patches, images) for *_, patches, images in other[0]} == {(0, 0)}


def test_request_to_stop_that_one_process_sees_ends_the_reading_of_all(
    two_processes: Processes, folders: list[str], tokenizer_folder: Path
) -> None:
    found = two_processes.run(read, folders=folders, tokenizer=str(tokenizer_folder), layout="DP2", lost=True)
    assert found == ["interrupted", "interrupted"]


def test_process_that_waits_for_another_notes_it(two_processes: Processes) -> None:
    waited, _ = two_processes.run(wait_for_the_last, seconds=1.0)
    assert waited >= 3


@pytest.mark.fast
def test_files_of_earlier_iterations_are_removed_and_of_later_ones_not(tmp_path: Path) -> None:
    """A run that has fallen back comes to iteration 3 while the files of 4 and 5 are there."""
    for step in range(1, 6):
        for suffix in (".npz", ".jsonl"):
            (tmp_path / f"step_{step:07d}{suffix}").touch()
    remove_before(tmp_path, 3)
    assert sorted({file.stem for file in tmp_path.iterdir()}) == [f"step_{step:07d}" for step in (3, 4, 5)]
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.fast
def test_thumbnail_shows_what_training_sees() -> None:
    """Pillow's own conversion of 16 bits of grey to RGB is white above 255."""
    grey = np.full((64, 64), 0x4000, np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(thumbnail(buffer.getvalue())))))
    assert np.abs(shown.astype(int) - decode_image(buffer.getvalue())[0, 0, 0]).max() <= 2
    assert shown.max() < 100


def test_checksum_covers_frozen_weights(build: Callable[..., GlmvModel]) -> None:
    model = build()
    model.requires_grad_(False)
    before = weights_checksum([model])
    assert weights_checksum([model]) == before
    weight = next(iter(model.parameters())).data
    weight.view(-1)[0] += 1
    assert weights_checksum([model]) != before
