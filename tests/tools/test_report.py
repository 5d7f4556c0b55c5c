"""The page of tools.report, on run folders that were written by a run's own log, read back by an HTML parser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup
from typer.testing import CliRunner

from tools.report import app
from tools.report_charts import short_number
from training.metrics import RunLog, logger
from training.step import StepReport

pytestmark = pytest.mark.fast

HOSTILE = '<script>alert("x")</script>'


def write_run(folder: Path, steps: int, lr: float, *, experts: bool) -> Path:
    log = RunLog(folder, resumed_at=0, steps=100)
    logger.info("step %d of %d, from %s, on %d processes", 0, 100, "random weights, seed 1", 8)
    logger.info("step %d of %d, from %s, on %d processes", 3, 100, folder / "checkpoints" / "step_0000003", 4)
    for step in range(1, steps + 1):
        load = {"expert_load/max": 1.5, "expert_load/min": 0.5, "dead_experts": 2} if experts else {}
        report = StepReport(
            loss=5 / step if step != 2 else float("nan"),
            grad_norm=1.0,
            lr=lr,
            tokens=1000,
            padding_fraction=0.02,
            samples=3,
            images=2,
            patches=40,
            quarantined=0,
            domain_losses={"text": 4 / step, "ocr": 6 / step},
            moe=load,
            part_norms={"vision": 0.6, "decoder": 0.8},
        )
        measured = {
            **{"mfu": 0.4, "memory_gb": 70.5, "data_seconds": 0.1, "tokens/text": 600, "tokens/ocr": 400},
            **{"seconds/vision": 0.5, "seconds/decoder": 1.0, "tokens_total": 1000 * step, "eta_seconds": 7200.0},
        }
        log.step(step, report, 2.0, measured)
    log.quarantined(2, [{"reason": "bad_image", "detail": "", "shard": f"/data/{HOSTILE}.tar", "key": "a"}] * 3)
    log.close()
    config = {"train": {"steps": 100, "output_dir": str(folder)}, "optimizer": {"lr": lr}, "model": {"preset": "x"}}
    config["data"] = {"sources": [{"name": "ocr", "weight": 1.0 + experts}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def make_page(out: Path, *arguments: str | Path) -> tuple[str, BeautifulSoup]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(out)])
    assert result.exit_code == 0, result.output
    text = out.read_text()
    return text, BeautifulSoup(text, "html.parser")


def cells(page: BeautifulSoup, heading: str) -> list[list[str]]:
    """Return the rows of the table below a heading, with that of the column names."""
    found = page.find("h2", id=heading)
    assert found is not None
    table = found.find_next("table")
    assert table is not None
    return [[" ".join(cell.text.split()) for cell in row.find_all(["td", "th"])] for row in table.find_all("tr")]


def test_page_compares_runs_of_different_lengths(tmp_path: Path) -> None:
    long = write_run(tmp_path / "a" / "run", 90, 1e-4, experts=True)
    short = write_run(tmp_path / "b" / "run", 4, 3e-4, experts=False)
    with (short / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.')  # it is still being written
    (long / "validation.jsonl").write_text(json.dumps({"step": 50, "validation/loss": 2.5}) + "\n")
    text, page = make_page(tmp_path / "page.html", long, short)

    assert [one.text for one in page.select(".cards h3")] == ["a/run", "b/run"]
    facts = [dict(zip(card.select("dt"), card.select("dd"), strict=True)) for card in page.select(".cards .card")]
    first, second = ({name.text: fact.text for name, fact in one.items()} for one in facts)
    assert first["steps"] == "90 of 100"
    assert first["loss of the last steps"] == f"{(5 / 90 + 5 / 89) / 2:.4f}"
    assert first["validation loss"] == "2.5000"
    assert second["useful tokens"] == "4k"
    assert second["MFU"] == "40.0%"
    assert second["memory"] == "70.5 GB"
    assert second["restarts"] == "1"
    assert second["processes"] == "8 then 4"
    assert second["time left"] == "2 h"
    assert second["quarantined"] == "3"

    titles = [one.text for one in page.select(".charts h3")]
    for title in ("all domains", "ocr", "text", "all domains, held out", "learning rate", "gradient norm: vision"):
        assert title in titles
    for title in ("mixture", "expert load", "MFU", "where the time goes", "memory, GB"):
        assert title in titles
    assert "busiest expert: video tokens" not in titles  # no run has it
    assert len(page.select(".charts svg")) == len(titles)
    assert cells(page, "Configuration")[1:] == [
        ["data.sources.ocr.weight", "2.0", "1.0"],
        ["optimizer.lr", "0.0001", "0.0003"],
    ]
    assert cells(page, "Quarantine")[1][1:] == ["bad_image", "3", "3"]
    assert [row[2:4] for row in cells(page, "Starts")[1:]] == [["0", "8"], ["3", "4"]] * 2

    assert "<script" not in text
    assert not re.search(r'(?:src|href)="(?!#|data:)', re.sub(r'xlink:href="#', "", text))


def test_curves_can_be_drawn_over_tokens(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 4, 1e-4, experts=False)
    by_step, _ = make_page(tmp_path / "steps.html", run)
    by_tokens, page = make_page(tmp_path / "tokens.html", run, "--x", "tokens")
    assert "useful tokens" in by_tokens
    assert by_step != by_tokens
    assert page.find("h2", id="Configuration") is None  # there is nothing to compare


def test_run_before_its_first_step_and_a_run_with_an_infinite_loss(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0, 1e-4, experts=False)
    other = write_run(tmp_path / "other", 2, 1e-4, experts=False)
    _, page = make_page(tmp_path / "page.html", run, other)
    assert [one.text for one in page.select(".cards h3")] == ["run", "other"]


def test_run_whose_losses_are_all_infinite(tmp_path: Path) -> None:
    run = write_run(tmp_path / "$a$b$", 2, 1e-4, experts=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**line, "loss": None}) + "\n" for line in lines))
    text, _ = make_page(tmp_path / "page.html", run)
    assert "not finite" in text
    assert "$a$b$" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: nowhere is no folder: give the folder of a run (train.output_dir)"),
        (["."], "error: . has no metrics.jsonl: give the folder of a run (train.output_dir)"),
        (["run", "run"], "is named twice: name each run once"),
        (["run", "--out", "run/metrics.jsonl"], "--out run/metrics.jsonl is no page, and would be replaced"),
    ],
)
def test_what_is_no_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "report.html").exists()


def test_ticks_are_short() -> None:
    numbers = 0.5, 1500, 2e9, 0.0003, 0, -2000, 12, 0.00024
    assert [short_number(number) for number in numbers] == ["0.5", "1.5k", "2B", "3e-4", "0", "-2k", "12", "2.4e-4"]
