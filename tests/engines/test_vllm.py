"""vLLM answers prompts with text, images and videos to an export as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engines.engine_folders import (
    ENGINES,
    Prompt,
    exported_folder,
    frames_of,
    prompts,
    reference_answer,
    rendered,
    run,
)
from tests.hf_folders import VARIANTS
from tools.exported import Exported

NEW_TOKENS = 24
TOLERANCE = 1e-5  # of log-probabilities, in float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_vllm_answers_as_transformers(variant: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = exported_folder(variant, tokenizer_folder, tmp_path)
    exported = Exported.load(folder)
    asked = prompts()
    expected = [reference_answer(exported, prompt, NEW_TOKENS) for prompt in asked.values()]
    found = vllm_answers(folder, [request(exported, prompt, tmp_path / name) for name, prompt in asked.items()])
    for name, reference, engine in zip(asked, expected, found, strict=True):
        assert engine["prompt_ids"] == reference["prompt_ids"], name
        pairs = zip(engine["log_probs"], reference["log_probs"], strict=True)
        largest = max(abs(a - b) for a, b in pairs)
        print(f"{variant}, {name}: {len(engine['prompt_ids'])} tokens, log-probabilities differ by {largest:.2g}")
        assert largest <= TOLERANCE, name
        assert engine["answer_ids"] == reference["answer_ids"], name
        assert len(set(engine["answer_ids"])) > 3, f"{name}: the answer is the same few tokens again and again"


def request(exported: Exported, prompt: Prompt, folder: Path) -> dict[str, Any]:
    """Write the files of a prompt, and describe it for vllm_answers.py."""
    folder.mkdir()
    images = [folder / f"{number}.png" for number in range(len(prompt.images))]
    for file, data in zip(images, prompt.images, strict=True):
        file.write_bytes(data)
    videos = [frames_of(data, folder / f"{number}.npy") for number, data in enumerate(prompt.videos)]
    return {"text": rendered(exported, prompt), "images": [str(file) for file in images], "videos": videos}


def vllm_answers(folder: Path, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    given, written = folder.with_name("prompts.json"), folder.with_name("answers.json")
    given.write_text(json.dumps(requests))
    run(ENGINES, "tests/engines/vllm_answers.py", folder, given, written)
    return json.loads(written.read_text())
