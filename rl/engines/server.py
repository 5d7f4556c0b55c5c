"""One server of rollouts: what it is asked, what it answers, and how it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import requests

from common.urls import shown
from data_pipeline.encoding.tokenizer import GlmTokenizer
from model.config import ConfigError, GlmvConfig
from rl.engines.prompt_media import ServedPrompt
from rl.errors import EngineError

CONNECT_SECONDS = 10.0


class ServerGone(Exception):
    """A server does not answer, or ends a connection. Another one may answer the same request."""


class RequestFailed(Exception):
    """A server answers that it cannot do what it was asked."""


@dataclass(frozen=True)
class Draw:
    """One call of a server: the tokens that follow a prompt and the response so far.

    Attributes:
        prompt: The prompt.
        response: Tokens of the response so far.
        max_tokens: How many tokens may follow.
        seed: Of these tokens, in [0, 2**63).
        temperature: Divides the logits; 0 takes the most probable token.
        stop_ids: Tokens that end a response.
    """

    prompt: ServedPrompt
    response: tuple[int, ...]
    max_tokens: int
    seed: int
    temperature: float
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """What a server answers.

    Attributes:
        prompt_ids: The tokens that the server has read, media expanded.
        tokens: What it has drawn. If one of `stop_ids` ended it, that is the last.
        log_probs: Of `tokens`, one each.
        versions: The versions of the weights that drew them, in order, as the server names them.
    """

    prompt_ids: list[int]
    tokens: list[int]
    log_probs: list[float]
    versions: list[str]


@dataclass(frozen=True)
class Expected:
    """What a server must serve.

    Attributes:
        model: The policy's model.
        tokenizer: The run's tokenizer.
        max_length: Tokens that a prompt and its response may have together.
        temperature: Of sampling.
    """

    model: GlmvConfig
    tokenizer: GlmTokenizer
    max_length: int
    temperature: float


class Server(Protocol):
    """A running server.

    Attributes:
        address: Such as http://127.0.0.1:8000.
        answers_while_loading: Whether /health answers while weights are loaded, so that its silence means a hang.
    """

    address: str
    answers_while_loading: bool

    def check(self, expected: Expected) -> None:
        """Check that the server serves the policy's model and tokenizer.

        Raises:
            ServerGone: It does not answer.
            EngineError: It serves something else, or was started in another way than this project needs.
        """

    def is_healthy(self, seconds: float) -> bool:
        """Return whether the server answers within `seconds`."""

    def draw(self, draw: Draw, seconds: float) -> Drawn:
        """Draw tokens. Waits at most `seconds`.

        Raises:
            ServerGone, RequestFailed.
        """

    def load(self, folder: Path, version: str, seconds: float) -> None:
        """Let the server finish what it computes, and load weights. Waits at most about `seconds`.

        A call that still waits when the next one begins asks the server for nothing more.

        Args:
            folder: The weights.
            version: What the server calls them from now on.
            seconds: How long.

        Raises:
            ServerGone, RequestFailed.
        """


class JsonApi:
    """Requests with JSON bodies and answers.

    Attributes:
        address: Of the server, such as http://127.0.0.1:8000.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def get(self, path: str, seconds: float = CONNECT_SECONDS) -> Any:
        return self._call("GET", path, seconds)

    def post(self, path: str, body: Mapping[str, Any] | None = None, seconds: float = CONNECT_SECONDS) -> Any:
        return self._call("POST", path, seconds, body)

    def is_healthy(self, seconds: float) -> bool:
        """Return whether /health answers within `seconds`."""
        try:
            self.get("/health", seconds)
        except (ServerGone, RequestFailed):
            return False
        return True

    def _call(self, method: str, path: str, seconds: float, body: Mapping[str, Any] | None = None) -> Any:
        """Return the answer's JSON value, or None for an empty answer.

        Raises:
            ServerGone: There is no answer within `seconds`.
            RequestFailed: The answer is an error, or not JSON.
        """
        try:
            timeout = (min(CONNECT_SECONDS, seconds), seconds)
            with requests.Session() as session:
                session.trust_env = False  # a proxy for the internet does not know a cluster's own addresses
                answer = session.request(method, f"{self.address}{path}", json=body, timeout=timeout)
        except requests.Timeout:
            raise ServerGone(f"no answer within {seconds:.3g} s") from None
        except requests.RequestException as error:
            raise ServerGone(type(error).__name__) from None
        if answer.status_code != 200:
            raise RequestFailed(f"{path} answers {answer.status_code}: {_error_of(answer)}")
        try:
            return answer.json() if answer.content.strip() else None
        except ValueError:
            raise RequestFailed(f"{path} answers something else than JSON: {answer.text[:100]!r}") from None


