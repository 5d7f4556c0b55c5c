"""Writes answers to prompts as a page, as JSON, and into TensorBoard."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from common.files import write_json, write_text
from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.images import unpatchify
from training.metrics import writes_to
from training.prompts import Prompt
from training.samples import Answer, decode

SAMPLES = "samples"  # the folder of the pages in a run's folder
PAGES = "step_*.html"
MAX_IMAGES = 8  # per prompt; a video has hundreds of frames
SIDE = 480  # pixels of an image's longer side on the page


def last_page(folder: Path, step: int) -> int:
    """Return the step of the last page up to a step; 0 where there is none."""
    steps = (int(page.stem.removeprefix("step_")) for page in folder.glob(PAGES))
    return max((found for found in steps if found <= step), default=0)


def write_samples(
    folder: Path,
    step: int,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    tokenizer: GlmTokenizer,
    tensorboard: SummaryWriter,
) -> Path:
    """Write what the model answered after a step.

    Args:
        folder: of the pages; made if it does not exist.
        step: the step.
        prompts: what the model was asked.
        answers: to each of them.
        tokenizer: of the run.
        tensorboard: gets each answer as text, and the first image of each prompt once.

    Returns:
        The page; beside it lies the same as JSON, without images.

    Raises:
        RunFolderError: a file cannot be written.
    """
    page, samples = folder / f"step_{step:07d}.html", []
    first_page = not any(folder.glob(PAGES))
    for prompt, answer in zip(prompts, answers, strict=True):
        images = list(images_of(prompt.sample))
        samples.append(
            {
                "prompt": _shown(prompt.sample, tokenizer),
                "answer": answer.text,
                "expected": prompt.config.answer,
                "facts": f"{answer.tokens} tokens" + ("" if answer.ended else ", cut off"),
                "images": [_data_uri(image) for image in images[:MAX_IMAGES]],
                "more_images": max(0, len(images) - MAX_IMAGES),
            }
        )
    rows = [
        {**asdict(prompt.config), "written": asdict(answer)} for prompt, answer in zip(prompts, answers, strict=True)
    ]
    with writes_to(page):
        folder.mkdir(exist_ok=True)
        write_text(page, _template().render(title=f"Answers after step {step}", samples=samples))
        write_json(page.with_suffix(".json"), {"step": step, "samples": rows})
        for number, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
            text = f"    {sample['answer']}".replace("\n", "\n    ")  # four spaces: shown as it is
            tensorboard.add_text(f"samples/{number}", text, step)
            if first_page and prompt.sample.grids:
                image = next(images_of(prompt.sample))
                tensorboard.add_image(f"samples/{number}", np.asarray(image), step, dataformats="HWC")
    return page


def images_of(sample: EncodedSample) -> Iterator[np.ndarray]:
    """Yield the images of a sample and the first frame of each frame pair, as the model gets them: uint8 [H, W, 3]."""
    done = 0
    for grid, frames in zip(sample.grids, sample.frames_per_image, strict=True):
        size = grid[0] * grid[1] * frames
        yield unpatchify(sample.patches[done : done + size], grid, frames)[0]
        done += size


def _shown(sample: EncodedSample, tokenizer: GlmTokenizer) -> str:
    """Return a prompt as text, with the tokens of an image as one."""
    ids = sample.input_ids
    repeated = np.zeros(len(ids), bool)
    repeated[1:] = (ids[1:] == tokenizer.image_id) & (ids[:-1] == tokenizer.image_id)
    return decode(ids[~repeated].tolist(), tokenizer)


def _data_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@cache
def _template() -> Any:
    # All text comes from outside: the template escapes all of it.
    pages = Environment(loader=PackageLoader("training", "."), autoescape=True, undefined=StrictUndefined)
    return pages.get_template("samples_page.html")
