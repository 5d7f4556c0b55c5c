"""What is refused at start, with one message that says what to change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.tokenizer import train_tokenizer
from model.config import ConfigError
from rl.engines.servers_config import ServersConfig
from rl.errors import EngineError
from tests.rl.engines.recorded_vllm import RecordedVllm, exchanges
from tests.rl.engines.server_cases import make_engine


@pytest.fixture
def server(tokenizer_folder: Path) -> Iterator[RecordedVllm]:
    server = RecordedVllm(tokenizer_folder)
    yield server
    server.close()


def other_model(server: RecordedVllm) -> None:
    server.described["config"]["text_config"]["num_hidden_layers"] = 46


def other_type(server: RecordedVllm) -> None:
    server.described["config"]["model_type"] = "glm4v"


def other_vision(server: RecordedVllm) -> None:
    server.described["config"]["vision_config"]["hidden_size"] = 1536


def short(server: RecordedVllm) -> None:
    server.answers["/v1/models"][1]["data"][0]["max_model_len"] = 1024


def raw(server: RecordedVllm) -> None:
    server.described["logprobs_mode"] = "raw_logprobs"


def chunked(server: RecordedVllm) -> None:
    server.described["chunked_prefill"] = True


def without_worker(server: RecordedVllm) -> None:
    (failed,) = (each for each in exchanges("/collective_rpc", 500) if each["body"]["method"] == "nothing")
    answer = server.answer
    server.answer = lambda path, body: (500, failed["answer"]) if path == "/collective_rpc" else answer(path, body)  # type: ignore[method-assign]


def not_vllm(server: RecordedVllm) -> None:
    server.answer = lambda path, body: (404, {"detail": "Not Found"})  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_model,
            r"serves another model: its text_config\.num_hidden_layers is 46, the policy's is 4; start it with",
        ),
        (other_type, r"serves another model: its model_type is 'glm4v', the policy's is 'glm4v_moe'"),
        (other_vision, r"serves another model: its vision_config\.hidden_size is 1536, the policy's is 96"),
        (short, r"takes at most 1,024 tokens, .* 2,048 in this run .*: start it with --max-model-len 2048"),
        (raw, r"returns raw_logprobs, .* temperature of 0\.7: start it with --logprobs-mode processed_logprobs"),
        (chunked, "start it with --no-enable-chunked-prefill"),
        (without_worker, r"has no attribute 'nothing'.*--worker-extension-cls rl\.engines\.vllm_worker"),
        (not_vllm, r"cannot be used \(/v1/models answers 404: Not Found\): start it as `python -m vllm"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused(
    change: Callable[[RecordedVllm], None],
    message: str,
    server: RecordedVllm,
    tokenizer_folder: Path,
    tmp_path: Path,
    single_process: None,
) -> None:
    make_engine([server.address], tokenizer_folder, tmp_path, temperature=0.7)
    change(server)
    with pytest.raises(EngineError, match=message) as error:
        make_engine([server.address], tokenizer_folder, tmp_path, temperature=0.7)
    assert str(error.value).startswith(server.address)
    assert "\n" not in str(error.value)


def test_log_probabilities_without_a_temperature_may_be_raw(
    server: RecordedVllm, tokenizer_folder: Path, tmp_path: Path, single_process: None
) -> None:
    raw(server)
    make_engine([server.address], tokenizer_folder, tmp_path, temperature=1.0)


def test_another_tokenizer_is_refused(tokenizer_folder: Path, tmp_path: Path, single_process: None) -> None:
    """Of other text, and of the same text with two special tokens exchanged."""
    (tmp_path / "text").mkdir()
    (tmp_path / "special").mkdir()
    train_tokenizer(["Another text, which gives another tokenizer. 0123456789"] * 8, tmp_path / "text")
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    first, second = content["added_tokens"][4], content["added_tokens"][5]
    first["content"], second["content"] = second["content"], first["content"]
    vocabulary = content["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in (first, second) if token["content"] in vocabulary}
    (tmp_path / "special/tokenizer.json").write_text(json.dumps(content))
    for folder in ("text", "special"):
        server = RecordedVllm(tmp_path / folder)
        with pytest.raises(EngineError, match="has another tokenizer than this run"):
            make_engine([server.address], tokenizer_folder, tmp_path)
        server.close()


def test_a_server_that_does_not_answer_is_named(
    server: RecordedVllm, tokenizer_folder: Path, tmp_path: Path, single_process: None
) -> None:
    server.close()
    with pytest.raises(EngineError, match=rf"rollout\.addresses: {server.address} does not answer \(ConnectionError\)"):
        make_engine([server.address], tokenizer_folder, tmp_path)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"rollout\.engine=vllm needs servers: give rollout\.addresses, or"),
        (
            {"addresses": ["10.0.0.7:8000"]},
            r"rollout\.addresses: '10\.0\.0\.7:8000' is no address: write http://HOST:PORT",
        ),
        ({"addresses": ["http://a:1", "http://a:1"]}, r"rollout\.addresses names a server twice"),
        ({"addresses": ["http://a:1", "http://a:1/"]}, r"rollout\.addresses names a server twice"),
        ({"addresses": ["http://a:1/v1/"]}, r"give the server's address without /v1"),
        ({"start": 1}, r"rollout\.start needs rollout\.start_python"),
        (
            {"addresses": ["http://a:1"], "start_options": ["--seed", "1"]},
            r"rollout\.start_options=\['--seed', '1'\] has no effect, because rollout\.start is 0",
        ),
        ({"start": -1}, r"rollout\.start=-1: give 0 or a positive number"),
        ({"start": 1, "concurrency": 0}, r"rollout\.concurrency=0: give a positive number"),
        ({"start": 1, "deadline": float("nan")}, r"rollout\.deadline=nan: give a positive number"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServersConfig(**options).check("vllm")


@pytest.mark.fast
def test_only_vllm_is_started() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.start starts vLLM: start sglang yourself"):
        ServersConfig(start=1, start_python="python").check("sglang")
