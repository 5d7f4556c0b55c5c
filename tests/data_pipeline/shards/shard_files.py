"""The files of a sample, and a function that reads a shard back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.scan import scan_shard
from tests.data_pipeline.media_files import encoded, pattern

IMAGE, SECOND = encoded(pattern(40, 50), "JPEG"), encoded(pattern(50, 40, 1), "PNG")
RECORD = {"domain": "interleaved", "text": "<image> ü <image>"}
FILES = [("json", json.dumps(RECORD).encode()), ("0.jpg", IMAGE), ("1.png", SECOND)]
FILES_BY_NAME = dict(FILES)


def read_all(shard: Path) -> list[tuple[str, dict[str, Any], list[bytes], list[bytes]]]:
    """Return (key, record, images, videos) of every sample of a shard."""
    reader = ShardReader()
    scan = scan_shard(shard)
    assert not scan.rejected
    samples = [(sample.key, reader.read(str(shard), sample)) for sample in scan.samples]
    return [(key, raw.record, raw.images, raw.videos) for key, raw in samples]


def open_files(folder: Path) -> list[str]:
    """Return the files of a folder that this process has open, deleted ones included."""
    targets = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return [target for target in targets if target.startswith(f"{folder}/")]
