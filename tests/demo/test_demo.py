"""The demo: true and repeatable data, honest figures, and the production path underneath."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import coverage
import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.domains import build_sample
from data_pipeline.sharding.build import build_shards
from data_pipeline.tokens import GlmTokenizer
from demo.data import Library, captions, describing_chat, interleaved, sources, text
from demo.evaluate import read_samples, with_other_pictures
from demo.media import DemoError, clips, collage, cut, locate, pictures, view
from demo.report import stage_figures

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.fast
def test_pictures_are_distinct_and_have_one_caption_each() -> None:
    assert len({picture.file + str(picture.frame) for picture in pictures()}) == len(pictures()) >= 40
    assert len({picture.caption for picture in pictures()}) == len(pictures())


@pytest.mark.fast
def test_a_view_is_repeatable_and_no_other_view() -> None:
    cat = next(picture for picture in pictures() if picture.name == "tabby_cat")
    first, again, other = (np.asarray(view(cat, Random(seed))) for seed in ("a", "a", "b"))
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_a_cut_is_the_same_file_every_time(tmp_path: Path) -> None:
    clip = next(clip for clip in clips() if clip.name == "taxi")
    for name in ("one.mp4", "two.mp4"):
        cut(clip, tmp_path / name, Random("cut"))
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


@pytest.mark.fast
def test_boxes_lie_where_the_pictures_are() -> None:
    black, white = Image.new("RGB", (60, 40), "black"), Image.new("RGB", (40, 60), "black")
    canvas, boxes = collage([black, white], Random(3))
    dark = np.asarray(canvas.convert("L")) < 128
    inside = np.zeros_like(dark)
    for x1, y1, x2, y2 in (np.round(np.array(box) * canvas.width / 1000).astype(int) for box in boxes):
        inside[y1:y2, x1:x2] = True
    assert np.array_equal(dark, inside)


@pytest.mark.fast
def test_a_missing_package_is_named_with_the_mend() -> None:
    with pytest.raises(DemoError, match=r"no_such_package is not installed: run `pip install -e"):
        locate("no_such_package", "picture.png")


def test_every_source_makes_usable_records_and_held_out_ones_share_no_media(tmp_path: Path) -> None:
    media: dict[str, set[bytes]] = {"train": set(), "held_out": set()}
    for name, records in sources(Library(tmp_path)).items():
        part = "held_out" if name.startswith("held_out") else "train"
        for record in records:
            files = [*record.get("images", ()), *record.get("videos", ())]
            build_sample(record, images=len(record.get("images", ())), videos=len(record.get("videos", ())))
            media[part] |= {(tmp_path / file).read_bytes() for file in files}
    assert media["held_out"]
    assert not media["train"] & media["held_out"]


def test_swapping_pictures_leaves_the_text_alone(small_shards: Path) -> None:
    tokenizer = GlmTokenizer(small_shards / "tokenizer")
    samples = read_samples(small_shards / "chat", small_shards / "tokenizer")[:4]
    for sample, other, swapped in zip(
        samples, [*samples[1:], samples[0]], with_other_pictures(samples, tokenizer.image_id), strict=True
    ):
        own_text, same_text = (each.input_ids[each.input_ids != tokenizer.image_id] for each in (sample, swapped))
        assert np.array_equal(own_text, same_text)
        assert np.array_equal(sample.input_ids[sample.loss], swapped.input_ids[swapped.loss])
        assert (swapped.input_ids == tokenizer.image_id).sum() == (other.input_ids == tokenizer.image_id).sum()
        assert torch.equal(swapped.pixels, other.pixels)


@pytest.mark.fast
def test_figures_are_means_over_the_ends(tmp_path: Path) -> None:
    losses = [6.0, 5.0, 4.0, *[3.0] * 15, 2.0, 1.0]
    lines = [{"loss": loss, "tokens": 100, "step_seconds": 0.5} for loss in losses]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = stage_figures(tmp_path / "metrics.jsonl")
    assert (figures.steps, figures.first, figures.last, figures.tokens_per_second) == (20, 5.0, 1.5, 200.0)
    assert figures.fall == pytest.approx(0.7)


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A few real samples: captions, documents of several pictures, chats and text, and the tokenizer beside them."""
    out = tmp_path_factory.mktemp("demo")
    library = Library(out / "records")
    records = {
        "captions": captions(library, "train", 1),
        "interleaved": interleaved(library, 10, (2, 3)),
        "chat": describing_chat(library, "train", 1),
        "text": text(),
    }
    for name, lines in records.items():
        jsonl = library.root / f"{name}.jsonl"
        jsonl.parent.mkdir(exist_ok=True)
        jsonl.write_text("".join(json.dumps(record) + "\n" for record in lines))
        assert not build_shards([jsonl], out / name, tokenizer=tokenizer_folder, name=name).counts.rejected
    (out / "tokenizer").mkdir()
    for file in tokenizer_folder.iterdir():
        (out / "tokenizer" / file.name).write_bytes(file.read_bytes())
    for kind in ("", "video_"):
        budget = {"size": {"longest_edge": 64 * 28 * 28 * 2}}
        (out / "tokenizer" / f"{kind}preprocessor_config.json").write_text(json.dumps(budget))
    return out


