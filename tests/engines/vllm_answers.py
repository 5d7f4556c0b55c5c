"""Answer prompts with vLLM, in its own environment: vllm_answers.py FOLDER PROMPTS ANSWERS.

FOLDER is a Hugging Face folder. PROMPTS is a JSON list of {"text", "images": [files], "videos": [[npy file, fps]]}.
ANSWERS becomes a JSON list of {"prompt_ids", "log_probs", "answer_ids"}: log_probs has one value for each token of the
prompt after the first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(folder: str, prompts: str, answers: str) -> None:
    """Write the answers to all prompts."""
    os.environ |= SETTINGS
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 2, "video": 1},
        generation_config="vllm",
        disable_log_stats=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=24, prompt_logprobs=0, ignore_eos=True)
    asked = [request(prompt) for prompt in json.loads(Path(prompts).read_text())]
    given = [answer(output) for output in engine.generate(asked, greedy, use_tqdm=False)]
    Path(answers).write_text(json.dumps(given))


def request(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt as vLLM takes it."""
    media: dict[str, Any] = {}
    if prompt["images"]:
        media["image"] = [Image.open(file) for file in prompt["images"]]
    if prompt["videos"]:
        media["video"] = [video(file, fps) for file, fps in prompt["videos"]]
    return {"prompt": prompt["text"], "multi_modal_data": media}


def video(file: str, fps: float) -> tuple[np.ndarray, dict[str, Any]]:
    """Return all frames of a video, of which vLLM chooses itself."""
    frames = np.load(file)
    return frames, {
        "fps": fps,
        "duration": len(frames) / fps,
        "total_num_frames": len(frames),
        "frames_indices": list(range(len(frames))),
        "video_backend": "opencv",
        "do_sample_frames": True,
    }


def answer(output: Any) -> dict[str, Any]:
    """Return the ids of a prompt, their log-probabilities, and the ids of the answer."""
    log_probs = [position[token].logprob for token, position in pairs(output)]
    return {
        "prompt_ids": list(output.prompt_token_ids),
        "log_probs": log_probs,
        "answer_ids": list(output.outputs[0].token_ids),
    }


def pairs(output: Any) -> list[tuple[int, Any]]:
    """Return each token of a prompt after the first, with what vLLM says of its position."""
    return list(zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
