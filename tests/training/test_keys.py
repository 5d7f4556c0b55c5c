"""Keys, their documentation and what is said about unknown ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from sft.train import SftConfig
from tests.launch import ROOT
from training.config import RunConfig
from training.keys import field_comments, keys_of, probable_keys

pytestmark = pytest.mark.fast


def names_of(schema: Any, prefix: str = "") -> list[str]:
    """Return the keys of a schema without its sections, by recursion over types."""
    names = []
    for item in fields(schema):
        kind = get_type_hints(schema)[item.name]
        if is_dataclass(kind):
            names += names_of(kind, f"{prefix}{item.name}.")
            continue
        names.append(prefix + item.name)
        for inner in filter(is_dataclass, get_args(kind)):
            names += names_of(inner, f"{prefix}{item.name}[].")
    return names


@pytest.mark.parametrize("schema", [RunConfig, SftConfig])
def test_every_key_has_a_meaning(schema: type) -> None:
    keys = [key for key in keys_of(schema) if not key.is_section]
    assert [key.name for key in keys] == names_of(schema)
    assert not [key.name for key in keys if not key.meaning]


def test_keys_have_the_defaults_of_their_stage() -> None:
    lr = {
        schema: {key.name: key.default for key in keys_of(schema)}["optimizer.lr"] for schema in (RunConfig, SftConfig)
    }
    assert lr == {RunConfig: 1e-4, SftConfig: 5e-6}


@dataclass
class Base:
    first: int = 1  # of the base
    second: str = "#"  # not the hash in the string


@dataclass
class Derived(Base):
    first: int = 2
    third: list[str] = field(default_factory=list)  # at the end of several lines
    # above the field,
    # on two lines
    fourth: float = 1.0
    fifth: int = 0


def test_comments_are_read_from_the_line_of_the_field_or_from_above() -> None:
    assert field_comments(Derived) == {
        "first": "of the base",
        "second": "not the hash in the string",
        "third": "at the end of several lines",
        "fourth": "above the field, on two lines",
    }


PROBABLE = [
    ("train.lr", ["optimizer.lr"]),
    ("seq_length", ["train.seq_length"]),
    ("model.seed", ["data.seed", "train.seed"]),
    ("data.batch_size", ["train.global_batch_size", "train.micro_batch_size"]),
    ("checkpoint.interval", ["checkpoint.save_interval"]),
    ("optimizer.warmup", ["optimizer.warmup_steps"]),
    ("parallel.tensor_model_paralel_size", ["parallel.tensor_model_parallel_size"]),
    ("optimiser", ["optimizer"]),
    ("data.sources[].wieght", ["data.sources[].weight"]),
    ("foo", []),
    ("train.foo", []),
    ("parallel.tp", []),
]


@pytest.mark.parametrize(("name", "expected"), PROBABLE, ids=[name for name, _ in PROBABLE])
def test_unknown_key_is_answered_with_what_was_probably_meant(name: str, expected: list[str]) -> None:
    assert probable_keys(name, keys_of(RunConfig)) == expected


@pytest.mark.parametrize(("entry", "schema"), [("pretrain.train", RunConfig), ("sft.train", SftConfig)])
def test_help_shows_the_launch_command_and_every_key(entry: str, schema: type) -> None:
    done = subprocess.run([sys.executable, "-m", entry, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"torchrun --nproc_per_node N -m {entry} --config configs/tiny/" in done.stdout
    assert ".yaml [dotted.key=value ...]\n" in done.stdout
    shown = " ".join(done.stdout.split())
    for key in keys_of(schema):
        if not key.is_section:
            assert f" {key.name}=" in shown
            assert key.meaning in shown
