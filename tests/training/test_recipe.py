"""A configuration in layers: bases, several files, overrides; and what --print-config says about it."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from model.config import ConfigError
from sft.train import SftConfig
from training.config import RunConfig, load_config
from training.launch import main

pytestmark = pytest.mark.fast

COMPLETE = """
model: {preset: tiny_moe}
data: {tokenizer: t, sources: [{path: a}, {path: b, weight: 2}]}
train: {steps: 6, global_batch_size: 4, seq_length: 128, output_dir: out}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "base" / "complete.yaml", COMPLETE)
    return tmp_path


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def test_file_wins_over_its_bases_and_a_later_base_over_an_earlier_one(folder: Path) -> None:
    write(folder / "base" / "one.yaml", "base: complete.yaml\noptimizer: {lr: 1.0, eps: 0.1}\ntrain: {steps: 7}")
    write(folder / "base" / "two.yaml", "optimizer: {lr: 2.0}\ndata: {seed: 5, sources: [{path: c}]}")
    top = write(folder / "top.yaml", "base: [base/one.yaml, base/two.yaml]\ntrain: {seq_length: 256}")
    config = load_config(RunConfig, top)
    assert (config.optimizer.lr, config.optimizer.eps) == (2.0, 0.1)
    assert (config.train.steps, config.train.seq_length, config.data.seed) == (7, 256, 5)
    assert [source.path for source in config.data.sources] == ["c"]


def test_later_file_and_then_the_command_line_win(folder: Path) -> None:
    top = write(folder / "top.yaml", "base: base/complete.yaml\noptimizer: {lr: 1.0, eps: 0.1, beta1: 0.5}")
    over = write(folder / "over.yaml", "optimizer: {lr: 3.0, eps: 0.3}\ntrain: {output_dir: '${data.tokenizer}/run'}")
    config = load_config(RunConfig, [top, over], ["optimizer.eps=0.4"])
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.beta1) == (3.0, 0.4, 0.5)
    assert config.train.output_dir == "t/run"


def test_one_base_may_lie_under_two_files(folder: Path) -> None:
    for name in ("one", "two"):
        write(folder / "base" / f"{name}.yaml", "base: complete.yaml")
    top = write(folder / "top.yaml", "base: [base/one.yaml, base/two.yaml]")
    assert load_config(RunConfig, top).train.steps == 6


BROKEN = [
    # files, message with {} for the folder
    ({"top": "base: none.yaml"}, r"^{}/top.yaml: base none.yaml: there is no such file$"),
    ({"top": "base: ."}, r"^{}/top.yaml: base \.: this is a folder$"),
    ({"top": "base: 3"}, r"^{}/top.yaml: base=3: give the path of a file, or a list of paths$"),
    ({"top": "base: [a.yaml, 3]"}, r"^{}/top.yaml: base=\['a.yaml', 3\]: give the path"),
    ({"top": "base: ''"}, r"^{}/top.yaml: base=\[''\]: give the path"),
    ({"top": "base: top.yaml"}, r"^{0}/top.yaml: base top.yaml: the bases run in a circle: {0}/top.yaml -> {0}/top.ya"),
    (
        {"top": "base: a.yaml", "a": "base: b.yaml", "b": "base: ../{name}/a.yaml"},
        r"^{0}/b.yaml: base ../.*/a.yaml: the bases run in a circle: {0}/top.yaml -> {0}/a.yaml -> {0}/b.yaml -> {0}/a",
    ),
    ({"top": "base: a.yaml", "a": "[1, 2]"}, r"^{}/a.yaml: the file is \[1, 2\]: give its keys, each with a value$"),
    ({"top": "base: a.yaml", "a": "5"}, r"^{}/top.yaml: base a.yaml cannot be read: it holds no keys$"),
    ({"top": "base: a.yaml", "a": "train: ["}, r"^{}/a.yaml is not valid YAML: "),
    ({"top": "base: a.yaml", "a": "train: {{stepz: 3}}"}, r"^{}/a.yaml: unknown key 'train.stepz': did you mean train"),
    ({"top": "base: a.yaml", "a": "train: 3"}, r"^{}/a.yaml: train is 3: give its keys"),
    ({"top": "base: a.yaml", "a": "freeze: vision"}, r"^{}/a.yaml: freeze='vision': give a list"),
    ({"top": "base: a.yaml", "a": "optimizer: {{lr: fast}}"}, r"^{}/a.yaml: optimizer.lr: .*'fast'"),
    ({"top": "data: {{sources: [{{base: x}}]}}"}, r"^{}/top.yaml: unknown key 'data.sources\[\].base'"),
]


@pytest.mark.parametrize(("files", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_mistake_is_reported_in_one_line_with_the_file_it_stands_in(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        write(tmp_path / f"{name}.yaml", text.format(name=tmp_path.name))
    with pytest.raises(ConfigError, match=message.format(tmp_path)) as caught:
        load_config(RunConfig, tmp_path / "top.yaml")
    assert "\n" not in str(caught.value)


def test_base_is_not_a_key_of_the_command_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^unknown key 'base'"):
        load_config(RunConfig, folder / "base" / "complete.yaml", ["base=x.yaml"])


def test_mistake_between_keys_of_several_files_is_reported(folder: Path) -> None:
    over = write(folder / "over.yaml", "optimizer: {warmup_steps: 9}")
    with pytest.raises(ConfigError, match=r"optimizer.warmup_steps=9 must be below train.steps=6"):
        load_config(RunConfig, [folder / "base" / "complete.yaml", over])


AWKWARD = ["a: b # c", "'", '"', "two\nlines", "null", "1e-5", "on", "- x", " ", "é\u2028", "x" * 300]


def test_printed_configuration_is_the_same_configuration_and_says_where_values_come_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    top = write(folder / "top.yaml", "base: base/complete.yaml\noptimizer: {lr: 3.0e-5}\nfreeze: [vision]")
    sources = [{"path": path, "weight": 1 / 3, "name": str(number)} for number, path in enumerate(AWKWARD)]
    over = write(folder / "over.yaml", yaml.safe_dump({"data": {"sources": sources, "cache_dir": AWKWARD[3]}}))
    options = ["--config", str(top), "--config", str(over), "--print-config"]
    monkeypatch.setattr(sys, "argv", ["sft.train", *options, "model.init_from=here", "data.seed=7"])
    with pytest.raises(SystemExit) as ended:
        main(SftConfig, "")
    output = capsys.readouterr().out
    assert not ended.value.code
    printed = write(folder / "printed.yaml", output)
    before = load_config(SftConfig, [top, over], ["model.init_from=here", "data.seed=7"])
    assert asdict(load_config(SftConfig, printed)) == asdict(before)
    complete = f"{folder}/base/complete.yaml"
    for line in (
        f"  lr: 3.0e-05  # {top}",
        f"freeze: [vision]  # {top}",
        f"  steps: 6  # {complete}",
        f"  sources:  # {over}",
        "  seed: 7  # command line",
        "  seed: 1234  # default",
        "  beta2: 0.98  # default",  # fine-tuning's own
    ):
        assert f"\n{line}\n" in f"\n{output}", line
    assert re.search(rf"^  cache_dir: .*  # {over}$", output, re.MULTILINE)
    assert sorted(path.name for path in folder.iterdir()) == ["base", "over.yaml", "printed.yaml", "top.yaml"]
