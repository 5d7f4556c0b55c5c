"""vLLM as a server of rollouts: token ids in, token ids and their log-probabilities out.

What is used of it (tested with 0.32): /inference/v1/generate, which `--enable-scale-out` adds; /pause, /collective_rpc,
/reset_..._cache, /update_weight_version, /resume and /weight_checker, which exist with VLLM_SERVER_DEV_MODE=1; and
rl.engines.vllm_worker, which takes new weights. Anyone who reaches such a server can change what it serves: let it
listen on an address of a private network.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from common.urls import shown
from rl.engines.server import (
    Draw,
    Drawn,
    Expected,
    JsonApi,
    RequestFailed,
    ServerGone,
    check_config,
    check_length,
    check_tokens,
)
from rl.errors import EngineError

PAUSE, RESUME = "/pause?mode=wait", "/resume"
RESETS = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")
HOW_TO_START = (
    "start it as `python -m vllm.entrypoints.openai.api_server --enable-scale-out --worker-extension-cls "
    "rl.engines.vllm_worker.PolicyWorker ...` with VLLM_SERVER_DEV_MODE=1, as docs/rl.md shows"
)
CHECK_SECONDS = 60.0  # a busy server answers late


class VllmServer:
    """A client of one vLLM server. Several threads may use it at the same time.

    Attributes:
        address: Of the server, such as http://127.0.0.1:8000.
    """

    answers_while_loading = True

    def __init__(self, address: str) -> None:
        self._api = JsonApi(address)
        self.address = self._api.address
        self._loading = ""  # the version that it was asked to load last

    def check(self, expected: Expected) -> None:
        """Check that the server serves the policy's model and tokenizer. Raises ServerGone, EngineError."""
        try:
            served = self._api.get("/v1/models", CHECK_SECONDS)["data"][0]
            described = self._call_worker("describe_policy", seconds=CHECK_SECONDS)
            check_config(self.address, described["config"], expected.model)
            check_tokens(self.address, self._tokenize, expected.tokenizer)
            check_length(self.address, served["max_model_len"], expected.max_length, "--max-model-len")
            self._check_options(described, expected)
        except (RequestFailed, LookupError, TypeError) as error:
            problem = error if isinstance(error, RequestFailed) else "its answer is not vLLM's"
            raise EngineError(f"{shown(self.address)} cannot be used ({problem}): {HOW_TO_START}") from None

    def _check_options(self, described: dict[str, Any], expected: Expected) -> None:
        mode, wanted = described["logprobs_mode"], "processed_logprobs"
        if mode != wanted and (mode != "raw_logprobs" or expected.temperature not in (0, 1)):
            raise EngineError(
                f"{shown(self.address)} returns {mode}, which are not of the distribution at the temperature of "
                f"{expected.temperature:g}: start it with --logprobs-mode {wanted}"
            )
        if described["device"] == "cpu" and described["chunked_prefill"]:
            raise EngineError(
                f"{shown(self.address)} runs on a CPU, where vLLM 0.32 ends at a prompt with a seed that it reads in "
                "several chunks: start it with --no-enable-chunked-prefill"
            )

    def is_healthy(self, seconds: float) -> bool:
        return self._api.is_healthy(seconds)

    def draw(self, draw: Draw, seconds: float) -> Drawn:
        """Draw tokens. Raises ServerGone, RequestFailed."""
        answer = self._api.post("/inference/v1/generate", generate_body(draw), seconds)
        try:
            return drawn_of(answer)
        except (LookupError, TypeError, ValueError) as error:
            raise RequestFailed(f"/inference/v1/generate answers without {error}") from None

    def load(self, folder: Path, version: str, seconds: float) -> None:
        """Load weights between two requests. Raises ServerGone, RequestFailed.

        Nothing that was computed with the old weights may be used with the new ones: the server first finishes its
        requests, and forgets the keys, values and embeddings of prompts that it has kept.
        """
        deadline = time.monotonic() + seconds
        self._loading = version

        def post(path: str, body: dict[str, Any] | None = None) -> Any:
            if self._loading != version:
                raise ServerGone(f"it was asked to load {self._loading} meanwhile")
            return self._api.post(path, body, max(deadline - time.monotonic(), 1.0))

        post(PAUSE)
        post("/collective_rpc", worker_body("load_policy", str(folder)))
        for path in RESETS:
            answer = post(path)
            if isinstance(answer, dict) and answer.get("success") is False:
                raise RequestFailed(f"{path} did not succeed: requests are still running")
        post("/update_weight_version", {"new_version": version})
        post(RESUME)

    def checksums(self) -> dict[str, str]:
        """Return the checksum of each of the server's tensors, as its kernels use them. Raises as `draw`."""
        return self._api.post("/weight_checker", {"action": "checksum"}, CHECK_SECONDS)["checksums"]

    def _call_worker(self, method: str, *arguments: str, seconds: float) -> dict[str, Any]:
        """Call a method of PolicyWorker on all workers, and return what the first says."""
        return self._api.post("/collective_rpc", worker_body(method, *arguments), seconds)["results"][0]

    def _tokenize(self, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return self._api.post("/tokenize", body, CHECK_SECONDS)["tokens"]


def worker_body(method: str, *arguments: str) -> dict[str, Any]:
    """Return the body of a request to /collective_rpc: a method of PolicyWorker."""
    return {"method": method, "args": list(arguments)}


def generate_body(draw: Draw) -> dict[str, Any]:
    """Return the body of a request to /inference/v1/generate."""
    media = [{"type": "image_url", "url": url} for url in draw.prompt.images]
    media += [{"type": "video_url", "url": url} for url in draw.prompt.videos]
    return {
        "token_ids": [*draw.prompt.sent_ids, *draw.response],
        **({"content_parts": media} if media else {}),
        "sampling_params": {
            "temperature": draw.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "seed": draw.seed,
            "max_tokens": draw.max_tokens,
            "logprobs": 0,
            "stop_token_ids": list(draw.stop_ids),
            "ignore_eos": True,  # stop_token_ids alone decide
            "detokenize": False,
        },
        "return_token_ids": True,
    }


def drawn_of(answer: Any) -> Drawn:
    """Return the content of an answer of /inference/v1/generate. Raises LookupError, TypeError, ValueError."""
    (choice,) = answer["choices"]
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"an end: finish_reason is {choice['finish_reason']!r}")
    content = choice["logprobs"]["content"]
    if not content or [each["token_id"] for each in content] != choice["token_ids"]:
        raise ValueError("a log-probability for each token")
    return Drawn(
        prompt_ids=answer["prompt_token_ids"],
        tokens=choice["token_ids"],
        log_probs=[each["logprob"] for each in content],
        versions=[str(span["version"]) for span in choice["weight_versions"]],
    )
