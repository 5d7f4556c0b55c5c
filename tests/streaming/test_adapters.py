"""Adapters are merged and exported a block of rows at a time, from checkpoints of any layout."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta
from typer.testing import CliRunner

import streaming.limits
import tools.lora_output
from common import storage
from model.checkpoint_metadata import read_metadata
from model.config import GlmvConfig
from model.errors import CheckpointError, ConfigError
from model.hf_file_names import CHECKSUMS
from model.weights.folder import SafetensorsFolder
from tests.hf_folders import VARIANTS, save_weights, save_whole_folder
from tests.model.range_server import RangeServer
from tests.peft_reference import ALPHA, RANK, TARGETS, peft_model, save_adapters
from tests.processes import Processes
from tests.reference import published_tensors
from tests.streaming import adapter_cases
from tests.streaming.test_damage import ANYTHING, check
from tests.streaming.wide import save_wide
from tools.conversion import ConversionOptions, export_checkpoint, import_folder
from tools.convert import app
from tools.lora_output import export_lora, merge
from training.lora_base import base_fingerprint

ONE = ConversionOptions(processes=1)
WHOLE = {"glm4v_moe": "all", "glm4v": "all dense"}
LAYOUTS = {
    "glm4v_moe": ("", "TP2 SP EP2", "PP2 VPP2"),
    "glm4v": ("", "TP2 vision=tensor"),
}
CASES = [(variant, layout) for variant, layouts in LAYOUTS.items() for layout in layouts]
SIGNATURE = "sig=secret"


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def one() -> Iterator[Processes]:
    with Processes(1) as processes:
        yield processes


@pytest.fixture(scope="module")
def folders(one: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of both variants, PEFT's adapters for them, and what PEFT makes of both."""
    root = tmp_path_factory.mktemp("adapters")
    for variant in VARIANTS:
        save_whole_folder(variant, root / variant, seed=2)  # the model that peft_model has
        model = peft_model(variant, WHOLE[variant])
        torch.save(save_adapters(model, root / f"{variant}_peft"), root / f"{variant}_adapters.pt")
        merged = dict(published_tensors(model.merge_and_unload().named_parameters()))
        torch.save({name: tensor.detach() for name, tensor in merged.items()}, root / f"{variant}_merged.pt")
        save(one, root, variant, root / f"{variant}_checkpoint")
    return root


