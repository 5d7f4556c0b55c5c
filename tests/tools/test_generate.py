"""Prompts, inputs and answers of tools.generate, against transformers' own tokenizer, processors and forward."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from typer.testing import CliRunner

from data_pipeline.domains.prompts import document_prompt
from data_pipeline.encoding.batch import EncodedSample
from tests.data_pipeline import media_files
from tests.hf_folders import VARIANTS, save_whole_folder
from tools.exported import Exported, GenerateError, transformers_inputs
from tools.generate import app

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module", params=(*VARIANTS, "glm46v"))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported.load(save_whole_folder(request.param, tmp_path_factory.mktemp(request.param)))


def image(width: int = 140, height: int = 112, seed: int = 0) -> bytes:
    """Return a lossless image whose size needs no resizing."""
    return media_files.encoded(media_files.pattern(height, width, seed), format="PNG")


@pytest.fixture(scope="module")
def video() -> bytes:
    return media_files.encoded_video(40, height=84, width=112, fps=10)


def mixed_sample(exported: Exported, video: bytes) -> EncodedSample:
    prompt = exported.chat_prompt("Is <image> in <video>, or <image>?", images=2, videos=1)
    return exported.encode(prompt, [image(), image(84, 168, seed=1)], [video])


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [True, False])
def test_chat_prompt_equals_the_rendered_template(exported: Exported, thinking: bool) -> None:
    sample = exported.encode(
        exported.chat_prompt("What is this?", images=1, videos=0, thinking=thinking), [image()], []
    )
    text = exported.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    tokens = 140 * 112 // 28**2
    assert "/nothink" in text or thinking
    expected = exported.tokenizer(text.replace("<|image|>", "<|image|>" * tokens), add_special_tokens=False).input_ids
    assert sample.input_ids.tolist() == expected


def test_raw_prompt_begins_like_a_pretraining_document(exported: Exported) -> None:
    sample = exported.encode(document_prompt("A cat", images=1, videos=0), [image()], [])
    tokens = 140 * 112 // 28**2
    text = "[gMASK]<sop><|begin_of_image|>" + "<|image|>" * tokens + "<|end_of_image|>A cat"
    assert sample.input_ids.tolist() == exported.tokenizer(text, add_special_tokens=False).input_ids


def test_typed_text_never_becomes_special_tokens(exported: Exported) -> None:
    typed = "<|assistant|> <think> <|begin_of_image|><|image|><|end_of_image|> \ue0000\ue001"
    sample = exported.encode(exported.chat_prompt(typed, images=0, videos=0), [], [])
    plain = exported.encode(exported.chat_prompt("x", images=0, videos=0), [], [])
    special = set(exported.glm_tokenizer.special.values())
    assert [i for i in sample.input_ids.tolist() if i in special] == [
        i for i in plain.input_ids.tolist() if i in special
    ]
    assert typed in exported.tokenizer.decode(sample.input_ids)


def test_images_and_videos_are_placed_where_the_prompt_says(exported: Exported, video: bytes) -> None:
    shown = exported.tokenizer.decode(mixed_sample(exported, video).input_ids)
    images_and_words = [part for part in shown.split("<|begin_of_image|>") if "<|image|>" in part]
    words = [part.split("<|end_of_image|>")[1] for part in images_and_words]
    assert words[0] == " in <|begin_of_video|>"
    assert words[-2].endswith("<|end_of_video|>, or ")
    assert words[-1] == "?<|assistant|>\n"
    times = "".join(words[1:-1]).removesuffix("<|end_of_video|>, or ")
    assert times.startswith("0.0 seconds" if exported.model.config.model_type == "glm46v" else "0123")


# --- inputs of transformers' forward ----------------------------------------------------------------------------------


def test_pixel_values_equal_transformers_processor(exported: Exported) -> None:
    data = [image(), image(84, 168, seed=1)]
    sample = exported.encode(document_prompt("", images=2, videos=0), data, [])
    inputs = transformers_inputs(sample, exported.model.config.image_token_id, exported.preprocessor)
    processor = Glm4vImageProcessorPil.from_pretrained(exported.folder)
    theirs = processor([Image.open(io.BytesIO(each)) for each in data], return_tensors="pt")
    assert torch.equal(inputs["image_grid_thw"], theirs["image_grid_thw"])
    assert inputs["pixel_values"].shape == theirs["pixel_values"].shape
    assert (inputs["pixel_values"] - theirs["pixel_values"]).abs().max() <= 1e-6


@torch.no_grad()
def test_frame_pairs_given_as_images_equal_the_video(exported: Exported, video: bytes) -> None:
    sample = exported.encode(document_prompt("A video", images=0, videos=1), [], [video])
    image_token = exported.model.config.image_token_id
    ours = transformers_inputs(sample, image_token, exported.preprocessor)
    (grid,) = set(sample.grids)
    as_video = {
        "input_ids": ours["input_ids"],
        "pixel_values_videos": ours["pixel_values"],
        "video_grid_thw": torch.tensor([(len(sample.grids), *grid)]),
        "mm_token_type_ids": (ours["input_ids"] == image_token).long() * 2,
    }
    assert torch.equal(exported.model(**ours).logits, exported.model(**as_video).logits)


# --- answers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_answer_takes_the_most_likely_token_each_time(
    exported: Exported, video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With images, a video and a cache: equal to running the whole sequence again for every token."""
    sample = mixed_sample(exported, video)
    monkeypatch.setattr(exported.model.generation_config, "eos_token_id", [])
    monkeypatch.setattr(exported.model.config.text_config, "eos_token_id", [])
    answer = exported.generate(sample, max_new_tokens=6)
    inputs = transformers_inputs(sample, exported.model.config.image_token_id, exported.preprocessor)
    written: list[int] = []
    for _ in range(6):
        most_likely = exported.model(**inputs).logits[0, -1].argmax().view(1, 1)
        written.append(int(most_likely))
        for name, more in (("input_ids", most_likely), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.cat([inputs[name], torch.as_tensor(more).view(1, 1)], dim=1)
    assert answer == exported.tokenizer.decode(written)


def test_end_token_is_not_part_of_the_answer(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = exported.encode(exported.chat_prompt("Hello", images=0, videos=0), [], [])
    every_token = list(range(exported.model.config.text_config.vocab_size))
    monkeypatch.setattr(exported.model.generation_config, "eos_token_id", every_token)
    assert exported.generate(sample, max_new_tokens=5) == ""


def test_command_prints_only_the_answer(exported: Exported, video: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "b.mp4").write_bytes(video)
    arguments = ["--hf", str(exported.folder), "--image", str(tmp_path / "a.png"), "--video", str(tmp_path / "b.mp4")]
    arguments += ["--prompt", "What is this?", "--max-new-tokens", "20"]
    sampled = [
        CliRunner().invoke(app, [*arguments, "--no-greedy", "--seed", seed]) for seed in ("1", "1", "2", "3", "4")
    ]
    assert {result.exit_code for result in sampled} == {0}
    assert sampled[0].stdout == sampled[1].stdout
    assert len({result.stdout for result in sampled}) > 1
    assert CliRunner().invoke(app, [*arguments, "--raw"]).exit_code == 0


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole_folder("glm4v_moe", tmp_path_factory.mktemp("refused"))


def another_architecture(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "llava"}))


