"""The page of tools.view, on real shards, read back by an HTML parser."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup, Tag
from typer.testing import CliRunner

from data_pipeline.encoding.batch import collate
from data_pipeline.encoding.encode import encode_record
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.image_files import decode_image
from data_pipeline.media.images import patchify, unpatchify
from data_pipeline.media.pixel_budget import PixelBudget
from tests.data_pipeline.media_files import encoded, encoded_video, pattern
from tools.shard import app as shard_app
from tools.view import app
from tools.view_content import MAX_BOXES, unpack, view_of_sample

pytestmark = pytest.mark.fast

HOSTILE = '</div><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7*7 }}'
IMAGE = encoded(pattern(84, 112), "PNG")
RECORDS: list[dict[str, Any]] = [
    {
        "domain": "grounding",
        "text": "<image>A cat: [[102,80,540,910]] and dogs [[1,2,3,4],[5,6,999,7]].",
        "images": ["a.png"],
    },
    {"domain": "video", "text": "It moves.", "videos": ["c.mp4"]},
    {"domain": "text", "text": HOSTILE},
    {
        "domain": "chat",
        "messages": [{"role": "user", "content": "<image>猫吗?"}, {"role": "assistant", "content": "是的 🐈, yes."}],
        "images": ["a.png"],
    },
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("viewed")
    (folder / "a.png").write_bytes(IMAGE)
    (folder / "c.mp4").write_bytes(encoded_video(24))
    (folder / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    run(shard_app, "build", "--input", folder / "r.jsonl", "--out", folder / "out", "--tokenizer", tokenizer_folder)
    return folder / "out"


def run(app, *arguments: object, expect: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == expect, result.output
    return result.output


def one(page: Tag, selector: str) -> Tag:
    found = page.select_one(selector)
    assert found is not None, selector
    return found


def is_a(span: Tag, kind: str) -> bool:
    return kind in (span.get("class") or ())


def page_of(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "lxml")


@pytest.fixture(scope="module")
def page(shards: Path, tokenizer_folder: Path) -> BeautifulSoup:
    empty = shards.with_name("empty")
    empty.mkdir()
    shown = run(app, "shards", empty, shards, "--tokenizer", tokenizer_folder, "--out", shards / "page.html")
    assert shown.startswith(f"{empty} holds no shards")
    return page_of(shards / "page.html")


def test_page_shows_images_boxes_and_frames(page: BeautifulSoup):
    grounding, video, _, _ = page.select(".sample")
    overlays = [[float(str(box[side])) for side in ("x", "y", "width", "height")] for box in grounding.select("rect")]
    assert overlays == [[102, 80, 438, 830], [1, 2, 2, 2], [5, 6, 994, 1]]
    assert [label.text for label in grounding.select(".label")] == ["A cat", "and dogs", ""]

    shown = base64.b64decode(str(one(grounding, "img")["src"]).split(",")[1])
    assert shown == encoded(pattern(84, 112), "JPEG", quality=85)  # this size needs no resizing

    captions = [caption.text for caption in video.select("figcaption")]
    assert [caption.split(" s,")[0] for caption in captions] == ["0", "1", "2"]  # three seconds at 8 frames per second
    assert [len(figure.select("img")) for figure in video.select("figure")] == [2, 2, 2]


def test_tokens_show_which_carry_loss(page: BeautifulSoup):
    tokens = page.select(".sample")[3].select(".tokens > span")
    assert "".join(span.text for span in tokens if is_a(span, "learned")) == "是的 🐈, yes.<|user|>"
    assert "猫吗?" in "".join(span.text for span in tokens)
    image = next(span for span in tokens if is_a(span, "image"))
    assert image.text == "<|image|> x 12"
    assert str(image["title"]).endswith("position 5 5 5")  # [gMASK] <sop> <|user|> \n <|begin_of_image|> come before


def test_text_of_a_sample_is_escaped(page: BeautifulSoup, shards: Path):
    assert not page.select("script, link, iframe, object, [onerror], a")
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in page.select("img"))
    assert "".join(span.text for span in page.select(".sample")[2].select(".tokens > span")).count(HOSTILE) == 1
    assert "default-src 'none'" in one(page, "meta[http-equiv]")["content"]


def test_invisible_characters_are_shown_as_escapes(tmp_path: Path, tokenizer_folder: Path):
    """A foreign tar: halves of surrogate pairs, right-to-left overrides, a long record with many boxes."""
    records = {
        "1": b'{"domain": "text", "text": "a\\u202eb\\u0000", "source": "\\ud83d", "about": "\\u2066"}',
        "2": b'{"domain": "text", "text": "\\ud83d"}',
        "3": json.dumps({"domain": "image_text", "text": "[[1,2,300,400]]," * 2000}).encode(),
    }
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, data in [*((f"{key}.json", data) for key, data in records.items()), ("3.png", IMAGE)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    run(shard_app, "index", tmp_path / "odd.tar", "--executor", "here")
    run(app, "shards", tmp_path, "--tokenizer", tokenizer_folder, "--out", tmp_path / "page.html")
    first, second, third = page_of(tmp_path / "page.html").select(".sample")
    assert "".join(span.text for span in first.select(".tokens > span")) == r"[gMASK]<sop>a\u202eb\u0000<|endoftext|>"
    assert r"from \ud83d" in first.text
    assert r'"about": "\u2066"' in one(first, "pre").text
    assert "bad_record: the text is not Unicode" in one(second, ".failure").text
    assert len(third.select("rect")) == MAX_BOXES
    assert f"{MAX_BOXES} of 2,000 boxes" in one(third, "figcaption").text
    assert one(third, "pre").text.endswith("more characters")


def test_key_selects_a_sample(shards: Path, tokenizer_folder: Path, tmp_path: Path, page: BeautifulSoup):
    name = one(page, ".sample:nth-of-type(2) h3").text.split()[-1]
    for key in (name, Path(name).name):
        run(app, "shards", shards, "--tokenizer", tokenizer_folder, "--key", key, "--out", tmp_path / "page.html")
        assert one(page_of(tmp_path / "page.html"), ".sample h3").text.split()[-1] == name
    error = run(app, "shards", shards, "--tokenizer", tokenizer_folder, "--key", "nobody", expect=2)
    assert "no sample is called nobody" in error
    both = run(app, "shards", shards, "--tokenizer", tokenizer_folder, "--key", name, "--key", "nobody", expect=2)
    assert "no sample is called nobody" in both
    assert name not in both


def test_pixel_budget_below_the_smallest_image_is_refused(shards: Path, tokenizer_folder: Path, tmp_path: Path):
    error = run(
        app,
        "shards",
        shards,
        "--tokenizer",
        tokenizer_folder,
        "--image-max-tokens",
        0,
        "--out",
        tmp_path / "x",
        expect=2,
    )
    assert "--image-max-tokens" in error


def test_damaged_sample_shows_its_reason(tokenizer_folder: Path, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encoded(noise, "PNG"))
    (tmp_path / "r.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    run(shard_app, "build", "--input", tmp_path / "r.jsonl", "--out", tmp_path, "--tokenizer", tokenizer_folder)
    (shard,) = tmp_path.glob("*.tar")
    with open(shard, "r+b") as file:
        file.seek(150_000)
        file.write(b"damage")
    run(app, "shards", shard, "--tokenizer", tokenizer_folder, "--out", tmp_path / "page.html")
    assert one(page_of(tmp_path / "page.html"), ".sample .failure").text.startswith("checksum:")


def test_page_shows_the_packs_of_a_run(shards: Path, tokenizer_folder: Path, tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"preset": "tiny_moe"},
                "data": {"tokenizer": str(tokenizer_folder), "sources": [{"path": str(shards)}]},
                "train": {"steps": 9, "global_batch_size": 2, "seq_length": 256, "output_dir": str(tmp_path / "run")},
                "optimizer": {"warmup_steps": 1},
            }
        )
    )
    out = tmp_path / "page.html"
    run(app, "batch", "--config", config, "--step", "2", "--out", out)
    page = page_of(out)
    assert [title.text for title in page.select("h2")] == ["step 2, pack 0", "step 2, pack 1"]
    bars = [len(bar.select("span")) for bar in page.select(".bar")]
    assert sum(bars) == len(page.select(".sample")) > 2
    assert len(page.select("polyline")) == 6
    once = f"data.sources=[{{path: {shards}, epochs: 1}}]"
    shown = run(app, "batch", "--config", config, "--steps", 1000, "--out", out, once)
    last = re.findall(r"step (\d+), pack", page_of(out).text)[-1]
    assert f"steps 1 to {last} of" in shown
    assert "the data ends before step 1000000" in run(
        app, "batch", "--config", config, "--step", 1000000, "--out", out, once, expect=2
    )
    assert "data.sorces" in run(app, "batch", "--config", config, "data.sorces=[]", expect=2)


def test_unpack_is_the_inverse_of_collate(tokenizer_folder: Path):
    tokenizer = GlmTokenizer(tokenizer_folder)
    samples = [
        encode_record(
            {key: value for key, value in record.items() if key not in ("images", "videos")},
            [IMAGE] * ("images" in record),
            [encoded_video(24)] * ("videos" in record),
            tokenizer=tokenizer,
            budget=PixelBudget(),
            sample_id=str(number),
        )
        for number, record in enumerate(RECORDS)
    ]
    batch = collate(samples, seq_length=1024, segment_multiple=8, pad_id=tokenizer.pad_id)
    for sample, back in zip(samples, unpack(batch, tokenizer.image_id), strict=True):
        assert (sample.sample_id, sample.grids, sample.frames_per_image) == (
            back.sample_id,
            back.grids,
            back.frames_per_image,
        )
        for name in ("input_ids", "loss", "position_ids"):
            assert np.array_equal(getattr(sample, name), getattr(back, name))
        assert torch.equal(sample.patches, back.patches)
        assert view_of_sample(sample, tokenizer) == view_of_sample(back, tokenizer)


def test_replacement_characters_of_the_text_do_not_join_tokens(tokenizer_folder: Path):
    """The tokens after such a character are still shown one by one."""
    tokenizer = GlmTokenizer(tokenizer_folder)
    text = "\ufffd then " + "more words and \N{SLIGHTLY SMILING FACE} " * 20
    sample = encode_record({"domain": "text", "text": text}, [], [], tokenizer=tokenizer, budget=PixelBudget())
    shown = [span.text for span in view_of_sample(sample, tokenizer).spans if span.kind == "text"]
    assert len(shown) > 60
    assert sum(span.count("\N{SLIGHTLY SMILING FACE}") for span in shown) == 20


def test_large_image_hides_no_text(tokenizer_folder: Path):
    """The caption of a long video comes after all of its image tokens."""
    tokenizer = GlmTokenizer(tokenizer_folder)
    large = encoded(pattern(1960, 1960), "JPEG")
    encode = partial(encode_record, tokenizer=tokenizer, budget=PixelBudget(), sample_id="a")
    view = view_of_sample(encode({"domain": "image_text", "text": "The end."}, [large], []), tokenizer)
    assert "<|image|> x 4900" in [span.text for span in view.spans]
    assert "".join(span.text for span in view.spans).endswith("The end.<|endoftext|>")
    assert view.more_tokens == 0
    text = view_of_sample(encode({"domain": "text", "text": "x\n" * 9000}, [], []), tokenizer)
    assert text.more_tokens > 0


def test_small_shards_are_shown_beside_large_ones(tokenizer_folder: Path, tmp_path: Path):
    for name, count in (("few", 2), ("many", 40), ("one", 1)):
        lines = [json.dumps({"domain": "text", "text": f"{name} {number}"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        run(shard_app, "build", tmp_path / f"{name}.jsonl", "--out", tmp_path / name, "--tokenizer", tokenizer_folder)
    folders = [tmp_path / name for name in ("few", "many", "one")]
    for samples, expected in ((7, {"few": 2, "many": 4, "one": 1}), (2, {"few": 1, "many": 1}), (99, None)):
        out = tmp_path / "pages" / "page.html"
        run(app, "shards", *folders, "--tokenizer", tokenizer_folder, "--samples", samples, "--out", out)
        shown = Counter(title.text.split()[-1].split("-")[0] for title in page_of(out).select("h3"))
        assert shown == (expected or {"few": 2, "many": 40, "one": 1})


def test_unpatchify_is_the_inverse_of_patchify():
    frames = torch.from_numpy(np.stack([pattern(84, 112), pattern(84, 112, 3)])).permute(0, 3, 1, 2)
    assert np.array_equal(unpatchify(patchify(frames), (6, 8), 2), frames.permute(0, 2, 3, 1).numpy())
    image = torch.from_numpy(decode_image(IMAGE).copy()).permute(2, 0, 1)[None]
    assert np.array_equal(unpatchify(patchify(image), (6, 8), 1)[0], decode_image(IMAGE))
