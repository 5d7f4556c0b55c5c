"""Other tools, from shards of images to patches. `benchmarks.images` runs this file with the interpreter of the peers.

    .venv-peers/bin/python benchmarks/image_peers.py CONTENDER FOLDER SAMPLES

CONTENDER is READER+PROCESSOR+IMAGES_PER_CALL, for example energon+pil+1 or webdataset+torchvision+8. Prints one line of
JSON: samples, patches and CPU seconds, measured after a few samples to warm up.
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


def webdataset_images(folder: Path) -> Iterator[Any]:
    """Yield the images of a folder of shards, decoded by Pillow."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return (sample["jpg"] for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb"))


def energon_images(folder: Path) -> Iterator[Any]:
    """Yield the same images by Energon. Needs `energon prepare`, which benchmarks.images runs."""
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_savable_loader, get_train_dataset, stateless
    from megatron.energon.flavors.crude import CrudeSample
    from megatron.energon.task_encoder.cooking import Cooker, basic_sample_keys

    class Images(DefaultTaskEncoder):
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
        task_encoder=Images(),
        repeat=False,
    )
    return (sample["image"] for sample in get_savable_loader(dataset))


def patches(images: Iterator[Any], processor: Any, per_call: int) -> Iterator[tuple[int, int]]:
    """Yield (images, patches) of every call of the processor."""
    while batch := list(islice(images, per_call)):
        yield len(batch), len(processor(batch, return_tensors="pt")["pixel_values"])


def main(contender: str, folder: str, samples: str) -> None:
    """Print the figures of one contender."""
    import torch

    torch.set_num_threads(1)
    reader, processor_name, per_call = contender.split("+")
    if processor_name == "pil":
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil as Processor
    else:
        from transformers import Glm4vImageProcessor as Processor
    images = {"webdataset": webdataset_images, "energon": energon_images}[reader](Path(folder))
    made = patches(images, Processor(size=SIZE), int(per_call))
    done = counted = 0
    while done < WARM_UP:
        done += next(made)[0]
    began, done = time.process_time(), 0
    while done < int(samples):
        images_done, patches_done = next(made)
        done, counted = done + images_done, counted + patches_done
    print(json.dumps({"samples": done, "patches": counted, "seconds": time.process_time() - began}))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
