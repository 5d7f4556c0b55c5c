"""Let SGLang's own classes read requests, in its environment: sglang_requests.py REQUESTS REPORT.

REQUESTS is a JSON object {"generate": [bodies], "load": [bodies], "tokenize": [bodies]}. REPORT becomes one of the same
form: what SGLang has understood of each body, or its error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sglang_weights  # type: ignore[import-not-found]

SAMPLING = ("max_new_tokens", "stop_token_ids", "temperature", "top_p", "ignore_eos", "sampling_seed")
GENERATE = ("input_ids", "image_data", "video_data", "return_logprob", "return_prompt_token_ids", "stream")
LOAD = ("model_path", "weight_version", "flush_cache", "abort_all_requests")


def main(requests: str, report: str) -> None:
    """Write what SGLang has understood."""
    sys.meta_path.insert(0, sglang_weights.StandIns())
    readers: dict[str, Callable[[Any], Any]] = {"generate": generate, "load": load, "tokenize": tokenize}
    asked = json.loads(Path(requests).read_text())
    understood = {kind: [tried(readers[kind], body) for body in bodies] for kind, bodies in asked.items()}
    Path(report).write_text(json.dumps(understood))


def tried(reader: Callable[[Any], Any], body: Any) -> Any:
    try:
        return reader(body)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def generate(body: Any) -> Any:
    """Read a body as the endpoint does: its contract, the request, and its sampling parameters."""
    from pydantic import TypeAdapter
    from sglang.srt.entrypoints.api_contract import generate_contract_error
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    if problem := generate_contract_error(body):
        raise ValueError(problem)
    request = TypeAdapter(GenerateReqInput).validate_python(body)
    request.normalize_batch_and_arguments()
    sampling = SamplingParams(**request.sampling_params)
    sampling.normalize(None)
    sampling.verify(2048)
    seen = {name: getattr(sampling, name) for name in SAMPLING}
    seen["stop_token_ids"] = sorted(seen["stop_token_ids"] or ())
    return {**{name: getattr(request, name) for name in GENERATE}, "is_single": request.is_single, **seen}


def load(body: Any) -> Any:
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    request = UpdateWeightFromDiskReqInput(**body)
    return {name: getattr(request, name) for name in LOAD}


def tokenize(body: Any) -> Any:
    from sglang.srt.entrypoints.openai.protocol import TokenizeRequest

    request = TokenizeRequest(**body)
    return {"prompt": request.prompt, "add_special_tokens": request.add_special_tokens}


if __name__ == "__main__":
    main(*sys.argv[1:])
