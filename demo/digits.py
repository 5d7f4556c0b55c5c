"""Handwritten digits as questions: a task on which reinforcement learning shows within minutes what it does.

The 1,797 images are scikit-learn's, of 8 x 8 pixels, drawn at 112 x 112: 16 image tokens. The first are answered in
chats, from which a model learns the form, and to be right about half of the time. The next are prompts, with a
reference and without an answer to copy. The rest are held out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline.errors import REJECTED, DataError
from data_pipeline.sharding.build import build_shards
from demo.tokenizer import train_tokenizer

QUESTION = "Which digit is this?"
THOUGHT = "A digit."
SIDE = 112  # pixels
CHATS, PROMPTS = 300, 1000  # the rest is held out
CHAT_FORM = "glm41v"  # of tiny_dense
BOXED = {"glm41v": "<answer>{}</answer>", "glm45v": "{}"}  # how an answer in a box is written, by the form of chats
NEVER_SAID = "ten"  # the reference of a prompt that cannot be answered

Record = dict[str, Any]


def write_images(folder: Path) -> list[tuple[str, int]]:
    """Write all digits as PNG files, in a fixed random order; return (file name, digit) of each."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, row in enumerate(order.tolist()):
        image = Image.fromarray((255 - data.images[row] * (255 / 16)).astype(np.uint8))
        name = f"digit_{number:04d}.png"
        image.resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("RGB").save(folder / name)
        found.append((name, int(data.target[row])))
    return found


def chat_records(images: Sequence[tuple[str, int]], chat_form: str) -> Iterator[Record]:
    """Yield chats with a thought and a boxed answer."""
    for name, digit in images:
        yield {
            "domain": "chat",
            "thinking": True,
            "messages": [
                {"role": "user", "content": f"<image>{QUESTION}"},
                {
                    "role": "assistant",
                    "reasoning_content": THOUGHT,
                    "content": BOXED[chat_form].format(f"<|begin_of_box|>{digit}<|end_of_box|>"),
                },
            ],
            "images": [name],
        }


def prompt_records(images: Sequence[tuple[str, int]], unanswerable: bool = False) -> Iterator[Record]:
    """Yield prompts; with `unanswerable`, each a second time with a reference that no answer has."""
    for name, digit in images:
        for reference in [str(digit), *([NEVER_SAID] if unanswerable else [])]:
            yield {
                "domain": "rl",
                "messages": [{"role": "user", "content": f"<image>{QUESTION}"}],
                "images": [name],
                "reference": reference,
                "verifier": "vqa",
                "category": "digit",
            }


def build(
    out: Path,
    *,
    chats: int = CHATS,
    prompts: int = PROMPTS,
    held_out: int | None = None,
    chat_form: str = CHAT_FORM,
) -> dict[str, int]:
    """Write tokenizer and shards under `out`; return the number of samples of each source.

    Args:
        out: the folder.
        chats: images that are answered.
        prompts: images that are asked about.
        held_out: images that are held out; None: all others.
        chat_form: how the model writes chats, a key of BOXED.

    Raises:
        DataError: a record was rejected.
    """
    words = " ".join([QUESTION, THOUGHT, "<answer></answer>", NEVER_SAID, *map(str, range(10))])
    train_tokenizer([words] * 50, out / "tokenizer")
    images = write_images(out / "records")
    asked, others = images[chats : chats + prompts], images[chats + prompts :][:held_out]
    sources = {
        "chats": chat_records(images[:chats], chat_form),
        "prompts": prompt_records(asked),
        "half_unanswerable": prompt_records(asked, unanswerable=True),
        "held_out": prompt_records(others),
    }
    samples = {}
    for name, records in sources.items():
        file = out / "records" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        folder = out / "shards" / name
        counts = build_shards([file], folder, tokenizer=out / "tokenizer", name=name, chat_form=chat_form).counts
        if counts.rejected:
            raise DataError(f"records of {file} were rejected: see {folder / REJECTED}")
        samples[name] = counts.samples
    return samples
