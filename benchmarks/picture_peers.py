"""How others come from shards of pictures to patches; `benchmarks.pictures` runs this file with their interpreter.

    .venv-peers/bin/python benchmarks/picture_peers.py CONTENDER FOLDER SAMPLES

Prints one line of JSON: the samples, the patches made of them, and the CPU seconds taken after a few to warm up.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

WARM_UP = 16
SIZE = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 6144}


def webdataset_pictures(folder: Path) -> Iterator[Any]:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return (sample["jpg"] for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb"))


def energon_pictures(folder: Path) -> Iterator[Any]:
    """Needs `energon prepare`, which benchmarks.pictures has run."""
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_savable_loader, get_train_dataset, stateless
    from megatron.energon.flavors.crude import CrudeSample
    from megatron.energon.task_encoder.cooking import Cooker, basic_sample_keys

    class Pictures(DefaultTaskEncoder):
        decoder = None

        @staticmethod
        def cook(sample: dict[str, Any]) -> CrudeSample:
            image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            return CrudeSample(**basic_sample_keys(sample), image=image)

        cookers = [Cooker(stateless(cook))]  # noqa: RUF012 - energon looks for this name

        def batch(self, samples: list[Any]) -> Any:
            return samples[0]

    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Pictures(),
        repeat=False,
    )
    return (sample["image"] for sample in get_savable_loader(dataset))


def patches(pictures: Iterator[Any], processor: Any, at_once: int) -> Iterator[tuple[int, int]]:
    """(pictures, patches) of every call of the processor."""
    while batch := list(islice(pictures, at_once)):
        yield len(batch), len(processor(batch, return_tensors="pt")["pixel_values"])


def main(contender: str, folder: str, samples: str) -> None:
    import torch

    torch.set_num_threads(1)
    reader, processor_name, at_once = contender.split("+")
    if processor_name == "pil":
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil as Processor
    else:
        from transformers import Glm4vImageProcessor as Processor
    pictures = {"webdataset": webdataset_pictures, "energon": energon_pictures}[reader](Path(folder))
    made = patches(pictures, Processor(size=SIZE), int(at_once))
    done = counted = 0
    while done < WARM_UP:
        done += next(made)[0]
    began, done = time.process_time(), 0
    while done < int(samples):
        pictures_done, patches_done = next(made)
        done, counted = done + pictures_done, counted + patches_done
    print(json.dumps({"samples": done, "patches": counted, "seconds": time.process_time() - began}))


if __name__ == "__main__":
    main(*sys.argv[1:])
