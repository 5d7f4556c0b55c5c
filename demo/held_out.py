"""Losses and answers on held-out samples, of the production model and of transformers on the exported folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.encoding.batch import Batch, EncodedSample, collate, padded_length
from data_pipeline.encoding.encode import PixelBudget, encode_record
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.pixel_budget import PIXELS_PER_TOKEN
from data_pipeline.shards.catalogue import find_shards
from data_pipeline.shards.index import read_index
from data_pipeline.shards.reader import RawSample, ShardReader
from demo.media import subjects
from demo.records import DESCRIBE, NAME, view_path
from model.checkpoint import HF_FILES, find_checkpoint
from tools.exported import Exported, transformers_inputs
from training.evaluate import evaluate

SEQ_LENGTH = 512  # of the production side's packs
SHOWN = ("coffee", "tabby_cat", "rocket")  # subjects whose held-out images the demo shows, with answers
ANSWER_TOKENS, THINKING_TOKENS = 32, 64  # the longest answers


def read_samples(shards: Path) -> list[RawSample]:
    """Return every sample of a folder of shards, in order."""
    reader, samples = ShardReader(), []
    for shard in map(read_index, find_shards(str(shards))):
        samples += [reader.read(str(shard.file), shard.sample(row)) for row in range(shard.table.num_rows)]
    reader.close()
    return samples


def encode(samples: Sequence[RawSample], tokenizer: GlmTokenizer, budget: PixelBudget) -> list[EncodedSample]:
    return [encode_record(raw.record, raw.images, raw.videos, tokenizer=tokenizer, budget=budget) for raw in samples]


def with_next_images(samples: Sequence[RawSample]) -> list[RawSample]:
    """Return each sample with the images of the next one, the last with those of the first."""
    following = [*samples[1:], *samples[:1]]
    return [replace(sample, images=other.images) for sample, other in zip(samples, following, strict=True)]


# transformers, on the exported folder


@torch.no_grad()
def transformers_loss(exported: Exported, samples: Sequence[EncodedSample]) -> float:
    """Return the mean cross-entropy of the tokens that carry loss, each sample computed alone."""
    total, tokens = 0.0, 0
    for sample in samples:
        inputs = transformers_inputs(sample, exported.model.config.image_token_id, exported.preprocessor)
        labels = inputs["input_ids"].masked_fill(~torch.from_numpy(sample.loss)[None], -100)
        count = int(sample.loss[1:].sum())
        total += float(exported.model(**inputs, labels=labels).loss) * count
        tokens += count
    return total / tokens


def ask(exported: Exported, question: str, image: bytes, *, thinking: bool) -> str:
    """Return the model's greedy answer to a question about one image."""
    prompt = exported.chat_prompt(question, images=1, videos=0, thinking=thinking)
    sample = exported.encode(prompt, [image], [])
    return exported.generate(sample, max_new_tokens=THINKING_TOKENS if thinking else ANSWER_TOKENS).strip()


def share_answered(exported: Exported, samples: Sequence[RawSample]) -> float:
    """Return the share of samples that are answered with exactly the recorded words.

    Args:
        exported: the trained model.
        samples: non-thinking chats of one turn about one image.
    """
    right = 0
    for sample in samples:
        question, answer = (message["content"] for message in sample.record["messages"])
        right += ask(exported, question, sample.images[0], thinking=False) == answer
    return right / len(samples)


def show_answers(exported: Exported, records: Path) -> list[dict[str, str]]:
    """Ask about the held-out images of SHOWN: its name, a description, and a question with thinking.

    Args:
        exported: the trained model.
        records: folder that holds media/held_out.

    Returns:
        Dicts of image (path), question and answer.
    """
    shown = []
    named = {subject.name: subject for subject in subjects()}
    for subject in map(named.__getitem__, SHOWN):
        image = records / view_path(subject, 0, "held_out")
        for question, thinking in ((NAME, False), (DESCRIBE[0], False), (next(iter(subject.ask)), True)):
            answer = ask(exported, question, image.read_bytes(), thinking=thinking)
            shown.append({"image": str(image), "question": question, "answer": answer})
    return shown


def exported_figures(
    folder: Path, shards: Sequence[Path], descriptions: Path, questions: Path, records: Path
) -> dict[str, Any]:
    """Return what transformers computes: losses, shares of right answers, and answers to show.

    Args:
        folder: Exported Hugging Face folder.
        shards: Folders of held-out shards.
        descriptions: Shards of descriptions of one image each.
        questions: Shards of questions about one image each.
        records: Folder that holds media/held_out.

    Raises:
        DataError, GenerateError: A folder cannot be used.
    """
    model = Exported.load(folder, dtype=torch.float32)
    held_out = [sample for shard in shards for sample in read_samples(shard)]
    described, asked = read_samples(descriptions), read_samples(questions)

    def loss(samples: Sequence[RawSample]) -> float:
        return transformers_loss(model, encode(samples, model.glm_tokenizer, model.budget))

    return {
        "loss": loss(held_out),
        "own_image": loss(described),
        "other_image": loss(with_next_images(described)),
        "questions": len(asked),
        "right": share_answered(model, asked),
        "right_other_image": share_answered(model, with_next_images(asked)),
        "shown": show_answers(model, records),
    }


# The production model, on the last checkpoint


def packs(samples: Sequence[EncodedSample], seq_length: int, segment_multiple: int = 8) -> Iterator[Batch]:
    """Yield packs of samples in order, as many per pack as fit."""
    pack: list[EncodedSample] = []
    used = 0
    for sample in samples:
        length = padded_length(len(sample), segment_multiple)
        if used + length > seq_length:
            yield collate(pack, seq_length=seq_length, segment_multiple=segment_multiple, pad_id=0)
            pack, used = [], 0
        pack.append(sample)
        used += length
    yield collate(pack, seq_length=seq_length, segment_multiple=segment_multiple, pad_id=0)


def pixel_budget(hf: Path) -> PixelBudget:
    """Return the pixel budgets of a Hugging Face folder's preprocessors."""
    longest = [
        json.loads((hf / name).read_text())["size"]["longest_edge"] // PIXELS_PER_TOKEN
        for name in ("preprocessor_config.json", "video_preprocessor_config.json")
    ]
    return PixelBudget(*longest)


def production_loss(run: Path, shards: Sequence[Path]) -> dict[str, float]:
    """Return what the model of a run's last checkpoint computes on folders of held-out shards.

    Raises:
        CheckpointError, DataError: A folder cannot be used.
    """
    checkpoint = find_checkpoint(run)
    hf = checkpoint / HF_FILES
    samples = [sample for folder in shards for sample in read_samples(folder)]
    encoded = encode(samples, GlmTokenizer(hf), pixel_budget(hf))
    return evaluate(checkpoint, packs(encoded, SEQ_LENGTH))