def _error_of(answer: requests.Response) -> str:
    """Return the message of an error, as vLLM, SGLang and FastAPI write it."""
    try:
        content = answer.json()
        for key in ("error", "detail", "message"):
            content = content[key] if isinstance(content, dict) and key in content else content
        return " ".join(str(content).split())[:300]
    except ValueError:
        return " ".join(answer.text.split())[:300]


# --- what a server must serve -----------------------------------------------------------------------------------------

PROBE = "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich: 12/7=1.714…"  # text, digits, punctuation


def check_config(address: str, served: dict[str, Any], model: GlmvConfig) -> None:
    """Check that a served model is the policy.

    Args:
        address: Of the server.
        served: The content of its config.json, with what transformers has filled in.
        model: The policy's.

    Raises:
        EngineError: It is another model. The message names the first difference.
    """
    if different := _difference(served, model):
        raise EngineError(
            f"{shown(address)} serves another model: {different}; start it with the folder of the policy, or correct "
            "rollout.addresses"
        )


def _difference(served: dict[str, Any], model: GlmvConfig) -> str:
    """Return the first difference of a served model from the policy, in words."""
    theirs: dict[str, Any] = {"model_type": served.get("model_type")}
    if theirs["model_type"] == model.hf_type:
        try:
            theirs = _values(GlmvConfig.from_hf_dict(served, "its config.json"))
        except ConfigError as error:
            return str(error)
    for key, ours in _values(model).items():
        if theirs[key] != ours:
            return f"its {key} is {theirs[key]!r}, the policy's is {ours!r}"
    return ""


# What may differ without being another model: what training alone uses, and a length, of which --max-model-len decides.
_FREE = ("max_position_embeddings", "initializer_range", "pad_token_id")


def _values(model: GlmvConfig) -> dict[str, Any]:
    """Return all that makes a model what it is, by the names of config.json."""
    content = asdict(model)
    vision, text = content.pop("vision"), content.pop("decoder")
    return {
        "model_type": content.pop("hf_type"),
        **{f"text_config.{key}": value for key, value in text.items() if key not in _FREE},
        **{f"vision_config.{key}": value for key, value in vision.items()},
        **content,
    }


def check_tokens(address: str, tokenize: Any, tokenizer: GlmTokenizer) -> None:
    """Check that a server's tokenizer gives the run's ids.

    Args:
        address: Of the server.
        tokenize: Returns the server's ids of a text, in which the names of special tokens are special tokens.
        tokenizer: Of the run.

    Raises:
        EngineError: It does not.
    """
    special = tokenizer.special
    if tokenize(PROBE) != tokenizer.encode(PROBE) or tokenize("".join(special)) != list(special.values()):
        raise EngineError(
            f"{shown(address)} has another tokenizer than this run ({tokenizer.folder}): start the server with the "
            "policy's own folder"
        )


def check_length(address: str, served: int, max_length: int, option: str) -> None:
    """Check that a server reads prompts and responses as long as the run's. Raises EngineError."""
    if served < max_length:
        raise EngineError(
            f"{shown(address)} takes at most {served:,} tokens, and a prompt with its response may have "
            f"{max_length:,} in this run (train.seq_length): start it with {option} {max_length}"
        )