def save(processes: Processes, root: Path, variant: str, checkpoint: Path, **options: Any) -> Path:
    """Save PEFT's adapters as a run does."""
    arguments: dict[str, Any] = {
        "hf_files": str(root / variant),
        "init_from": str(root / variant),
        "checkpoint": str(checkpoint),
        "lora": {"rank": RANK, "alpha": ALPHA, "targets": TARGETS[WHOLE[variant]][0]},
        "adapters": str(root / f"{variant}_adapters.pt"),
    }
    processes.run(adapter_cases.save, **{**arguments, **options})
    return checkpoint


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, by the safetensors library."""
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def convert(*arguments: object) -> str:
    """Run tools.convert in one process; return its error, or an empty string."""
    return run(*arguments, "--processes", 1)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.stderr if result.exit_code else ""


def assert_nothing_is_left(out: Path) -> None:
    assert not out.exists()
    assert not list(out.parent.glob(".unfinished*"))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_checkpoint_of_any_layout_gives_what_peft_gives(
    variant: str, layout: str, folders: Path, pair: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming.limits, "LARGEST_BLOCK", 40_000)
    checkpoint = folders / f"{variant}_checkpoint"
    if layout:
        checkpoint = save(pair, folders, variant, tmp_path / "checkpoint", layout=layout)
    export_lora(checkpoint, tmp_path / "peft", options=ONE)
    found, expected = tensors_of(tmp_path / "peft"), tensors_of(folders / f"{variant}_peft")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        CHECKSUMS,
    }

    merge(checkpoint, tmp_path / "merged", max_shard_bytes=200_000, options=ONE)
    found, base = tensors_of(tmp_path / "merged"), tensors_of(folders / variant)
    expected = torch.load(folders / f"{variant}_merged.pt", weights_only=True)
    assert found.keys() == base.keys()
    assert any(not torch.equal(found[name], base[name]) for name in base)
    for name in base:
        torch.testing.assert_close(found[name], expected.get(name, base[name]), rtol=0, atol=1e-7)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 5
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (folders / variant / "tokenizer.json").read_bytes()


def test_sum_is_rounded_once(folders: Path, one: Processes, tmp_path: Path) -> None:
    """Of bfloat16 weights and float32 adapters, to half a unit in the last place of the exact sum."""
    save_weights("glm4v", tmp_path / "glm4v", dtype=torch.bfloat16)
    shutil.copy(folders / "glm4v_adapters.pt", tmp_path)
    save(one, tmp_path, "glm4v", tmp_path / "checkpoint")
    base, adapters = tensors_of(tmp_path / "glm4v"), torch.load(folders / "glm4v_adapters.pt", weights_only=True)
    for dtype in ("keep", "fp32"):
        merge(tmp_path / "checkpoint", tmp_path / dtype, dtype=dtype, options=ONE)
    found, wider = tensors_of(tmp_path / "keep"), tensors_of(tmp_path / "fp32")
    adapted = 0
    for name, weight in base.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(wider[name], found[name].float())
        a, b = (adapters.get(f"base_model.model.{name[:-7]}.lora_{factor}.weight") for factor in "AB")
        if a is None or b is None:
            assert torch.equal(found[name], weight), name
            continue
        exact = weight.double().numpy() + ALPHA / RANK * (b.double().numpy() @ a.double().numpy())
        error = np.abs(found[name].double().numpy() - exact)
        assert (error <= 2.0**-8 * np.abs(exact) + 1e-7).all(), name
        adapted += 1
    assert adapted == len(adapters) // 2


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_processes_and_memory_change_no_byte(one: Processes, tmp_path: Path) -> None:
    """Of matrices of 2 MiB and more, in blocks of 1 MiB and whole."""
    config = GlmvConfig.from_preset("tiny_moe")
    config = replace(config, decoder=replace(config.decoder, num_hidden_layers=2, moe_intermediate_size=4096))
    save_wide(config, tmp_path / "hf", 1000)
    one.run(
        adapter_cases.save,
        hf_files=str(tmp_path / "hf"),
        init_from=str(tmp_path / "hf"),
        checkpoint=str(tmp_path / "adapters"),
        lora={"rank": 8, "targets": ["all-linear", "experts.*"]},
        dtype=torch.bfloat16,
    )
    for command in ("merge", "export-lora"):
        results = []
        for processes in (1, 3):
            options = [command, "--processes", processes, "--checkpoint", tmp_path / "adapters"]
            for limit in ("100GiB", "least"):
                if limit == "least":
                    refused = run(*options, "--out", tmp_path / "none", "--max-memory", "1MiB")
                    least = re.findall(r"give ([\d,]+) MiB or more", refused)[0]
                    limit = f"{int(least.replace(',', '')) + 2 * processes}MiB"  # the memory of Python varies a little
                out = tmp_path / f"{command}_{processes}_{limit}"
                assert not run(*options, "--out", out, "--max-memory", limit)
                results.append(content(out))
        first, *others = results
        assert len(others) == 3
        assert all(other == first for other in others)


# --- base models ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "DELAYS", (0.01,))


def test_base_behind_a_url(folders: Path, quick_retries: None, tmp_path: Path) -> None:
    checkpoint = folders / "glm4v_checkpoint"
    merge(checkpoint, tmp_path / "local", options=ONE)
    with RangeServer(folders / "glm4v") as server:
        server.signature = SIGNATURE
        base = ["--base", f"{server.url}?{SIGNATURE}"]
        error = convert(
            "merge", "--checkpoint", checkpoint, "--out", tmp_path / "none", "--base", f"{server.url}?sig=no"
        )
        assert "403" in error
        assert "sig=no" not in error
        assert not convert("merge", "--checkpoint", checkpoint, "--out", tmp_path / "out", *base)
        assert content(tmp_path / "out") == content(tmp_path / "local")

        # The server fails for a while: what is written then stays, and the same command resumes.
        server.failures["model.safetensors"] = [""] * 8 + ["503"] * 1000
        error = convert("merge", "--checkpoint", checkpoint, "--out", tmp_path / "again", *base)
        assert error.startswith("error: ")
        assert "secret" not in error
        left = tmp_path / ".unfinished_again" / ".portions" / "identity.json"
        assert server.url in left.read_text()
        server.failures.clear()
        for folder in (tmp_path / ".unfinished_again", tmp_path / "cache", tmp_path / "out"):
            written = [path for path in folder.rglob("*") if path.is_file()]
            assert written
            assert not any(b"secret" in path.read_bytes() for path in written)
        assert not convert("merge", "--checkpoint", checkpoint, "--out", tmp_path / "again", *base)
    assert content(tmp_path / "again") == content(tmp_path / "local")


def test_base_is_a_checkpoint(folders: Path, one: Processes, tmp_path: Path) -> None:
    """Its tensors have checksums, which are compared."""
    import_folder(folders / "glm4v_moe", tmp_path / "base", ONE)
    checkpoint = save(one, folders, "glm4v_moe", tmp_path / "adapters", init_from=str(tmp_path / "base"))
    merge(checkpoint, tmp_path / "merged", options=ONE)
    merge(folders / "glm4v_moe_checkpoint", tmp_path / "expected", options=ONE)
    found, expected = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    file = max((tmp_path / "base" / "state").glob("*.distcp"), key=lambda path: path.stat().st_size)
    flip_a_bit_at(file, 3000)
    error = convert("merge", "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert re.search(rf"{file.name} is damaged: (tensor |what surrounds)", error)
    assert_nothing_is_left(tmp_path / "out")


def test_base_is_an_export_with_checksums(folders: Path, one: Processes, tmp_path: Path) -> None:
    import_folder(folders / "glm4v", tmp_path / "imported", ONE)
    export_checkpoint(tmp_path / "imported", tmp_path / "base", options=ONE)
    checkpoint = save(one, folders, "glm4v", tmp_path / "adapters", init_from=str(tmp_path / "base"))
    flip_a_bit_at(tmp_path / "base" / "model.safetensors", 2)
    arguments = ["merge", "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    last = SafetensorsFolder(tmp_path / "base").names()[-1]
    assert f"model.safetensors is damaged: tensor {last} has another checksum" in convert(*arguments)
    assert_nothing_is_left(tmp_path / "out")
    assert not convert(*arguments, "--verify", "sizes")


def flip_a_bit_at(path: Path, before_end: int) -> None:
    data = bytearray(path.read_bytes())
    data[-before_end] ^= 1
    path.write_bytes(data)


def test_base_with_other_tensors_is_refused(folders: Path, tmp_path: Path) -> None:
    """Whatever its fingerprint says."""
    shutil.copytree(folders / "glm4v_checkpoint", tmp_path / "adapters")
    state = tmp_path / "adapters" / "train_state.json"
    fingerprint = json.loads((folders / "glm4v_moe_checkpoint" / "train_state.json").read_text())["base"]
    state.write_text(json.dumps({**json.loads(state.read_text()), "base": fingerprint}))
    (tmp_path / "adapters" / "manifest.json").unlink()
    found = tools.lora_output.read_adapter_checkpoint(tmp_path / "adapters")
    with pytest.raises(ConfigError, match="is another base model"):
        tools.lora_output.find_base(found, str(folders / "glm4v"))
    base = tools.lora_output.open_base(found, folders / "glm4v_moe", "sizes")
    adapters = tools.lora_output.StoredAdapters(found.path, found.model, found.lora)
    with pytest.raises(ValueError, match=r"do not fit the model's config.json; tensors missing: .*gate_up_proj"):
        tools.lora_output.MergedWeights(base.source, adapters, base.dtype_of)


# --- bad adapters -----------------------------------------------------------------------------------------------------

FEW, MANY = 8, pytest.param(60, marks=pytest.mark.slow)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_damaged_adapters_are_refused(count: int, folders: Path, tmp_path: Path) -> None:
    rng = random.Random(count)
    whole, damaged, out = folders / "glm4v_moe_checkpoint", tmp_path / "adapters", tmp_path / "out"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.*"))
    for number in range(count):
        shutil.copytree(whole, damaged)
        damage, file = ANYTHING[number % len(ANYTHING)], rng.choice(files)
        damage(damaged / file, rng)
        for command in ("merge", "export-lora"):
            error = convert(command, "--checkpoint", damaged, "--out", out)
            check(error, file.name, f"{command} {damage.__name__}", number)
            assert_nothing_is_left(out)
        shutil.rmtree(damaged)


def cut_archives(step: Path) -> str:
    """Overwrite the ends of archives, where their directories are."""
    file = max((step / "state").glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"PK\x05\x06", b"PK\x00\x00"))
    return rf"{file.name} is damaged where lora\..*\.(a|b\d) is \("


def not_finite(step: Path) -> str:
    """Put infinity into the last values of a file, of which sizes tell nothing."""
    file = max((step / "state").glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    start = data.index(np.float32(0.5).tobytes())
    data[start : start + 4] = np.float32(np.inf).tobytes()
    file.write_bytes(data)
    return rf"not finite \(NaN or infinity\) in lora\..* \(.*{file.name}\); use another step"


@pytest.mark.parametrize("damage", [cut_archives, not_finite])
def test_damage_in_a_tensor_names_file_and_tensor(
    damage: Callable[[Path], str], folders: Path, one: Processes, tmp_path: Path
) -> None:
    """Where sizes alone are compared."""
    tensors = torch.load(folders / "glm4v_adapters.pt", weights_only=True)
    torch.save({name: torch.full_like(tensor, 0.5) for name, tensor in tensors.items()}, tmp_path / "half.pt")
    step = save(one, folders, "glm4v", tmp_path / "adapters", adapters=str(tmp_path / "half.pt"))
    message = damage(step)
    for command in ("merge", "export-lora"):
        error = convert(command, "--checkpoint", step, "--out", tmp_path / "out", "--verify", "sizes")
        assert error.count("\n") == 1
        assert re.search(message, error), error
        assert_nothing_is_left(tmp_path / "out")


FOREIGN = {
    "rank": (
        {"rank": 2 * RANK},
        r"other shapes than .*train_state\.json .*: lora\.\S*\.a is \[4, \d+\], not \[8, \d+\]",
    ),
    "more targets": (
        {"targets": ["all-linear", "experts.*"]},
        r"does not hold lora\.\S*experts\S*\.a, .*train_state\.js",
    ),
    "fewer targets": (
        {"targets": ["q_proj"]},
        r"holds adapters that the lora\.targets of .* do not name: lora\.\S*\.a",
    ),
    "other targets": (
        {"targets": ["wq"]},
        r"train_state\.json is of another model: lora\.targets: 'wq' matches nothing",
    ),
    "no rank": ({"rank": 0}, r"train_state\.json is damaged \(lora\.rank must be a positive number"),
    "no scale": ({"alpha": -1}, r"train_state\.json is damaged \(lora\.alpha=-1"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_adapters_are_refused(case: str, folders: Path, one: Processes, tmp_path: Path) -> None:
    said, message = FOREIGN[case]
    lora = {"rank": RANK, "alpha": ALPHA, "targets": ["all-linear"]}
    step = save(one, folders, "glm4v_moe", tmp_path / "adapters", lora=lora, adapters="", said=said)
    for command in ("merge", "export-lora"):
        error = convert(command, "--checkpoint", step, "--out", tmp_path / "out")
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert re.search(message, error), error
        assert_nothing_is_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-memory", "100MiB"], r"--max-memory 100MiB is too little: .* give [\d,]+ MiB or more"),
        (["--checksum", "md5"], "--checksum md5 is unknown: use xxh3 or sha256"),
        (["--verify", "no"], "--verify no is unknown"),
    ],
)
def test_options_that_cannot_work(options: list[str], message: str, folders: Path, tmp_path: Path) -> None:
    for command in ("merge", "export-lora"):
        arguments = ["--checkpoint", folders / "glm4v_checkpoint", "--out", tmp_path / "out", *options]
        assert re.search(message, convert(command, *arguments))
        assert_nothing_is_left(tmp_path / "out")


def test_checkpoints_of_an_earlier_version_have_no_manifest(folders: Path, one: Processes, tmp_path: Path) -> None:
    import_folder(folders / "glm4v", tmp_path / "base", ONE)
    save(one, folders, "glm4v", tmp_path / "adapters", init_from=str(tmp_path / "base"))
    merge(tmp_path / "adapters", tmp_path / "expected", options=ONE)
    for step in (tmp_path / "base", tmp_path / "adapters"):
        (step / "manifest.json").unlink()
        metadata = read_metadata(step / "state")
        metadata.storage_meta = StorageMeta(save_id="as torch writes it")
        (step / "state" / ".metadata").write_bytes(pickle.dumps(metadata))
    export_checkpoint(tmp_path / "base", tmp_path / "exported", options=ONE)
    state = tmp_path / "adapters" / "train_state.json"
    base = base_fingerprint(tmp_path / "base", adapter_cases.SEED)
    state.write_text(json.dumps({**json.loads(state.read_text()), "base": base}))
    merge(tmp_path / "adapters", tmp_path / "merged", options=ONE)
    export_lora(tmp_path / "adapters", tmp_path / "peft", options=ONE)
    assert content(tmp_path / "merged") == content(tmp_path / "expected")
    found, expected = tensors_of(tmp_path / "peft"), tensors_of(folders / "glm4v_peft")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpoint_without_a_tensor_is_refused(folders: Path, tmp_path: Path) -> None:
    """Of a whole model, as which adapters are taken for."""
    import_folder(folders / "glm4v", tmp_path / "whole", ONE)
    shutil.copy(folders / "glm4v_checkpoint" / "train_state.json", tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"does not hold lora\."):
        export_lora(tmp_path / "whole", tmp_path / "out", options=ONE)
    assert_nothing_is_left(tmp_path / "out")
