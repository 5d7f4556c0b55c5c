"""The engine over several servers: who computes what, and what happens when servers fail.

The servers are stand-ins that answer as vLLM was recorded to (recorded_vllm.py); tests/engines has real ones.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import Interrupted
from rl.engines.loading import load_watched
from rl.engines.prompt_media import ServedPrompt
from rl.engines.server import Draw
from rl.engines.servers import ServersEngine
from rl.engines.sglang import SglangServer
from rl.engines.vllm import drawn_of, generate_body
from rl.errors import EngineError
from rl.rollouts import Rollout, Sampling
from tests.hf_folders import save_weights
from tests.model.layout_cases import make_trainer
from tests.processes import Processes
from tests.rl.engines import server_cases
from tests.rl.engines.recorded_vllm import RecordedVllm, drawn_tokens, exchanges, recorded
from tests.rl.engines.server_cases import SAMPLING, make_engine, requests_of
from training.step import TrainStep


@pytest.fixture(scope="module")
def trainer(single_process: None, tmp_path_factory: pytest.TempPathFactory) -> TrainStep:
    return make_trainer("glm4v_moe", str(save_weights("glm4v_moe", tmp_path_factory.mktemp("policy"))), "")


@pytest.fixture
def server(tokenizer_folder: Path) -> Iterator[RecordedVllm]:
    server = RecordedVllm(tokenizer_folder)
    yield server
    server.close()


@pytest.fixture
def other(tokenizer_folder: Path) -> Iterator[RecordedVllm]:
    server = RecordedVllm(tokenizer_folder)
    yield server
    server.close()


@pytest.fixture
def engine_of(trainer: TrainStep, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., ServersEngine]:
    """Return a function that makes an engine over stand-ins, which have weights of version 7."""

    def make(*servers: RecordedVllm, run: str = "run", **options: Any) -> ServersEngine:
        engine = make_engine([each.address for each in servers], tokenizer_folder, tmp_path / run, **options)
        engine.publish(trainer, 7)
        return engine

    return make


def check_rollouts(rollouts: list[Rollout], names: list[str], group: int = 4) -> None:
    """Check the order of rollouts, and that each is what its seed draws."""
    assert [(each.prompt_id, each.number) for each in rollouts] == [(n, g) for n in names for g in range(group)]
    for each in rollouts:
        assert each.tokens.tolist() == drawn_tokens(each.seed, 8)
        np.testing.assert_allclose(each.log_probs, -each.tokens / 100, rtol=1e-6)
        assert (each.finish, each.forced, each.version) == ("ended", False, 7)


# --- the wire ---------------------------------------------------------------------------------------------------------


def test_requests_are_those_that_vllm_was_recorded_to_answer() -> None:
    """And what is read from the recorded answers is what they say."""
    for place, (exchange, response) in enumerate(
        zip(exchanges("/inference/v1/generate"), ((), (100, 101), ()), strict=True)
    ):
        body, answer = exchange["body"], exchange["answer"]
        sampling, choice = body["sampling_params"], answer["choices"][0]
        sent = body["token_ids"][: len(body["token_ids"]) - len(response)]
        read = answer["prompt_token_ids"][: len(answer["prompt_token_ids"]) - len(response)]
        prompt = ServedPrompt("a.tar/1", read, sent, tuple(part["url"] for part in body["content_parts"]), ())
        stops = tuple(sampling["stop_token_ids"])
        assert generate_body(Draw(prompt, response, sampling["max_tokens"], sampling["seed"], 1.0, stops)) == body
        drawn = drawn_of(answer)
        assert drawn.prompt_ids == answer["prompt_token_ids"]
        assert (drawn.tokens, drawn.versions) == (choice["token_ids"], ["3"])
        assert drawn.log_probs == [each["logprob"] for each in choice["logprobs"]["content"]]
        if place == 2:
            assert choice["finish_reason"] == "stop"
            assert drawn.tokens[-1] in stops


# --- work and failures ------------------------------------------------------------------------------------------------


def test_servers_share_the_work(
    engine_of: Callable[..., ServersEngine], server: RecordedVllm, other: RecordedVllm
) -> None:
    """A group stays with one server, and both get about as much."""
    names = [f"a.tar/{n}" for n in range(24)]
    for each in (server, other):
        each.generate = slowly(each, 0.01)
    engine = engine_of(server, other)
    check_rollouts(engine.generate(requests_of(names), SAMPLING), names)
    assert server.drawn + other.drawn == 96
    assert 32 <= server.drawn <= 64


def slowly(server: RecordedVllm, seconds: float) -> Callable[[Any], Any]:
    def draw(body: Any) -> Any:
        time.sleep(seconds)
        return server.draw(body)

    return draw


def refuses(server: RecordedVllm, prompt: list[int]) -> Callable[[Any], Any]:
    refused = exchanges("/inference/v1/generate", 400)[0]["answer"]
    return lambda body: (400, refused) if body["token_ids"] == prompt else server.draw(body)


def dies(server: RecordedVllm, after: int = 5) -> Callable[[Any], Any]:
    """Answer some requests; then the process is gone, as after kill -9."""

    def draw(body: Any) -> Any:
        if server.drawn < after:
            return server.draw(body)
        server.answers["/health"] = (0, None)
        time.sleep(0.05)  # connections break one after another
        return 0, None

    return draw


def hangs(server: RecordedVllm) -> Callable[[Any], Any]:
    """Answer five requests; then nothing, as after SIGSTOP."""

    def draw(body: Any) -> Any:
        server.hangs = server.drawn >= 5
        while server.hangs:
            time.sleep(0.05)
        return server.draw(body)

    return draw


def stalls(server: RecordedVllm) -> Callable[[Any], Any]:
    """Answer five requests; then /health alone, as when the process that computes hangs."""

    def draw(body: Any) -> Any:
        if server.drawn >= 5:
            time.sleep(6)
        return server.draw(body)

    return draw


def forgets(server: RecordedVllm) -> Callable[[Any], Any]:
    """Answer five requests; then with other weights, as when somebody starts the server again."""

    def draw(body: Any) -> Any:
        if server.drawn >= 5:
            server.version = "default"
        return server.draw(body)

    return draw


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (dies, "ConnectionError|no answer to /health"),
        (hangs, "no answer"),
        (stalls, "no answer within 2 s"),
        (forgets, "it draws with weights of version default, not 7 of run-"),
    ],
)
def test_requests_of_a_lost_server_go_to_the_other(
    failure: Callable[..., Any],
    reason: str,
    engine_of: Callable[..., ServersEngine],
    server: RecordedVllm,
    other: RecordedVllm,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = [f"a.tar/{n}" for n in range(12)]
    engine = engine_of(server, other)
    server.generate, other.generate = failure(server), slowly(other, 0.02)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        rollouts = engine.generate(requests_of(names), SAMPLING)
    check_rollouts(rollouts, names)
    assert time.monotonic() - start < 30  # of a deadline of 60
    assert len(caplog.messages) == 1, caplog.messages
    assert re.match(rf"rollouts: {server.address} is lost \(({reason})", caplog.messages[0])
    assert "rollouts go to 1 other server" in caplog.messages[0]
    assert engine.quarantined == {}
    server.hangs = False


def test_a_lost_server_takes_part_again_after_it_has_loaded_weights(
    engine_of: Callable[..., ServersEngine], server: RecordedVllm, other: RecordedVllm, trainer: TrainStep, caplog: Any
) -> None:
    engine = engine_of(server, other)
    server.generate = dies(server, after=0)  # however fast the other one is, this one gets a request
    engine.generate(requests_of(["a.tar/1", "a.tar/2", "a.tar/3"]), SAMPLING)
    engine.publish(trainer, 8)
    before = server.drawn
    server.generate = server.draw
    engine.generate(requests_of(["a.tar/1"]), SAMPLING)
    assert server.drawn == before  # it does not answer /health
    server.answers["/health"] = (200, "")
    caplog.clear()
    engine.publish(trainer, 9)
    assert caplog.messages == [f"rollouts: {server.address} takes part again"]
    for each in (server, other):
        each.generate = slowly(each, 0.02)
    rollouts = engine.generate(requests_of(["a.tar/1", "a.tar/2"]), SAMPLING)
    assert {each.version for each in rollouts} == {9}
    assert server.drawn > before


def test_without_servers_the_run_stops(engine_of: Callable[..., ServersEngine], server: RecordedVllm) -> None:
    engine = engine_of(server)
    server.generate = dies(server)
    with pytest.raises(EngineError, match=r"no server of rollouts is left \(http.*\): start the servers again"):
        engine.generate(requests_of(["a.tar/1", "a.tar/2", "a.tar/3"]), SAMPLING)


def test_the_deadline_ends_an_iteration(engine_of: Callable[..., ServersEngine], server: RecordedVllm) -> None:
    engine = engine_of(server, deadline=1.0)
    server.generate = slowly(server, 0.5)
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"rollouts have not ended after rollout\.deadline=1 seconds"):
        engine.generate(requests_of([f"a.tar/{n}" for n in range(24)]), SAMPLING)
    assert time.monotonic() - start < 3


def test_request_to_stop_ends_the_wait_for_answers(
    engine_of: Callable[..., ServersEngine], server: RecordedVllm
) -> None:
    """At once, however long the servers take; the next call draws what this one would have."""
    asked: list[float] = []

    def on_wait() -> None:
        if asked and time.monotonic() > asked[0]:
            raise Interrupted("the run was asked to stop")

    names = [f"a.tar/{n}" for n in range(24)]
    engine = engine_of(server, on_wait=on_wait)
    server.generate = slowly(server, 1.0)
    asked.append(time.monotonic() + 0.5)
    with pytest.raises(Interrupted):
        engine.generate(requests_of(names), SAMPLING)
    assert server.drawn <= 8  # of 96
    asked.clear()
    server.generate = server.draw
    check_rollouts(engine.generate(requests_of(names), SAMPLING), names)


def test_a_prompt_that_fails_twice_is_quarantined(
    engine_of: Callable[..., ServersEngine], server: RecordedVllm, other: RecordedVllm, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a.tar/1", "a.tar/2", "a.tar/3"]
    requests = requests_of(names)
    bad = requests[1].prompt.sample.input_ids.tolist()
    engine = engine_of(server, other)
    for each in (server, other):
        each.generate = refuses(each, bad)
    check_rollouts(engine.generate(requests, SAMPLING), ["a.tar/1", "a.tar/3"])
    assert list(engine.quarantined) == ["a.tar/2"]
    assert "maximum context length is 2048 tokens" in engine.quarantined["a.tar/2"]
    assert caplog.messages == [
        f"rollouts: quarantined a.tar/2, whose requests failed 2 times: {engine.quarantined['a.tar/2']}"
    ]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda ids: [*ids[:4], 34, 34, *ids[4:]], r"read 13 prompt tokens for a\.tar/1, this run 11"),
        (lambda ids: [*ids[:4], 34, *ids[5:]], r"read token 34 at position 4 of a\.tar/1, this run 106"),
    ],
)
def test_another_prompt_stops_the_run(
    read: Callable[[list[int]], list[int]], message: str, engine_of: Callable[..., ServersEngine], server: RecordedVllm
) -> None:
    def draw(body: Any) -> Any:
        status, answer = server.draw(body)
        return status, {**answer, "prompt_token_ids": read(answer["prompt_token_ids"])}

    engine = engine_of(server)
    server.generate = draw
    with pytest.raises(EngineError, match=message):
        engine.generate(requests_of(["a.tar/1"]), SAMPLING)


def test_a_response_in_which_the_weights_changed_is_not_taken(
    engine_of: Callable[..., ServersEngine], server: RecordedVllm, trainer: TrainStep
) -> None:
    def draw(body: Any) -> Any:
        status, answer = server.draw(body)
        answer["choices"][0]["weight_versions"] = [
            {"version": "7", "start": 0, "end": 2},
            {"version": "8", "start": 2, "end": 5},
        ]
        return status, answer

    engine = engine_of(server)
    engine.publish(trainer, 8)
    server.generate = draw
    with pytest.raises(EngineError, match="it draws with weights of version 7 and 8, not 8 of run-"):
        engine.generate(requests_of(["a.tar/1"]), SAMPLING)


def test_weights_of_another_run_do_not_draw(
    engine_of: Callable[..., ServersEngine], server: RecordedVllm, trainer: TrainStep
) -> None:
    """Also where both runs have come to the same iteration; the next publication puts it right."""
    engine = engine_of(server, run="ours")
    engine_of(server, run="theirs")
    with pytest.raises(EngineError, match=r"with weights of version 7 of theirs-.*, not 7 of ours-.*: another run"):
        engine.generate(requests_of(["a.tar/1"]), SAMPLING)
    engine.publish(trainer, 8)
    assert {each.version for each in engine.generate(requests_of(["a.tar/1"]), SAMPLING)} == {8}


def test_runs_may_share_a_folder_for_weights(
    engine_of: Callable[..., ServersEngine], server: RecordedVllm, trainer: TrainStep, tmp_path: Path
) -> None:
    """Each keeps its own two newest folders of weights, whatever the others publish."""
    engines = [engine_of(server, run=name, publish_dir=str(tmp_path / "shared")) for name in ("a/run", "b/run")]
    for version in (8, 9, 10):
        for engine in engines:
            engine.publish(trainer, version)
    folders = [sorted(path.name for path in of_run.iterdir()) for of_run in (tmp_path / "shared").iterdir()]
    assert folders == [["version_0000009", "version_0000010"]] * 2


def test_the_end_of_a_thought_is_inserted(engine_of: Callable[..., ServersEngine], server: RecordedVllm) -> None:
    """The answer is drawn by a second request, which continues the tokens so far with other random numbers."""
    engine = engine_of(server)
    sampling = Sampling(temperature=1.0, max_thinking_tokens=3, max_answer_tokens=8, force_answer=True)
    (request,) = requests_of(["a.tar/1"], group=1, thinks=True)
    (rollout,) = engine.generate([request], sampling)
    thought, answer = [body for path, body in server.requests if path == "/inference/v1/generate"]
    forced = rollout.tokens[rollout.inserted].tolist()
    assert answer["token_ids"] == [*thought["token_ids"], *drawn_tokens(0, 3), *forced]
    assert (thought["sampling_params"]["max_tokens"], answer["sampling_params"]["max_tokens"]) == (3, 8)
    assert thought["sampling_params"]["seed"] == 0
    assert answer["sampling_params"]["seed"] not in (0, 1, 2, 3)
    assert rollout.forced
    assert rollout.finish == "ended"
    assert rollout.tokens.tolist()[: 3 + len(forced)] == [*drawn_tokens(0, 3), *forced]


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_loaded_between_pause_and_resume(
    engine_of: Callable[..., ServersEngine], server: RecordedVllm, trainer: TrainStep, tmp_path: Path
) -> None:
    engine = engine_of(server)
    server.requests.clear()
    for version in (8, 9, 10):
        engine.publish(trainer, version)
    calls = [path for path, _ in server.requests if path != "/health"]
    recorded = [each["path"] for each in exchanges_of_load()]
    assert calls == recorded * 3
    loaded = [body["args"][0] for path, body in server.requests if path == "/collective_rpc"]
    assert loaded == [str(tmp_path / f"run/weights/version_00000{version:02}") for version in (8, 9, 10)]
    assert sorted(path.name for path in (tmp_path / "run/weights").iterdir()) == ["version_0000009", "version_0000010"]


def exchanges_of_load() -> list[dict[str, Any]]:
    paths = [each["path"] for each in recorded()]
    return recorded()[paths.index("/pause?mode=wait") : paths.index("/resume") + 1]


def test_a_server_that_does_not_load_is_lost(
    engine_of: Callable[..., ServersEngine], server: RecordedVllm, other: RecordedVllm, trainer: TrainStep, caplog: Any
) -> None:
    engine = engine_of(server, other)
    failed = exchanges("/collective_rpc", 500)[0]["answer"]
    server.answers["/collective_rpc"] = (500, failed)
    engine.publish(trainer, 8)
    assert len(caplog.messages) == 1
    assert "has no weights on the server's machine" in caplog.messages[0]
    assert "rollout.publish_dir" in caplog.messages[0]
    other.answers["/collective_rpc"] = (500, failed)
    with pytest.raises(EngineError, match=r"no server took the weights of version 9: .*rollout\.publish_dir"):
        engine.publish(trainer, 9)


def test_a_server_that_hangs_while_it_loads_is_lost_and_loads_nothing_old_later(
    engine_of: Callable[..., ServersEngine], server: RecordedVllm, other: RecordedVllm, trainer: TrainStep, caplog: Any
) -> None:
    """Not only at rollout.deadline; and when it continues, the load that was given up changes nothing more."""
    engine = engine_of(server, other, health_seconds=0.6)
    answer, continues = server.answer, threading.Event()

    def hang_at_pause(path: str, body: Any) -> Any:
        if path.startswith("/pause") and not caplog.messages:
            server.hangs = True
            continues.wait()
        return answer(path, body)

    server.answer = hang_at_pause  # type: ignore[method-assign]
    start = time.monotonic()
    engine.publish(trainer, 8)
    assert time.monotonic() - start < 10  # of a deadline of 60
    hanging = "no answer to /health within 0.6 s while it loads weights"
    assert caplog.messages == [f"rollouts: {server.address} is lost ({hanging})"]
    assert {each.version for each in engine.generate(requests_of(["a.tar/1"]), SAMPLING)} == {8}
    engine.publish(trainer, 9)  # it still hangs: nothing new to say
    assert len(caplog.messages) == 1
    server.hangs = False
    engine.publish(trainer, 10)
    assert caplog.messages[1:] == [f"rollouts: {server.address} takes part again"]
    continues.set()
    time.sleep(0.2)
    versions = [body["new_version"] for path, body in server.requests if path == "/update_weight_version"]
    assert [version.split()[0] for version in versions] == ["7", "10"]


def test_sglang_may_load_for_longer_than_its_health_is_awaited(tmp_path: Path) -> None:
    """Its /health draws a token, which waits for the weights: it answers 503 meanwhile."""
    loading = threading.Event()

    class Sglang(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503 if loading.is_set() else 200)
            self.end_headers()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            loading.set()
            time.sleep(0.5)
            loading.clear()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"success": True, "message": ""}).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Sglang) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        server = SglangServer(f"http://127.0.0.1:{http.server_port}")
        load_watched(server, tmp_path, "8 of run", seconds=30.0, health_seconds=0.1)
        assert server.is_healthy(5.0)
        http.shutdown()


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_all_processes_get_what_the_first_is_answered(
    fails: bool, two_processes: Processes, server: RecordedVllm, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Also while they wait for longer than the first process is silent, and when the servers are gone."""
    policy = save_weights("glm4v_moe", tmp_path / "policy")
    server.generate = dies(server) if fails else slowly(server, 0.1)
    found = two_processes.run(
        server_cases.draw_on_all,
        address=server.address,
        tokenizer=str(tokenizer_folder),
        folder=str(tmp_path),
        policy=str(policy),
    )
    assert found[0]["answer"] == found[1]["answer"]
    assert min(each["waits"] for each in found) >= (0 if fails else 2)
    if fails:
        assert found[0]["answer"].startswith("no server of rollouts is left")
    else:
        assert len(found[0]["answer"]) == 48
    assert [path for path, _ in server.requests].count("/resume") == 1
