"""SGLang as a server of rollouts, over its own endpoints. Not run: there was no machine for an SGLang server.

What is used of it (read in 0.5.23): /generate with token ids, /update_weights_from_disk, /model_info, /server_info and
/tokenize. The tests let SGLang's own classes read what is sent here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.urls import shown
from rl.engines.server import Draw, Drawn, Expected, JsonApi, RequestFailed, check_length, check_tokens
from rl.errors import EngineError

CHECK_SECONDS = 60.0  # a busy server answers late


class SglangServer:
    """A client of one SGLang server. Several threads may use it at the same time.

    Attributes:
        address: Of the server, such as http://127.0.0.1:30000.
    """

    answers_while_loading = False  # /health draws a token (http_server.health_generate), for which loading must end

    def __init__(self, address: str) -> None:
        self._api = JsonApi(address)
        self.address = self._api.address

    def check(self, expected: Expected) -> None:
        """Check that the server serves the policy's type of model and tokenizer. Raises ServerGone, EngineError.

        SGLang does not tell the sizes of its model: loading weights of other sizes fails.
        """
        try:
            served = self._api.get("/model_info", CHECK_SECONDS)["model_type"]
            longest = self._api.get("/server_info", CHECK_SECONDS)["max_req_input_len"]
            check_tokens(self.address, self._tokenize, expected.tokenizer)
        except (RequestFailed, LookupError, TypeError) as error:
            problem = error if isinstance(error, RequestFailed) else "its answer is not SGLang's"
            raise EngineError(f"{shown(self.address)} cannot be used ({problem}): is it an SGLang server?") from None
        if served != expected.model.hf_type:
            raise EngineError(
                f"{shown(self.address)} serves another model: its model_type is {served!r}, the policy's is "
                f"{expected.model.hf_type!r}; start it with the folder of the policy"
            )
        check_length(self.address, longest, expected.max_length, "--context-length")

    def is_healthy(self, seconds: float) -> bool:
        return self._api.is_healthy(seconds)

    def draw(self, draw: Draw, seconds: float) -> Drawn:
        """Draw tokens. Raises ServerGone, RequestFailed."""
        answer = self._api.post("/generate", generate_body(draw), seconds)
        try:
            return drawn_of(answer)
        except (LookupError, TypeError, ValueError) as error:
            raise RequestFailed(f"/generate answers without {error}") from None

    def load(self, folder: Path, version: str, seconds: float) -> None:
        """Load weights between two requests: SGLang finishes those that run. Raises ServerGone, RequestFailed."""
        answer = self._api.post("/update_weights_from_disk", load_body(folder, version), seconds)
        if not answer["success"]:
            raise RequestFailed(f"/update_weights_from_disk: {answer['message']}")

    def _tokenize(self, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return self._api.post("/tokenize", body, CHECK_SECONDS)["tokens"]


def generate_body(draw: Draw) -> dict[str, Any]:
    """Return the body of a request to /generate."""
    return {
        "input_ids": [*draw.prompt.sent_ids, *draw.response],
        **({"image_data": list(draw.prompt.images)} if draw.prompt.images else {}),
        **({"video_data": list(draw.prompt.videos)} if draw.prompt.videos else {}),
        "sampling_params": {
            "temperature": draw.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "sampling_seed": draw.seed,
            "max_new_tokens": draw.max_tokens,
            "stop_token_ids": list(draw.stop_ids),
            "ignore_eos": True,
        },
        "return_logprob": True,
        "return_prompt_token_ids": True,
    }


def load_body(folder: Path, version: str) -> dict[str, Any]:
    """Return the body of a request to /update_weights_from_disk."""
    return {"model_path": str(folder), "weight_version": version, "flush_cache": True}


def drawn_of(answer: Any) -> Drawn:
    """Return the content of an answer of /generate. Raises LookupError, TypeError, ValueError."""
    about = answer["meta_info"]
    if about["finish_reason"]["type"] not in ("stop", "length"):
        raise ValueError(f"an end: finish_reason is {about['finish_reason']!r}")
    drawn = about["output_token_logprobs"]  # [log-probability, token, text] of each token, the last one included
    if not drawn:
        raise ValueError("tokens")
    return Drawn(
        prompt_ids=answer["prompt_token_ids"],
        tokens=[token for _, token, *_ in drawn],
        log_probs=[log_prob for log_prob, *_ in drawn],
        versions=[
            str(span["version"]) for span in about.get("weight_versions") or [{"version": about["weight_version"]}]
        ],
    )
