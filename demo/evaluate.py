"""What the demo asks about the model it trained: its loss on held-out samples, and whether it looks at the pictures.

Both sides read the samples through the production path (`encode_record`). Ours packs them and runs the production
model; on the other side positions, vision tower, decoder and loss are transformers' own, one sample at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from data_pipeline.batch import Batch, EncodedSample, collate, padded_length
from data_pipeline.catalogue import find_shards
from data_pipeline.encode import PixelBudget, encode_record
from data_pipeline.index import read_index
from data_pipeline.shards import ShardReader
from data_pipeline.tokens import GlmTokenizer
from model.checkpoint import COMPANIONS, find_checkpoint
from pretrain.companions import PIXELS_PER_TOKEN
from pretrain.evaluate import evaluate
from tools.generate import Exported, transformers_inputs

SEQ_LENGTH = 512  # of the packs that our side sees


def read_samples(shards: Path, hf: Path) -> list[EncodedSample]:
    """Every sample of a folder of shards, in order. hf: a Hugging Face folder, for its tokenizer and pixel budgets."""
    tokenizer, reader, samples = GlmTokenizer(hf), ShardReader(), []
    budget = PixelBudget(
        *(
            json.loads((hf / name).read_text())["size"]["longest_edge"] // PIXELS_PER_TOKEN
            for name in ("preprocessor_config.json", "video_preprocessor_config.json")
        )
    )
    for shard in map(read_index, find_shards(str(shards))):
        for row in range(shard.table.num_rows):
            raw = reader.read(str(shard.file), shard.sample(row))
            samples.append(encode_record(raw.record, raw.images, raw.videos, tokenizer=tokenizer, budget=budget))
    reader.close()
    return samples


@torch.no_grad()
def transformers_loss(exported: Exported, samples: Sequence[EncodedSample]) -> float:
    """Mean over the tokens that carry loss, by transformers' forward, each sample alone."""
    total, tokens = 0.0, 0
    for sample in samples:
        inputs = transformers_inputs(sample, exported.model.config.image_token_id, exported.preprocessor)
        labels = inputs["input_ids"].masked_fill(~torch.from_numpy(sample.loss)[None], -100)
        learned = int(sample.loss[1:].sum())
        total += float(exported.model(**inputs, labels=labels).loss) * learned
        tokens += learned
    return total / tokens


def with_other_pictures(samples: Sequence[EncodedSample], image_token_id: int) -> list[EncodedSample]:
    """Each sample with the next one's picture in place of its own. Every sample has exactly one picture."""
    return [
        _with_picture(sample, other, image_token_id)
        for sample, other in zip(samples, [*samples[1:], samples[0]], strict=True)
    ]


def _with_picture(sample: EncodedSample, other: EncodedSample, image_token_id: int) -> EncodedSample:
    is_image = sample.input_ids == image_token_id
    start, end = int(is_image.argmax()), int(is_image.argmax() + is_image.sum())
    count = int((other.input_ids == image_token_id).sum())
    return replace(
        sample,
        input_ids=np.concatenate([sample.input_ids[:start], np.full(count, image_token_id), sample.input_ids[end:]]),
        loss=np.concatenate([sample.loss[:start], np.zeros(count, dtype=bool), sample.loss[end:]]),
        position_ids=np.empty((3, 0), dtype=np.int64),  # transformers makes its own
        pixels=other.pixels,
        grids=other.grids,
        frames=other.frames,
    )


# The same samples through the production model


def packs(samples: Sequence[EncodedSample], seq_length: int, segment_multiple: int = 8) -> Iterator[Batch]:
    """Samples in order, as many to a pack as fit."""
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


# Command lines: each side in a process of its own, so that neither sees what the other sets up.

app = typer.Typer(add_completion=False)
Shards = Annotated[list[Path], typer.Argument(help="folders of held-out shards")]


@app.command()
def ours(run: Annotated[Path, typer.Argument(help="a run's folder")], shards: Shards) -> None:
    """Print the production model's loss as JSON."""
    checkpoint = find_checkpoint(run)
    samples = [sample for folder in shards for sample in read_samples(folder, checkpoint / COMPANIONS)]
    print(json.dumps(evaluate(checkpoint, packs(samples, SEQ_LENGTH))))


@app.command()
def exported(
    folder: Annotated[Path, typer.Argument(help="an exported Hugging Face folder")],
    shards: Shards,
    captions: Annotated[Path, typer.Option(help="shards whose samples have one picture each, for the swap")],
) -> None:
    """Print transformers' loss as JSON: of all samples, and of captions with their own and with another picture."""
    model = Exported.load(folder, dtype=torch.float32)
    samples = [sample for shard in shards for sample in read_samples(shard, folder)]
    described = read_samples(captions, folder)
    swapped = with_other_pictures(described, model.model.config.image_token_id)
    losses = {"loss": samples, "captions": described, "swapped": swapped}
    print(json.dumps({name: transformers_loss(model, those) for name, those in losses.items()}))


if __name__ == "__main__":
    app()
