"""Prompts through the commands: built, looked at, counted, verified."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bs4 import BeautifulSoup

from data_pipeline.shards.prompt_facts import add_grades, facts_path
from tests.data_pipeline.inputs.records.test_prompt_formats import VERL, verl_row
from tests.tools.test_shard import run
from tests.tools.test_view import run as run_app
from tools.view import app as view_app

pytestmark = pytest.mark.fast


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [verl_row(number) for number in range(5)]
    rows[1]["reward_model"] = {"style": "rule", "ground_truth": " "}
    rows[2]["data_source"] = "docvqa"
    rows[3]["data_source"] = "misspelled"
    pq.write_table(pa.Table.from_pylist(rows, VERL), tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


SET = ("--set", "verifiers=hiyouga/geometry3k:exact,docvqa:exact,misspelled:exacd")


def test_prompts_are_built_counted_and_verified(table, tmp_path, tokenizer_folder):
    out = tmp_path / "out"
    shown = run("build", "--input", table, "--out", out, "--tokenizer", tokenizer_folder, *SET)
    assert "samples: 3, rejected: 2" in shown
    assert (
        "no prompt has the data source of --set verifiers=misspelled:exacd; there are 'docvqa', 'hiyouga/geo" in shown
    )
    rejected = {line["origin"]: line for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    assert [line["reason"] for line in rejected.values()] == ["bad_reference", "unknown_verifier"]
    assert rejected["train.parquet:2"]["detail"] == 'the text "reference" is empty: no answer would be right'
    assert "did you mean exact" in rejected["train.parquet:4"]["detail"]

    [tar] = out.glob("*.tar")
    add_grades(tar, {"00000-000000": (3, 4), "00000-000002": (1, 4)}, {"model": "m"})
    shown = run("stats", out)
    assert "rl 3 3 0" in shown
    assert "docvqa math exact 1 1" in shown
    assert "hiyouga/geometry3k math exact 2 2 2 50.0%" in shown
    assert "2 prompts ask the same as an earlier one, with the same images and videos" in shown
    assert "samples: 3" in run("verify", out, "--tokenizer", tokenizer_folder)
    facts_path(tar).write_bytes(b"")
    assert "unusable_facts" in run("verify", out, "--tokenizer", tokenizer_folder, expect=1)


def test_dry_run_checks_verifiers_and_names_every_column(table):
    shown = run("build", "--input", table, "--dry-run", *SET)
    assert "a sample of domain rl, from train.parquet:1" in shown
    assert "<|user|> <image 60x40>Find x.<|assistant|>" in shown
    assert "rejected as unknown_verifier: 1" in shown
    assert "column reward_model │ reference" in shown
    assert "extra_info │ stored, not used" in shown


def test_page_shows_how_answers_are_scored(table, tmp_path, tokenizer_folder):
    run("build", "--input", table, "--out", tmp_path / "out", "--tokenizer", tokenizer_folder, *SET)
    run_app(view_app, "shards", tmp_path / "out", "--tokenizer", tokenizer_folder, "--out", tmp_path / "page.html")
    page = BeautifulSoup((tmp_path / "page.html").read_text(), "lxml")
    first, *_ = page.select(".sample")
    assert len(first.select("img")) == 1
    assert first.select(".key.rl")
    facts = [span.text for span in first.select(".facts span")]
    assert {"learned 0", "reference 7", "verifier exact", "data_source hiyouga/geometry3k", "category math"} <= set(
        facts
    )
    assert not first.select(".tokens .learned")
    assert "".join(span.text for span in first.select(".tokens > span")).endswith("Find x.<|assistant|>\n")


def test_options_of_a_question_are_a_setting_that_the_verifier_must_have(tmp_path):
    ask = {"question": "Which is it? A. a cat B. a dog", "choices": ["a cat", "a dog"], "answer": "B"}
    lines = [{**ask, "verifier": "vqa"}, {**ask, "verifier": "ocr"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = run("build", "--input", tmp_path / "q.jsonl", "--dry-run", "--set", "domain=rl")
    assert "rejected as bad_reference: 1, first q.jsonl:2: ocr has no setting 'options'" in shown
    assert "field choices │ settings │ 1" in shown
