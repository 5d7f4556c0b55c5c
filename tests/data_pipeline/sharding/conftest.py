"""The records that the tests of sharding build, and a build that nothing interrupted."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from data_pipeline.sharding import executors
from tests.data_pipeline.media_files import encoded, encoded_video, pattern
from tests.data_pipeline.sharding.builds import FILES, RECORDS, built, contents


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten files of a dozen records each: images, text, videos, and a few that cannot be used."""
    folder = tmp_path_factory.mktemp("records")
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(encoded(pattern(120 + 8 * number, 160, number)))
    (folder / "video.mp4").write_bytes(encoded_video(6))
    (folder / "cut.jpg").write_bytes(encoded(pattern(60, 90))[:-300])
    for file in range(FILES):
        lines = [
            {"domain": "image_text", "text": f"Image {n} of {file}.", "images": [f"{n % 6}.jpg"], "license": "own"}
            for n in range(RECORDS - 4)
        ]
        lines.append({"domain": "text", "text": "Words, many words. " * 20})
        lines.append({"domain": "video", "text": "A video.", "videos": ["video.mp4"]})
        lines.append({"domain": "image_text", "text": "cut", "images": ["cut.jpg"]})
        lines.append({"domain": "image_text", "text": "not mine", "images": ["../../etc/passwd"]})
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(records: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert built(records, out).tasks > FILES // 2
    return contents(out)


@pytest.fixture
def forked(monkeypatch):
    """Fork workers from this process, so that they start quickly."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(executors.multiprocessing, "get_context", lambda method: context)
