"""Exports of tiny models, prompts to them, and what transformers answers: the reference of the engines."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from tests.data_pipeline import media_files
from tests.hf_folders import save_weights
from tests.model.test_block_fp8 import convertible
from tests.reference import save_transformers_model
from tools.exported import Exported, transformers_inputs
from training.hf_files import preprocessor_config

# What is served, by the models that are published so: the type of the model, and whether processors are GLM-4.6V's.
MODELS = {
    "GLM-4.5V": ("glm4v_moe", False),
    "GLM-4.1V": ("glm4v", False),
    "GLM-4.6V": ("glm4v_moe", True),
    "GLM-4.6V-Flash": ("glm4v", True),
}
SEED = 1  # with these weights the greedy answers are of several tokens, and none is an image token

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / ".venv-engines/bin/python"


def exported_folder(model: str, tokenizer: Path, root: Path, *, fp8: bool = False) -> Path:
    """Write a model with transformers, import it and export it, as a user does. Return the export."""
    hf_type, glm46v = MODELS[model]
    given = root / "given"
    if fp8:
        save_transformers_model(convertible(hf_type), given)
    else:
        save_weights(hf_type, given, seed=SEED)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, given / file.name)
    for name, kind, tokens in (
        ("preprocessor_config.json", "image", 6144),
        ("video_preprocessor_config.json", "video", 30000),
    ):
        (given / name).write_text(json.dumps(preprocessor_config(kind, tokens, glm46v=glm46v)))
    convert("import", "--hf", given, "--out", root / "checkpoint")
    options = ("--fp8", "--dtype", "bf16") if fp8 else ()
    out = root / "exported"
    convert("export", "--checkpoint", root / "checkpoint", "--out", out, "--max-shard-size", "1MB", *options)
    return root / "exported"


def convert(*arguments: str | Path) -> None:
    run(Path(sys.executable), "-m", "tools.convert", *arguments)


def run(python: Path, *arguments: str | Path, path: str = "") -> str:
    """Run Python from the repository's root, and return what it prints; its errors are shown where it fails."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A question, with the files of its images and videos."""

    text: str
    images: tuple[bytes, ...] = ()
    videos: tuple[bytes, ...] = ()


def prompts() -> dict[str, Prompt]:
    """Return a prompt of each kind. One image must be resized; a part of the video's frames is taken."""
    image = media_files.encoded(media_files.pattern(112, 140, 0), format="PNG")
    odd = media_files.encoded(media_files.pattern(90, 131, 1), format="PNG")
    video = media_files.encoded_video(40, height=84, width=112, fps=10)
    return {
        "text": Prompt("Where do the grey birds sing, and what is under the old trees?"),
        "image": Prompt("What is in this image?", images=(image,)),
        "two images": Prompt("Is the first image in the second?", images=(image, odd)),
        "video": Prompt("What moves in this video?", videos=(video,)),
    }


def frames_of(video: bytes, file: Path) -> tuple[str, float]:
    """Write all frames of a video as an array. Return its name, and the frames per second."""
    with av.open(io.BytesIO(video), "r") as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        rate = float(stream.average_rate or 0)
    np.save(file, np.stack(frames))
    return str(file), rate


# --- reference --------------------------------------------------------------------------------------------------------


def prompt_ids(exported: Exported, prompt: Prompt) -> list[int]:
    """Return the tokens of a prompt in training."""
    return encoded(exported, prompt)["input_ids"][0].tolist()


def encoded(exported: Exported, prompt: Prompt) -> dict[str, torch.Tensor]:
    elements = exported.chat_prompt(prompt.text, images=len(prompt.images), videos=len(prompt.videos))
    sample = exported.encode(elements, prompt.images, prompt.videos)
    return transformers_inputs(sample, exported.model.config.image_token_id, exported.preprocessor)


@torch.no_grad()
def reference_answer(exported: Exported, prompt: Prompt, ids: list[int], new_tokens: int) -> dict[str, Any]:
    """Return what transformers says of a prompt with these tokens, without a cache.

    That is the log-probability of each token after the first, and the tokens of the greedy answer.
    """
    inputs = encoded(exported, prompt)
    image_token = exported.model.config.image_token_id
    assert ids.count(image_token) == (inputs["input_ids"] == image_token).sum()
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token).long()
    log_probs = exported.model(**inputs).logits[0, :-1].double().log_softmax(-1)
    answer_ids: list[int] = []
    for _ in range(new_tokens):
        most_likely = exported.model(**inputs).logits[0, -1].argmax().view(1, 1)
        answer_ids.append(int(most_likely))
        for name, more in (("input_ids", most_likely), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.as_tensor(more).view(1, 1)], dim=1)
    return {"log_probs": log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), "answer_ids": answer_ids}


def rendered(exported: Exported, prompt: Prompt) -> str:
    """Return the text that a user sends to an engine, with one placeholder for each image and video."""
    media = [{"type": "image"}] * len(prompt.images) + [{"type": "video"}] * len(prompt.videos)
    message = {"role": "user", "content": [*media, {"type": "text", "text": prompt.text}]}
    return exported.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
