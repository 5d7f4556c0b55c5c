"""tools.difficulty: a server of another program's interface, and a model that transformers wrote, grade real shards."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline.shards.index import read_index
from data_pipeline.shards.prompt_facts import Grades, grades_path, read_grades
from tests.data_pipeline.media_files import encoded, pattern
from tests.hf_folders import save_whole_folder
from tests.launch import ROOT
from tests.rewards.test_judge import Running
from tests.training_data import build
from tools.difficulty import app
from tools.difficulty_answers import Answering, Asked, HfModel
from tools.exported import Exported

IMAGE = encoded(pattern(84, 112, seed=3), format="PNG")
BOX = "<|begin_of_box|>{}<|end_of_box|>"


def prompt(question: str, reference: str, **more: Any) -> dict[str, Any]:
    turn = {"role": "user", "content": question}
    return {"domain": "rl", "messages": [turn], "reference": reference, "verifier": "exact", **more}


RECORDS: list[dict[str, Any]] = [
    prompt("<image>How many dots?", "7", images=["media/0.png"]),
    prompt("Which letter?", "b", thinking=False),
    prompt("In a field?", "yes"),
    prompt("Too long?", "no"),
    prompt("What does it mean?", "peace", verifier="vqa"),
]
# What the server says to each question, one answer per sample.
ANSWERS = {
    "How many dots?": [f"<think>.</think>{BOX.format(7)}", f"<think>.</think>{BOX.format(8)}", "7", "<think>..."],
    "Which letter?": [BOX.format("b")] * 3 + [f"<think>.</think>{BOX.format('b')}"],
    "In a field?": [BOX.format("yes")] * 4,  # the thought is apart
    "What does it mean?": [f"<think>.</think>{BOX.format('quiet among all people')}"] * 4,
}


class Handler(BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible server does."""

    server: StandIn

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append({"path": self.path, **body})
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        if text == self.server.silent_on:
            time.sleep(60)
            return
        if text not in ANSWERS:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"the prompt is longer than the model's length")
            return
        apart = {"reasoning_content": "A field."} if text == "In a field?" else {}
        choices = [{"message": {"content": answer, **apart}} for answer in ANSWERS[text][: body["n"]]]
        data = json.dumps({"choices": choices[: self.server.at_most]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class StandIn(ThreadingHTTPServer):
    bodies: list[dict[str, Any]]
    at_most = 99
    silent_on = ""  # a question that gets no answer


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn(("127.0.0.1", 0), Handler) as server:
        server.bodies = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def shards(tmp_path: Path, tokenizer_folder: Path) -> Path:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "0.png").write_bytes(IMAGE)
    return build(tmp_path / "prompts", RECORDS, tokenizer_folder)


def run(*arguments: object, expect: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == expect, result.output
    return " ".join(result.output.split())


def grades_of(shards: Path) -> Grades:
    [tar] = shards.glob("*.tar")
    return read_grades(tar, read_index(tar).header.tar_fingerprint)


@pytest.mark.fast
def test_answers_of_a_server_become_grades(shards, server):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    command = (shards, "--url", url, "--model", "glm", "--samples", 4, "--max-tokens", 99)
    shown = run(*command)
    assert "3 of 5 prompts graded, 66.7% of 12 answers right" in shown
    assert "4 answers only a judge could score, 1 prompts need a judge, 1 prompts refused_by_server" in shown
    grades = grades_of(shards)
    keys = read_index(next(shards.glob("*.tar"))).table.column("key").to_pylist()
    assert grades.passes == dict(zip(keys[:3], (1, 3, 4), strict=True))
    assert set(grades.rollouts.values()) == {4}
    assert grades.graders == [
        {"model": "glm", "samples": 4, "temperature": 1.0, "max_tokens": 99, "seed": 0, "pass_score": 0.75}
    ]

    asked = {json.dumps(body["messages"][-1]["content"]): body for body in server.bodies}
    assert {body["path"] for body in server.bodies} == {"/v1/chat/completions"}
    [first] = [body for content, body in asked.items() if "How many dots?" in content]
    image, text = first["messages"][0]["content"]
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")) == IMAGE
    assert (text["text"], first["n"], first["top_p"], first["max_tokens"]) == ("How many dots?", 4, 1.0, 99)
    assert asked['"Which letter?"']["chat_template_kwargs"] == {"enable_thinking": False}
    assert len({body["seed"] for body in server.bodies}) == len(server.bodies) == 5

    before = grades_path(next(shards.glob("*.tar"))).read_bytes()
    assert "graded before by this model in this way" in run(*command)
    assert len(server.bodies) == 5
    assert grades_path(next(shards.glob("*.tar"))).read_bytes() == before
    run(shards, "--url", url, "--model", "other", "--samples", 2)
    assert set(grades_of(shards).rollouts.values()) == {6}


@pytest.mark.fast
def test_mistakes_are_named(shards, server, tmp_path, tokenizer_folder):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    assert "--hf DIR, or --url with --model" in run(shards, expect=2)
    assert "--model NAME" in run(shards, "--url", url, expect=2)
    server.at_most = 1
    assert "gave 1 answers where 8 were asked for (n)" in run(shards, "--url", url, "--model", "m", expect=2)
    assert not list(shards.glob("*.grades.arrow"))
    (tmp_path / "plain").mkdir()
    plain = build(tmp_path / "plain" / "text", [{"domain": "text", "text": "words"}], tokenizer_folder)
    assert "has no prompts (domain rl)" in run(plain, "--url", url, "--model", "m", expect=2)


def test_kill_loses_no_answer(shards, server, tmp_path):
    """The server does not answer the third prompt; the command is killed while it waits, and given again."""
    command = [shards, "--url", f"http://127.0.0.1:{server.server_port}/v1", "--model", "m", "--samples", 4]
    server.silent_on = "In a field?"
    arguments = map(str, [sys.executable, "-m", "tools.difficulty", *command, "--concurrency", 1])
    process = subprocess.Popen(list(arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not any(len(file.read_text().splitlines()) == 3 for file in shards.glob("*.jsonl") if "grading" in file.name):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    [file] = [file for file in shards.glob("*.jsonl") if "grading" in file.name]
    file.write_text(file.read_text() + '["a torn li')
    server.silent_on, server.bodies = "", []
    shown = run(*command, "--concurrency", 1)
    assert "3 of 5 prompts graded (2 before the stop), 66.7% of 12 answers right" in shown
    assert [body["messages"][-1]["content"] for body in server.bodies] == [
        "In a field?",
        "Too long?",
        "What does it mean?",
    ]
    assert not file.exists()
    assert sorted(grades_of(shards).passes.values()) == [1, 3, 4]


def test_rewards_are_those_of_a_run(shards, server, tmp_path):
    """The judge of the run's registry scores what no rule does, and its pass score says what is right."""
    judge = Running("1.0")
    registry, file = tmp_path / "rewards.yaml", tmp_path / "rl.yaml"
    registry.write_text(
        f"sources: {{prompts: {{verifier: vqa, judge: j}}}}\njudges: {{j: {{url: '{judge.url}', model: m}}}}\n"
    )
    keys = {
        "model": {"init_from": "model"},
        "data": {"tokenizer": "tokenizer", "sources": [{"path": str(shards)}]},
        "train": {"steps": 1, "seq_length": 1024, "output_dir": "run", "precision": "fp32"},
        "curriculum": {"pass_score": 0.5},
        "reward": {"registry": str(registry)},
    }
    file.write_text(json.dumps(keys))
    command = (shards, "--url", f"http://127.0.0.1:{server.server_port}/v1", "--model", "glm", "--samples", 4)
    assert "4 of 5 prompts graded, 75.0% of 16 answers right" in run(*command, "--config", file)
    assert len(judge.stop()) == 1 + 4  # first, whether it answers at all
    [grader] = grades_of(shards).graders
    assert grader["pass_score"] == 0.5
    assert "graded before" in run(*command, "--config", file)
    assert "give one of them" in run(*command, "--config", file, "--pass-score", 0.9, expect=2)
    registry.write_text(registry.read_text().replace("model: m", "model: n"))
    assert "judges.j: the model n at" in run(*command, "--config", file, expect=2)  # the judge has ended
    registry.write_text("sources: {prompts: {verifier: vqa}}")
    assert "3 of 5 prompts graded" in run(*command, "--config", file)  # other rewards are another grading


@pytest.mark.parametrize("variant", ["glm4v_moe", "glm4v"])
def test_model_of_transformers_answers(variant, shards, tmp_path):
    """A model with random weights knows nothing; its answers are the same each time, whatever is asked before."""
    hf = save_whole_folder(variant, tmp_path / "hf")
    form = "glm41v" if variant == "glm4v" else "glm45v"
    records = [{key: value for key, value in record.items() if key != "thinking"} for record in RECORDS[:3]]
    built = build(tmp_path / "own", records, hf, chat_form=form)
    shown = run(built, "--hf", hf, "--samples", 3, "--max-tokens", 8)
    assert "3 of 3 prompts graded, 0.0% of 9 answers right" in shown
    assert set(grades_of(built).passes.values()) == {0}

    from data_pipeline.shards.reader import ShardReader

    index = read_index(next(built.glob("*.tar")))
    asked = [
        Asked(f"{row}", ShardReader().read(str(index.file), index.sample(row))) for row in range(index.table.num_rows)
    ]
    model = HfModel(Exported.load(hf), Answering(samples=3, temperature=1.0, max_tokens=8, seed=1))
    answers = [said for _, said in model.answers(iter(asked))]
    assert [said for _, said in model.answers(iter(asked[::-1]))] == answers[::-1]
    assert all(isinstance(said, list) and len(set(said)) > 1 for said in answers)
    assert model.form == form