def remove_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "another architecture": (
        another_architecture,
        [],
        "is a model of type 'llava'; this command runs glm4v_moe, glm4v",
    ),
    "no preprocessor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        [],
        "preprocessor_config.json is missing",
    ),
    "a preprocessor without sizes": (
        lambda folder: (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}'),
        [],
        "preprocessor_config.json: size.longest_edge, image_mean or image_std is missing or wrong",
    ),
    "a list in place of a config": (
        lambda folder: (folder / "config.json").write_text("[]"),
        [],
        "config.json is not a JSON object",
    ),
    "thinking of a document": (lambda folder: None, ["--raw", "--no-thinking"], "remove --raw or --no-thinking"),
    "a seed without sampling": (lambda folder: None, ["--seed", "3"], "add --no-greedy, or remove --seed"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), [], "tokenizer.json"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        [],
        "transformers does not load the weights",
    ),
    "a tensor is missing": (
        remove_a_tensor,
        [],
        "the weights do not fit config.json, missing_keys: ['lm_head.weight']",
    ),
    "a truncated file": (truncate_weights, [], "transformers does not load the weights"),
    "no such image": (lambda folder: None, ["--image", "nowhere.png"], "nowhere.png: No such file"),
    "a truncated image": (
        lambda folder: (folder / "cut.png").write_bytes(image()[:2000]),
        ["--image", "cut.png"],
        "unreadable_image",
    ),
    "one image too few": (
        lambda folder: (folder / "a.png").write_bytes(image()),
        ["--image", "a.png", "--prompt", "<image> or <image>?"],
        "the prompt says <image> 2 times, but 1 are given",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, arguments, message = REFUSED[case]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["--hf", str(tmp_path), "--prompt", "Hello", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_no_thinking_needs_a_template_that_supports_it(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(GenerateError, match="the chat template always thinks; remove --no-thinking"):
        exported.chat_prompt("Hello", images=0, videos=0, thinking=False)
