"""Run two models on the same prompts through transformers, and compare their logits.

The prompts are a text, an image and a video, made here. One model is in memory at a time.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from model.weights.folder import SafetensorsFolder
from tools.exported import Exported, transformers_inputs
from tools.hf_output import KEPT_IN_FLOAT32

TEXT = "The quick brown fox jumps over the lazy dog. 0123456789. What is 17 + 25? Answer in one word."
HEIGHT, WIDTH, FRAMES, FPS = 112, 168, 16, 4


@dataclass(frozen=True)
class Answer:
    """What a model says of a prompt."""

    ids: list[int]
    logits: Tensor  # [tokens, vocabulary], on the CPU


@dataclass(frozen=True)
class LogitsDifference:
    """How two models differ on a prompt."""

    prompt: str
    tokens: int
    largest: float  # largest absolute difference of a logit
    divergence: float  # largest Kullback-Leibler divergence of a position, of B from A, in nats
    agreement: float  # share of positions with the same most likely token


def common_dtype(dir_a: Path, dir_b: Path) -> torch.dtype | str:
    """Return the dtype in which both models are run: their own if it is the same for both, else float32.

    Raises:
        WeightsError: A folder has no readable weights.
    """
    kinds = [
        {folder.dtype(name) for name in folder.names() if not name.endswith(KEPT_IN_FLOAT32)}
        for folder in map(SafetensorsFolder, (dir_a, dir_b))
    ]
    return "auto" if kinds[0] == kinds[1] else torch.float32


def compare_logits(dir_a: Path, dir_b: Path, console: Console) -> list[LogitsDifference]:
    """Return the differences of two Hugging Face folders on each prompt.

    Raises:
        GenerateError: transformers cannot load a folder, or a file beside its weights is missing.
        ProbeError: The folders make other tokens of a prompt.
        DataError: The tokenizer of a folder cannot be used.
        WeightsError: A folder has no readable weights.
    """
    dtype = common_dtype(dir_a, dir_b)
    console.print("both models are run in " + ("their own dtype" if dtype == "auto" else "float32"))
    given, found = (answers(folder, dtype) for folder in (dir_a, dir_b))
    return [difference(prompt, given[prompt], found[prompt]) for prompt in given]


@torch.no_grad()
def answers(folder: Path, dtype: torch.dtype | str) -> dict[str, Answer]:
    """Load a model, and return what it says of each prompt."""
    exported = Exported.load(folder, dtype)
    found = {}
    for name, images, videos in prompts():
        elements = exported.chat_prompt(TEXT, images=len(images), videos=len(videos))
        inputs = transformers_inputs(
            exported.encode(elements, images, videos), exported.model.config.image_token_id, exported.preprocessor
        )
        logits = exported.model(**{key: value.to(exported.model.device) for key, value in inputs.items()}).logits[0]
        found[name] = Answer(inputs["input_ids"][0].tolist(), logits.cpu())
    del exported
    gc.collect()
    return found


def difference(prompt: str, a: Answer, b: Answer) -> LogitsDifference:
    """Compare two answers. Raises ProbeError if the prompts had other tokens."""
    if a.ids != b.ids or a.logits.shape != b.logits.shape:
        raise ProbeError(
            f"the {prompt} prompt is {len(a.ids)} tokens for one folder and {len(b.ids)} other tokens for the other: "
            "their tokenizers or processors differ; `verify` without --logits shows how"
        )
    x, y = a.logits.double(), b.logits.double()
    log_a, log_b = x.log_softmax(-1), y.log_softmax(-1)
    return LogitsDifference(
        prompt=prompt,
        tokens=len(a.ids),
        largest=(x - y).abs().max().item(),
        divergence=(log_a.exp() * (log_a - log_b)).sum(-1).max().clamp(min=0).item(),
        agreement=(x.argmax(-1) == y.argmax(-1)).double().mean().item(),
    )


class ProbeError(ValueError):
    """Two models cannot be compared. The message says why."""


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompts() -> Iterator[tuple[str, list[bytes], list[bytes]]]:
    """Yield the name of each prompt, its images and its videos."""
    yield "text", [], []
    image = io.BytesIO()
    Image.fromarray(pattern(0)).save(image, format="PNG")
    yield "image", [image.getvalue()], []
    yield "video", [], [video()]


def pattern(number: int) -> np.ndarray:
    """Return an image of coloured waves, uint8 [height, width, 3]; the next numbers move them."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = (np.sin((x + 6 * number) / 9), np.cos((y - 4 * number) / 7), np.sin((x * y) / 300 + number / 3))
    return (np.stack(waves, axis=-1) * 127 + 128).astype(np.uint8)


def video() -> bytes:
    """Return a video file in which the pattern moves."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pattern(number), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
