"""Weights in S3 and on the Hub: the values of the local folder, no more bytes than needed, and one clear error.

`make test-full` runs this with s3fs and moto laid over .venv.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.parallel import ParallelConfig
from model.weights.table import weights
from tests.launch import ROOT, metrics, train
from tests.processes import Processes
from tests.reference import small_config
from tests.urls import ranks as work
from tests.urls.conftest import SERVICES, Service
from tests.urls.hub_server import GATED

LAYOUTS = {"TP2": ParallelConfig(tensor_model_parallel_size=2), "EP2": ParallelConfig(expert_model_parallel_size=2)}


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_read_only_their_slices(
    layout: str, service: Service, ranks: Processes, saved: Path, tmp_path: Path
) -> None:
    """Counted by the service: each rank reads the headers, its own rows, and whole rows of what is split by columns."""
    service.sent.clear()
    config, parallel = small_config("glm4v_moe"), LAYOUTS[layout]
    environments = [{**service.environment(f"rank{rank}"), "XDG_CACHE_HOME": str(tmp_path)} for rank in (0, 1)]
    arguments: dict[str, Any] = {"config": config, "parallel": parallel, "environments": environments}
    local = ranks.run(work.tensors, place=str(saved), **arguments)
    remote = ranks.run(work.tensors, place=service.url, **arguments)
    shapes = {weight.name: weight.shape for weight in weights(config)}
    files = list(saved.glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    for rank, (found, expected) in enumerate(zip(remote, local, strict=True)):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in found)
        rows = sum(held.nbytes * (1 if held.shape[1:] == shapes[name][1:] else 2) for name, held in found.items())
        sent = sum(count for (client, _), count in service.sent.items() if client == f"rank{rank}")
        assert sent == headers + rows
        assert sent < 0.9 * sum(file.stat().st_size for file in files)
    assert not getattr(service, "leaked", [])


def test_import_equals_that_of_the_folder(service: Service, saved: Path, tmp_path: Path) -> None:
    """Byte for byte, also where requests fail for a while. Its processes are forks of one that has read headers."""
    first, second, *_ = sorted(path.name for path in saved.glob("*.safetensors"))
    service.failures = {first: ["503"], second: ["cut", "503", "cut"]}
    assert convert(service, "user", str(saved), tmp_path / "local")[:2] == (0, "")
    assert convert(service, "user", service.url, tmp_path / "remote")[0] == 0
    assert not any(service.failures.values())
    files = [path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*") if path.is_file()]
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "remote" / file).read_bytes() == (tmp_path / "local" / file).read_bytes(), file


def test_run_starts_from_there(
    service: Service, saved: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in service.environment("user").items():
        monkeypatch.setenv(name, value)
    options = ["model.preset=", "train.steps=1", "optimizer.warmup_steps=0", "checkpoint.save_interval=0"]
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    losses = []
    for name, place in (("local", str(saved)), ("remote", service.url)):
        train(config_file, [*options, *layout, f"model.init_from={place}", f"train.output_dir={tmp_path / name}"])
        losses.append([line["loss"] for line in metrics(tmp_path / name)])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1


@pytest.mark.parametrize("service", ["hf"], indirect=True)
def test_revision_of_a_repository(service: Service, ranks: Processes, tmp_path: Path) -> None:
    environment = {**service.environment("user"), "XDG_CACHE_HOME": str(tmp_path)}
    assert ranks.run(work.outcome, place=f"{service.url}@main", environment=environment)[0] == ""


def convert(service: Service, client: str, place: str, out: Path) -> tuple[int, str]:
    """Import a folder as a user does. Return the exit status, and what stderr has."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.convert", "import", "--hf", place, "--out", str(out)],
        env={**os.environ, **service.environment(client), "XDG_CACHE_HOME": str(out.parent / "cache")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert no_secrets(done.stdout + done.stderr, service)
    return done.returncode, done.stderr


def no_secrets(text: str, service: Service) -> bool:
    return not any(secret in text for secret in service.secrets())


# --- what is refused --------------------------------------------------------------------------------------------------

# By client, place (empty: that of the folder), and what each service answers.
REFUSED = {
    "unknown key": (
        "stranger",
        "",
        {
            "s3": r"WeightsError: URL cannot be read: PermissionError: The AWS Access Key Id you provided",
            "hf": r"WeightsError: URL cannot be read: HfHubHTTPError: .*401.*Invalid credentials",
        },
    ),
    "no key": (
        "",
        "",
        {
            "s3": r"WeightsError: URL cannot be read: NoCredentialsError: Unable to locate credentials",
            "hf": r"ConfigError: URL has no config.json \(.*repository not found.*make sure you are authenticated",
        },
    ),
    "forbidden": (
        "forbidden",
        "",
        {
            "s3": r"WeightsError: URL cannot be read: PermissionError: Access Denied",
            "hf": r"WeightsError: URL cannot be read: HfHubHTTPError: .*403 Forbidden",
        },
    ),
    "gated": ("user", f"hf://{GATED}", {"hf": r"ConfigError: URL has no config.json \(.*repository not found"}),
    "no such revision": (
        "user",
        "hf://zai-org/tiny@v9",
        {"hf": r"ConfigError: URL has no config.json \(.*revision not"},
    ),
    "no such folder": (
        "user",
        "missing",
        {
            "s3": "ConfigError: URL has no config.json: a URL must",
            "hf": r"ConfigError: URL has no config.json \(.*not found",
        },
    ),
}


@pytest.mark.parametrize(
    ("service", "case"),
    [(name, case) for name in SERVICES for case in REFUSED if name in REFUSED[case][2]],
    indirect=["service"],
)
def test_refusal_is_one_line_without_a_secret(case: str, service: Service, ranks: Processes, tmp_path: Path) -> None:
    client, place, said = REFUSED[case]
    url = {"": service.url, "missing": service.missing}.get(place, place)
    environment = service.environment(client) if client else service.anonymous()
    found = ranks.run(work.outcome, place=url, environment={**environment, "XDG_CACHE_HOME": str(tmp_path)})[0]
    assert re.match(said[service.protocol].replace("URL", url, 1), found), found
    assert "\n" not in found
    assert no_secrets(found, service)


# How a service answers every request for a file, and what is said of the file.
FAILURES = {
    "503": r"StorageError: FILE cannot be read \(.*\), in 3 attempts within \d+ seconds: its storage fails",
    "cut": r"StorageError: FILE cannot be read \(.*\), in 3 attempts within \d+ seconds: its storage fails",
    "403": r"WeightsError: FILE cannot be read: (PermissionError: Access Denied|HfHubHTTPError: .*403 Forbidden)",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_file_that_cannot_be_read_is_named(
    failure: str, service: Service, ranks: Processes, saved: Path, tmp_path: Path
) -> None:
    shard = last_shard(saved)
    environment = {**service.environment("user"), "XDG_CACHE_HOME": str(tmp_path)}
    service.failures = {shard: [failure] * 1000}
    found = ranks.run(work.outcome, place=service.url, environment=environment)[0]
    service.failures = {}
    assert re.match(FAILURES[failure].replace("FILE", f"{service.url}/{shard}"), found), found
    assert "\n" not in found
    assert no_secrets(found, service)


def test_missing_file_is_named(service: Service, ranks: Processes, saved: Path, tmp_path: Path) -> None:
    shard = last_shard(saved)
    environment = {**service.environment("user"), "XDG_CACHE_HOME": str(tmp_path)}
    service.remove(shard)
    found = ranks.run(work.outcome, place=service.url, environment=environment)[0]
    service.replace(shard, (saved / shard).read_bytes())
    assert found.startswith(f"WeightsError: {service.url} lacks {shard}, which model.safetensors.index.json names")


def test_file_that_changes_while_it_is_read_is_named(
    service: Service, ranks: Processes, saved: Path, tmp_path: Path
) -> None:
    shard = last_shard(saved)
    ready, go = tmp_path / "ready", tmp_path / "go"
    content = (saved / shard).read_bytes()
    environment = {**service.environment("user"), "XDG_CACHE_HOME": str(tmp_path)}

    def change() -> None:
        while not ready.exists():
            time.sleep(0.01)
        service.replace(shard, content[:-1] + bytes([content[-1] ^ 1]))
        go.touch()

    thread = threading.Thread(target=change)
    thread.start()
    found = ranks.run(work.outcome, place=service.url, environment=environment, ready=ready, go=go)[0]
    thread.join()
    service.replace(shard, content)
    expected = f"WeightsError: {service.url}/{shard} has changed since it was opened (another version of the same size)"
    assert found.startswith(expected), found


def last_shard(folder: Path) -> str:
    return max(path.name for path in folder.glob("*.safetensors"))
