"""SGLang's own classes take the requests of this project's client, and its own answer is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rl.engines.prompt_media import ServedPrompt
from rl.engines.server import Draw
from rl.engines.sglang import drawn_of, generate_body, load_body
from tests.engines.engine_folders import ENGINES, run

PROMPT = ServedPrompt("a.tar/1", [1, 2, 10, 34, 34, 11, 8], [1, 2, 10, 34, 11, 8], ("data:image/png;base64,AA==",), ())
TEXT = ServedPrompt("a.tar/2", [1, 2, 8], [1, 2, 8], (), ())
VIDEO = ServedPrompt("a.tar/3", [1, 12, 34, 13, 8], [1, 12, 35, 13, 8], (), ("data:video/mp4;base64,AA==",))


def understood(requests: dict[str, list[Any]], tmp_path: Path) -> dict[str, list[Any]]:
    given, report = tmp_path / "requests.json", tmp_path / "report.json"
    given.write_text(json.dumps(requests))
    run(ENGINES, "tests/engines/sglang_requests.py", given, report, path=str(ENGINES.parents[1] / "sglang"))
    return json.loads(report.read_text())


def test_sglang_reads_what_is_sent(tmp_path: Path) -> None:
    stops = (0, 7, 9, 34)
    draws = [Draw(prompt, (100, 101), 12, 2**63 - 1, 1.0, stops) for prompt in (PROMPT, TEXT, VIDEO)]
    bodies = {
        "generate": [*map(generate_body, draws), {"input_ids": [1, 2], "sampling_params": {"seed": 5}}],
        "load": [load_body(Path("run/weights/version_0000003"), "3 of run-ab")],
        "tokenize": [{"prompt": "a <|image|>", "add_special_tokens": False}],
    }
    found = understood(bodies, tmp_path)
    for draw, seen in zip(draws, found["generate"], strict=False):
        assert seen == {
            "input_ids": [*draw.prompt.sent_ids, 100, 101],
            "image_data": list(draw.prompt.images) or None,
            "video_data": list(draw.prompt.videos) or None,
            "return_logprob": True,
            "return_prompt_token_ids": True,
            "stream": False,
            "is_single": True,
            "max_new_tokens": 12,
            "stop_token_ids": [0, 7, 9, 34],
            "temperature": 1.0,
            "top_p": 1.0,
            "ignore_eos": True,
            "sampling_seed": 2**63 - 1,
        }
    assert "seed" in found["generate"][-1]["error"]  # vLLM's name of it
    assert found["load"] == [
        {
            "model_path": "run/weights/version_0000003",
            "weight_version": "3 of run-ab",
            "flush_cache": True,
            "abort_all_requests": False,
        }
    ]
    assert found["tokenize"] == [{"prompt": "a <|image|>", "add_special_tokens": False}]


@pytest.mark.parametrize("spans", [True, False])
def test_an_answer_of_sglang_is_read(spans: bool) -> None:
    """In the form that TokenizerManager writes."""
    about: dict[str, Any] = {
        "finish_reason": {"type": "stop", "matched": 9},
        "weight_version": "4",
        "output_token_logprobs": [[-1.5, 100, None], [-0.25, 9, None]],
    }
    if spans:
        about["weight_versions"] = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    drawn = drawn_of({"text": "", "output_ids": [100, 9], "prompt_token_ids": [1, 2, 8], "meta_info": about})
    assert (drawn.prompt_ids, drawn.tokens, drawn.log_probs) == ([1, 2, 8], [100, 9], [-1.5, -0.25])
    assert drawn.versions == (["3", "4"] if spans else ["4"])
    with pytest.raises(ValueError, match="abort"):
        drawn_of({"prompt_token_ids": [1], "meta_info": {**about, "finish_reason": {"type": "abort"}}})