PRODUCTION_PATH = {  # file of megatron-core: functions of it that a training step goes through
    "pipeline_parallel/schedules.py": ("forward_backward_no_pipelining", "backward_step"),
    "distributed/distributed_data_parallel.py": ("finish_grad_sync", "zero_grad_buffer"),
    "distributed/param_and_grad_buffer.py": ("start_grad_sync",),
    "optimizer/distrib_optimizer.py": ("step_with_ready_grads", "_copy_model_grads_to_main_grads"),
    "transformer/transformer_block.py": ("forward",),
    "transformer/moe/moe_layer.py": ("routed_experts_compute",),
    "dist_checkpointing/serialization.py": ("save",),
}


def test_the_demo_runs_the_production_path(small_shards: Path, tmp_path: Path) -> None:
    """Two steps of what the demo runs, under coverage: megatron-core's own machinery does the work."""
    data, settings = tmp_path / ".coverage", tmp_path / "coveragerc"
    settings.write_text("[run]\ninclude = */megatron/core/*,*/model/vision.py\n")
    names = ", ".join(f"{{path: {small_shards / name}}}" for name in ("captions", "interleaved", "text"))
    subprocess.run(
        [
            *(sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", f"--data-file={data}"),
            *("-m", "pretrain.train", "--config", "configs/tiny/pretrain.yaml", "train.steps=2"),
            *("optimizer.warmup_steps=1", f"data.sources=[{names}]", f"data.tokenizer={small_shards / 'tokenizer'}"),
            *(f"train.output_dir={tmp_path / 'run'}", "data.num_workers=0"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    measured = coverage.CoverageData(str(data))
    measured.read()
    for file, functions in PRODUCTION_PATH.items():
        path = next(name for name in measured.measured_files() if name.endswith(f"megatron/core/{file}"))
        executed = set(measured.lines(path) or ())
        for function in functions:
            assert any(body & executed for body in function_bodies(Path(path), function)), (
                f"{function} of {file} did not run"
            )
    vision = ROOT / "model" / "vision.py"
    executed = set(measured.lines(str(vision)) or ())
    lines = vision.read_text().splitlines()
    for step in ("self.blocks = TransformerBlock(", "x = self.blocks("):
        (number,) = (number for number, line in enumerate(lines, 1) if line.strip() == step)
        assert number in executed, f"{step} did not run"


def function_bodies(path: Path, name: str) -> list[set[int]]:
    """The lines of every function called `name`, less those of its head, which run on import."""
    return [
        set(range(node.body[0].lineno + 1, (node.end_lineno or 0) + 1))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", ["moe", "dense"])
def test_the_whole_demo(variant: str) -> None:
    done = subprocess.run([sys.executable, "-m", "demo", "--variant", variant], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
