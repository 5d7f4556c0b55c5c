"""tools.score on real shards with models that transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline.domains import build_sample
from data_pipeline.encoding.encode import encode_sample
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.sample import Sample
from tests.data_pipeline.media_files import encoded, pattern
from tests.hf_folders import VARIANTS, save_whole_folder
from tests.training_data import build
from tools.score import app
from tools.score_questions import questions_of

IMAGE = encoded(pattern(84, 112, seed=3), format="PNG")
BOXED = "It is <|begin_of_box|>12<|end_of_box|>."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def chat(answer: str, *, thought: str = "", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer, **({"reasoning_content": thought} if thought else {}), **more}
    return {
        "domain": "chat",
        "images": ["media/0.png"],
        "messages": [user("Before?"), {"role": "assistant", "content": "Yes."}, user("<image>What is it?"), message],
        **({"thinking": bool(thought)}),
    }


RECORDS: list[dict[str, Any]] = [
    {"domain": "ocr", "images": ["media/0.png"], "text": "TOTAL 12.50\nThank you"},
    {
        "domain": "grounding",
        "images": ["media/0.png"],
        "text": "<image> The cat [[102,80,540,910]] and two dogs [[1,2,30,40],[50,60,700,800]] sleep.",
    },
    {"domain": "grounding", "images": ["media/0.png"], "text": "<image> Nothing is marked here."},
    chat("A cat."),
    chat("<answer>It is <|begin_of_box|>12<|end_of_box|>.</answer>", thought="twelve"),
    chat(BOXED, thought="twelve"),
    chat("Here: [[10,20,30,40]]"),
    {"domain": "text", "text": "only words"},
]


@pytest.fixture(scope="module", params=VARIANTS)
def hf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole_folder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def shards(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "media").mkdir()
    (folder / "media" / "0.png").write_bytes(IMAGE)
    form = form_of(hf)
    return build(folder / "held_out", [as_form(record, form) for record in RECORDS], hf, chat_form=form)


def form_of(hf: Path) -> str:
    return "glm41v" if json.loads((hf / "config.json").read_text())["model_type"] == "glm4v" else "glm45v"


def as_form(record: dict[str, Any], form: str) -> dict[str, Any]:
    """GLM-4.1V has no form without thinking."""
    return {key: value for key, value in record.items() if key != "thinking"} if form == "glm41v" else record


@pytest.mark.fast
def test_prompt_and_expected_answer_are_the_sample_as_training_sees_it(hf: Path) -> None:
    tokenizer, budget, form = GlmTokenizer(hf), PixelBudget(), form_of(hf)
    kinds = []
    for record in RECORDS[:-1]:
        images = [IMAGE] if "images" in record else []
        sample = build_sample(as_form(record, form), images=len(images), videos=0, chat_form=form)
        whole = encode_sample(sample, images, [], tokenizer=tokenizer, budget=budget).input_ids.tolist()
        for question in questions_of(sample):
            prompt = Sample("prompt", question.prompt)
            ids = encode_sample(prompt, images, [], tokenizer=tokenizer, budget=budget).input_ids.tolist()
            assert ids == whole[: len(ids)]
            rest = "".join(tokenizer.names.get(token) or tokenizer.decode([token]) for token in whole[len(ids) :])
            assert question.expected in rest
            perfect = question.score(rest.removesuffix("<|user|>").removesuffix("<|endoftext|>"))
            assert perfect == dict.fromkeys(perfect, 1.0)
            kinds.append(question.kind)
    assert kinds == ["ocr", "boxes", "boxes", "text", "boxed", "boxed", "boxes"]


def test_scores_are_those_of_the_models_answers(hf: Path, shards: Path, tmp_path: Path) -> None:
    """The command twice, one question at a time and three at once; every sample is scored or counted."""
    contents = []
    for number, batch in enumerate((1, 3)):
        out = tmp_path / f"{number}.json"
        options = ["--out", str(out), "--rows", "--batch", str(batch), "--max-new-tokens", "5"]
        result = CliRunner().invoke(app, ["--hf", str(hf), "--shards", str(shards), *options])
        assert result.exit_code == 0, result.output
        assert "not scored: 1 samples: domain text" in result.output
        contents.append(json.loads(out.read_text()))
    one, three = contents
    assert one == three
    assert one["unscored"] == {"domain text": 1, "no expected answer": 1}
    assert {kind: scores["questions"] for kind, scores in one["scores"].items()} == {
        "boxed": 2, "boxes": 3, "ocr": 1, "text": 1,
    }  # fmt: skip
    assert len({row["answer"] for row in one["rows"]}) > 1
    for kind, scores in one["scores"].items():
        rows = [row["scores"] for row in one["rows"] if row["kind"] == kind]
        for name, mean in scores.items():
            assert name == "questions" or mean == pytest.approx(sum(row[name] for row in rows) / len(rows))


@pytest.mark.fast
def test_limit_and_mistakes(hf: Path, shards: Path, tmp_path: Path) -> None:
    def run(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["--hf", str(hf), "--shards", str(shards), "--max-new-tokens", "1", *options])
        return result.exit_code, result.output

    out = tmp_path / "scores.json"
    assert run("--limit", "2", "--out", str(out))[0] == 0
    content = json.loads(out.read_text())
    assert "rows" not in content
    assert sum(scores["questions"] for scores in content["scores"].values()) == 2  # samples 0 and 4
    assert run("--rows") == (2, "error: --rows writes into the file of --out: add --out scores.json\n")
    code, output = run("--out", str(tmp_path / "none" / "scores.json"))
    assert (code, output.startswith("error: --out ")) == (2, True)
    assert run("--shards", "nowhere")[0] == 2


@pytest.mark.fast
def test_shards_without_anything_to_score_are_an_error(hf: Path, tmp_path: Path) -> None:
    text = build(tmp_path / "text", RECORDS[-1:], hf, chat_form=form_of(hf))
    result = CliRunner().invoke(app, ["--hf", str(hf), "--shards", str(text)])
    assert result.exit_code == 2
    assert "error: no sample of --shards has an expected answer that can be scored: give other shards" in result.output
