"""GLM-4.6V and GLM-4.6V-Flash on the demo's data: folders of transformers that are fine-tuned, and exported again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

from data_pipeline.domains.chat_template import CHAT_TEMPLATES
from data_pipeline.sharding.foreign import index_shards
from demo.build import build
from tests.hf_folders import save_weights
from tests.launch import ROOT, metrics, train
from tools.conversion import export_checkpoint
from training.hf_files import PREPROCESSORS, PROCESSOR

pytestmark = pytest.mark.slow

MODELS = {"GLM-4.6V": "glm4v_moe", "GLM-4.6V-Flash": "glm46v"}
SOURCES = ("captions", "chat_describe", "chat_think", "chat_video")
# Of video processors, which need torchvision, that is not installed here: the values of the published files.
VIDEOS = {
    "video_processor_type": "Glm46VVideoProcessor",
    "size": {"shortest_edge": 12_544, "longest_edge": 100_352_000},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "fps": 2,
    "do_sample_frames": True,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo-data` makes."""
    out = tmp_path_factory.mktemp("demo")
    build(out)
    return out


def save_folder(hf_type: str, tokenizer: Path, folder: Path) -> Path:
    """Write a tiny random model with transformers, its tokenizer, and its processors, in one file."""
    save_weights(hf_type, folder)
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    words.chat_template = CHAT_TEMPLATES["glm46v"]
    words.save_pretrained(folder)
    Glm46VImageProcessorPil().save_pretrained(folder)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    content = {"processor_class": "Glm46VProcessor", "image_processor": images, "video_processor": VIDEOS}
    (folder / PROCESSOR).write_text(json.dumps(content))
    return folder


def indexed(demo: Path, source: str, folder: Path, out: Path) -> Path:
    """Copy shards of the demo, and index them for the tokenizer and the processors of a folder."""
    shutil.copytree(demo / "shards" / source, out)
    assert not index_shards(sorted(out.glob("*.tar")), tokenizer=folder).rejected
    return out


@pytest.mark.parametrize("name", MODELS)
def test_folder_is_fine_tuned_and_stays_what_it_is(name: str, demo: Path, tmp_path: Path) -> None:
    hf_type = MODELS[name]
    start, run, export = (
        save_folder(hf_type, demo / "tokenizer", tmp_path / "start"),
        tmp_path / "run",
        tmp_path / "out",
    )
    sources = [indexed(demo, source, start, tmp_path / "shards" / source) for source in SOURCES]
    train(
        ROOT / "configs/tiny/sft.yaml",
        [
            f"model.init_from={start}",
            f"data.tokenizer={start}",
            f"data.sources=[{', '.join(f'{{path: {path}}}' for path in sources)}]",
            f"train.output_dir={run}",
            "train.steps=3",
            "train.global_batch_size=2",
            "optimizer.warmup_steps=1",
        ],
        entry="sft.train",
    )
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["images"] > 0 for line in lines)
    assert {key for line in lines for key in line} >= {"loss/chat", "loss/image_text"}
    assert not (run / "quarantine.jsonl").read_text()
    export_checkpoint(run, export)
    stays_what_it_is(hf_type, start, export)


def stays_what_it_is(hf_type: str, start: Path, export: Path) -> None:
    given, written = (json.loads((folder / "config.json").read_text()) for folder in (start, export))
    for key in ("model_type", "architectures"):
        assert written[key] == given[key]
    assert written["model_type"] == hf_type
    model: Any
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(export, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == given["architectures"][0]
    before = load_file(start / "model.safetensors")
    after = load_file(export / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)

    given, written = (json.loads((folder / PROCESSOR).read_text()) for folder in (start, export))
    for key, budget in (("image_processor", 64), ("video_processor", 256)):
        assert written[key].pop("size")["longest_edge"] == budget * 28 * 28 * 2
        del given[key]["size"]
    assert written == given
    for name in PREPROCESSORS.values():  # for what reads no processor_config.json
        assert json.loads((export / name).read_text())["processor_class"] == "Glm46VProcessor"
    images: Any = Glm46VImageProcessorPil.from_pretrained(export)
    assert images.size["longest_edge"] == 64 * 28 * 28 * 2
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (export / name).read_bytes() == (start / name).read_bytes()
