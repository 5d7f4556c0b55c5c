"""Rolling out on several processes: the same prompts for all, waiting for each other, and which files are kept."""

from __future__ import annotations

import base64
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.encoding.encode import encode_record
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample
from data_pipeline.media.image_files import decode_image
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.sharding.build import build_shards
from data_pipeline.sharding.foreign import index_shards
from model.glmv import GlmvModel
from rl.rollout_folder import first_kept, remove_before, thumbnail
from tests.data_pipeline.media_files import encoded, pattern
from tests.processes import Processes
from tests.rl.rollout_manager_cases import give_up, read, read_and_decode, wait_for_the_last
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


@pytest.fixture
def many(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A shard of six prompts. The image of the fourth one is damaged after its header, and was indexed as it is."""
    records, images = [], [encoded(pattern(84 + 14 * number, 300, number), "PNG") for number in range(6)]
    for number, data in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(data)
        records.append({"question": f"<image>How many dots? {number}", "answer": "7", "image": f"{number}.png"})
    (tmp_path / "dots.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "many"
    build_shards([tmp_path / "dots.jsonl"], out, tokenizer=tokenizer_folder, settings=("verifier=exact",), name="dots")
    damage(str(out), images[3])
    index_shards(sorted(out.glob("*.tar")), tokenizer=tokenizer_folder, chat_form="glm45v")
    return out


def members(folder: Path) -> Iterator[tuple[str, Any, bytes]]:
    """Yield key, record and image of each sample, as Python's own tarfile reads them."""
    [file] = folder.glob("*.tar")
    with tarfile.open(file) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    for name, data in contents.items():
        if name.endswith(".json"):
            key = name.removesuffix(".json")
            yield key, json.loads(data), contents[f"{key}.0.png"]


def damage(folder: str, image: bytes = OTHER_IMAGE) -> None:
    """Change a byte of an image."""
    [tar] = Path(folder).glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[data.index(image) + 100] ^= 1
    tar.write_bytes(data)


@pytest.mark.parametrize("damaged", [0, 1])
def test_prompt_that_one_process_cannot_read_is_used_by_none(
    two_processes: Processes, folders: list[str], tokenizer_folder: Path, damaged: int
) -> None:
    """Otherwise the processes would answer other prompts than they train on, or wait for each other."""
    damage(folders[damaged])
    both = two_processes.run(read, folders=folders, tokenizer=str(tokenizer_folder), layout="DP2")
    for prompts, unused in both:
        assert [row for row, *_ in prompts] == [2, 0, 0]
        assert [(line["shard"], line["reason"]) for line in unused] == [("dots-00000-00000.tar", "checksum")]


def test_ranks_that_share_packs_get_prompts_without_patches(
    two_processes: Processes, folders: list[str], tokenizer_folder: Path
) -> None:
    lead, other = two_processes.run(read, folders=folders, tokenizer=str(tokenizer_folder), layout="TP2")
    assert [(row, id) for row, id, *_ in lead[0]] == [(row, id) for row, id, *_ in other[0]]
    assert [patches > 0 for _, _, patches, _ in lead[0]] == [False, True, True, True]
    assert [images for *_, images in lead[0]] == [0, 1, 1, 1]
    assert {(patches, images) for *_, patches, images in other[0]} == {(0, 0)}


def test_leads_share_the_decoding_and_get_every_bit(
    one_process: Processes, two_processes: Processes, many: Path, tokenizer_folder: Path
) -> None:
    """One cannot be decoded: its bytes are those of the index, and its header is whole."""
    tokenizer, expected = GlmTokenizer(tokenizer_folder), {}
    for key, record, image in members(many):
        with suppress(BadSample):
            sample = encode_record(
                record,
                [image],
                [],
                tokenizer=tokenizer,
                budget=PixelBudget(6144, 6144),
                sample_id=f"dots-00000-00000.tar/{key}",
                chat_form="glm45v",
            )
            expected[sample.sample_id] = vars(sample)
    assert len(expected) == 5
    asked: dict[str, Any] = {"folder": str(many), "tokenizer": str(tokenizer_folder)}
    runs = {
        "one": one_process.run(read_and_decode, **asked, layout="", threads=0),
        "threads": one_process.run(read_and_decode, **asked, layout="", threads=2),
        "two": two_processes.run(read_and_decode, **asked, layout="DP2", threads=2),
    }
    for _, samples, unused in [answer for answers in runs.values() for answer in answers]:
        assert [line["key"] for line in unused] == ["00000-000003"]
        assert [sample["sample_id"] for sample in samples] == list(expected)
        for sample in samples:
            for name, value in expected[sample["sample_id"]].items():
                np.testing.assert_array_equal(sample[name], value, err_msg=name)
    assert all(runs["one"][0][0])
    first, second = (np.array(at_once) for at_once, *_ in runs["two"])
    assert first.sum() < len(expected)
    assert (first | second).sum() >= len(expected) - 1


def test_request_to_stop_that_one_process_sees_ends_the_reading_of_all(
    two_processes: Processes, folders: list[str], tokenizer_folder: Path
) -> None:
    found = two_processes.run(read, folders=folders, tokenizer=str(tokenizer_folder), layout="DP2", lost=True)
    assert found == ["interrupted", "interrupted"]


@pytest.mark.parametrize("rank", [0, 1])
def test_work_that_one_process_gives_up_is_given_up_by_all(two_processes: Processes, rank: int) -> None:
    early = two_processes.run(give_up, rank=rank, after=4)
    assert [outcome for outcome, _ in early] == ["interrupted"] * 2
    assert early[rank][1] == 4
    late = two_processes.run(give_up, rank=rank, after=11)
    assert late == [("done", 10)] * 2


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
@pytest.mark.parametrize(
    ("checkpoint", "keep_last", "first"), [(20, 2, 21), (20, 16, 15), (29, 2, 29), (30, 2, 29), (None, 2, 1)]
)
def test_rollouts_since_the_newest_checkpoint_stay(
    tmp_path: Path, checkpoint: int | None, keep_last: int, first: int
) -> None:
    """After iteration 30. A run that resumes begins with the iteration after its newest checkpoint."""
    if checkpoint is not None:
        folder = tmp_path / "checkpoints" / f"step_{checkpoint:07d}"
        folder.mkdir(parents=True)
        (folder.parent / "latest").write_text(f"{folder.name}\n")
    assert first_kept(tmp_path, 30, keep_last, is_saved=True) == first
    assert first_kept(tmp_path, 30, keep_last, is_saved=False) == 30 - keep_last + 1


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
