"""What the demo asks about the model it trained: its loss on held-out samples, and whether it looks at the pictures.

Both sides read the samples through the production path (`encode_record`). Ours packs them and runs the production
model; on the other side positions, vision tower, decoder and loss are transformers' own, one sample at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoModelForImageTextToText

from data_pipeline.batch import EncodedSample, collate, padded_length
from data_pipeline.encode import PixelBudget, encode_record
from data_pipeline.index import find_shards, read_index
from data_pipeline.shards import ShardReader
from data_pipeline.tokens import GlmTokenizer
from model.checkpoint import COMPANIONS, find_checkpoint, load_checkpoint
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.parallel import ParallelConfig, initialize_model_parallel
from model.vision import PIXEL_MEAN, PIXEL_STD
from pretrain.companions import PIXELS_PER_TOKEN
from pretrain.distributed import process_group
from pretrain.step import forward

SEQ_LENGTH = 512  # of the packs that our side sees


@dataclass
class Loss:
    """A sum of cross-entropies over the tokens that carry loss."""

    total: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.tokens


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


def load_exported(folder: Path) -> Any:
    """The exported model as transformers reads it, fp32, on the CPU."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def transformers_loss(model: Any, samples: Sequence[EncodedSample]) -> Loss:
    loss = Loss()
    for sample in samples:
        tokens = int(sample.loss[1:].sum())
        loss.total += float(model(**transformers_inputs(sample, model.config.image_token_id)).loss) * tokens
        loss.tokens += tokens
    return loss


def transformers_inputs(sample: EncodedSample, image_token_id: int) -> dict[str, Tensor]:
    """One sample as a batch of one for transformers' forward; its own code makes the 3-D positions."""
    input_ids = torch.from_numpy(sample.input_ids)[None]
    labels = input_ids.masked_fill(~torch.from_numpy(sample.loss)[None], -100)
    inputs = {"input_ids": input_ids, "labels": labels}
    if sample.grids:
        is_video = sample.frames[0] == 2
        grid = torch.tensor([(1, *size) for size in sample.grids])
        pixels, grids = ("pixel_values_videos", "video_grid_thw") if is_video else ("pixel_values", "image_grid_thw")
        inputs[pixels], inputs[grids] = torch.cat(list(float_patches(sample))), grid
        inputs["mm_token_type_ids"] = (input_ids == image_token_id).long() * (2 if is_video else 1)
    return inputs


def float_patches(sample: EncodedSample) -> Iterator[Tensor]:
    """The patches of each image, float32 [patches, 1176] in transformers' order (channel, frame, y, x)."""
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1, 1)
    first = 0
    for (height, width), frames in zip(sample.grids, sample.frames, strict=True):
        count = height * width * frames
        slices = sample.pixels[first : first + count].view(-1, frames, 3, 14, 14).transpose(1, 2).float()
        first += count
        patches = (slices / 255 - mean) / std  # [patches, 3, frames, 14, 14]
        yield patches.expand(-1, -1, 2, -1, -1).reshape(len(patches), -1)


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


@torch.no_grad()
def our_loss(checkpoint: Path, samples: Sequence[EncodedSample], seq_length: int, segment_multiple: int = 8) -> Loss:
    """The loss of a checkpoint of ours, samples packed as in training. Starts and ends a process group of one."""
    loss = Loss()
    with process_group():
        parallel = ParallelConfig()
        initialize_model_parallel(parallel, seed=0)
        model = GlmvModel(GlmvConfig.from_hf(checkpoint / COMPANIONS), parallel, dtype=torch.float32)
        load_checkpoint(checkpoint, model)
        model.eval()
        for pack in packs(samples, seq_length, segment_multiple):
            batch = collate(pack, seq_length=seq_length, segment_multiple=segment_multiple, pad_id=0)
            loss.total += float((forward(model, batch) * batch.loss_mask).sum())
            loss.tokens += batch.num_loss_tokens
    return loss


def packs(samples: Sequence[EncodedSample], seq_length: int, segment_multiple: int) -> Iterator[list[EncodedSample]]:
    """Samples in order, as many to a pack as fit."""
    pack: list[EncodedSample] = []
    used = 0
    for sample in samples:
        length = padded_length(len(sample), segment_multiple)
        if used + length > seq_length:
            yield pack
            pack, used = [], 0
        pack.append(sample)
        used += length
    yield pack


# Command lines: each side in a process of its own, so that neither sees what the other sets up.

app = typer.Typer(add_completion=False)
Shards = Annotated[list[Path], typer.Argument(help="folders of held-out shards")]


@app.command()
def ours(run: Annotated[Path, typer.Argument(help="a run's folder")], shards: Shards) -> None:
    """Print the production model's loss as JSON."""
    checkpoint = find_checkpoint(run)
    samples = [sample for folder in shards for sample in read_samples(folder, checkpoint / COMPANIONS)]
    loss = our_loss(checkpoint, samples, SEQ_LENGTH)
    print(json.dumps({"loss": loss.mean, "tokens": loss.tokens}))


@app.command()
def exported(
    folder: Annotated[Path, typer.Argument(help="an exported Hugging Face folder")],
    shards: Shards,
    captions: Annotated[Path, typer.Option(help="shards whose samples have one picture each, for the swap")],
) -> None:
    """Print transformers' loss as JSON: of all samples, and of captions with their own and with another picture."""
    model = load_exported(folder)
    samples = [sample for shard in shards for sample in read_samples(shard, folder)]
    described = read_samples(captions, folder)
    loss = transformers_loss(model, samples)
    print(
        json.dumps(
            {
                "loss": loss.mean,
                "tokens": loss.tokens,
                "captions": transformers_loss(model, described).mean,
                "swapped": transformers_loss(model, with_other_pictures(described, model.config.image_token_id)).mean,
            }
        )
    )


if __name__ == "__main__":
    app()
