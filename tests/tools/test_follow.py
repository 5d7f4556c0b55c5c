"""tools.convert export --follow: the checkpoints of a run are exported while it trains, whatever ends the export."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from model.checkpoint import TrainState
from model.config import GlmvConfig
from model.weights.folder import SafetensorsFolder
from model.weights.table import hf_shapes
from tests.hf_folders import save_whole_folder
from tests.launch import ROOT, finish, start
from tools.comparison import compare_files, compare_tensors, open_sides
from tools.convert import app


@contextmanager
def following(run: Path, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tools.convert", "export", "--follow", str(run), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--poll-seconds", "0.05", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen[str], timeout: float = 120) -> str:
    return process.communicate(timeout=timeout)[0]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def exports(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name.startswith("step_"))


def assert_equal(a: Path, b: Path) -> None:
    assert not compare_tensors(*open_sides(a, b))
    assert not list(compare_files(a, b))


def test_checkpoints_of_a_run_are_exported_while_it_trains(config_file: Path, tmp_path: Path) -> None:
    """Only two checkpoints are kept at a time. The run is not disturbed, and the exports are whole."""
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    with following(run, out) as follower:
        overrides = ["checkpoint.save_interval=1", "checkpoint.keep_last=2", "train.steps=5"]
        launcher = start(config_file, overrides, processes=1)
        output = finish(launcher)
        assert launcher.returncode == 0, output
        said = ended(follower)
    assert follower.returncode == 0, said
    assert "the run is complete at step 5" in said
    assert exports(out)[-2:] == ["step_0000004", "step_0000005"]
    for name in exports(out):
        assert f"exported {name} in " in said
        assert set(SafetensorsFolder(out / name).names()) == set(hf_shapes(GlmvConfig.from_preset("tiny_moe")))
    removed = {f"step_{step:07d}" for step in range(1, 6)} - set(exports(out))
    for name in removed:
        assert f"skipped {name}" in said or name not in said  # came and went between two looks
    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "tools.convert", "export", "--checkpoint", str(run), "--out", str(alone)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_equal(alone, out / "step_0000005")
    first, last = (load_file(out / name / "model.safetensors") for name in exports(out)[-2:])
    assert any(not first[name].equal(last[name]) for name in first)


# --- what ends an export ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, with three checkpoints."""
    root = tmp_path_factory.mktemp("ended")
    save_whole_folder("glm4v_moe", root / "hf")
    command = [sys.executable, "-m", "tools.convert", "import", "--hf", str(root / "hf"), "--out", str(root / "given")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for step in (2, 4, 6):
        shutil.copytree(root / "given", root / f"run/checkpoints/step_{step:07d}")
    (root / "run/checkpoints/latest").write_text("step_0000006\n")
    set_state(root / "run", "complete")
    return root / "run"


def set_state(run: Path, state: str) -> None:
    (run / "state.json").write_text(json.dumps({"state": state, "step": 6, "steps": 6, "reason": ""}))


@pytest.fixture
def run(ended_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ended_run, tmp_path / "run")


def test_killed_export_leaves_no_half_folder_and_continues(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with following(run, out) as follower:
        wait_for(lambda: (out / ".unfinished_step_0000004").is_dir(), follower)
        follower.send_signal(signal.SIGKILL)
        follower.wait()
    assert exports(out) == ["step_0000002"]
    written = (out / "step_0000002/model.safetensors").stat().st_mtime_ns
    (out / ".unfinished_step_0000001").mkdir()  # of a checkpoint that is gone
    with following(run, out) as follower:
        said = ended(follower)
    assert follower.returncode == 0, said
    assert [line.split(" in ")[0] for line in said.splitlines()[:-1]] == [
        "exported step_0000004",
        "exported step_0000006",
    ]
    assert (out / "step_0000002/model.safetensors").stat().st_mtime_ns == written
    assert sorted(path.name for path in out.iterdir()) == ["follow.json", "follow.lock", *exports(out)]
    for name in exports(out):
        assert_equal(out / name, out / "step_0000002")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_ends_the_export_and_removes_what_is_half_written(
    number: signal.Signals, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    set_state(run, "running")
    with following(run, out) as follower:
        wait_for(lambda: (out / ".unfinished_step_0000004").is_dir(), follower)
        follower.send_signal(number)
        said = ended(follower)
    assert follower.returncode == 75
    assert said.splitlines()[-1] == f"stopped by {number.name}; the same command continues"
    assert exports(out) == ["step_0000002"]
    assert not list(out.glob(".unfinished*"))


REMOVED = """
import shutil, sys, threading, time
from pathlib import Path
from tools.conversion import export_checkpoint
from tools.follow import follow

run, out, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def remove(checkpoint):  # as checkpoint.keep_last does
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(".unfinished_" + checkpoint.name)))

def remove_when_writing_has_begun(checkpoint, target):
    while not list((target.parent / f".unfinished_{target.name}").glob("*.safetensors")):
        time.sleep(0.0005)
    remove(checkpoint)

def export(checkpoint, target):
    remover = None
    if checkpoint.name == "step_0000004":
        if moment == "before":
            remove(checkpoint)
        else:
            remover = threading.Thread(target=remove_when_writing_has_begun, args=(checkpoint, target))
            remover.start()
    try:
        export_checkpoint(checkpoint, target)
    finally:
        if remover:
            remover.join()

if __name__ == "__main__":
    print(follow(run, out, export=export, options={}, poll_seconds=0.1, say=print))
"""


@pytest.mark.parametrize("moment", ["before", pytest.param("while it is written", marks=pytest.mark.slow)])
def test_checkpoint_that_is_removed_before_it_is_exported_is_skipped(moment: str, run: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "removed.py", tmp_path / "out"
    script.write_text(REMOVED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(run), str(out), moment]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    lines = [line.split(" in ")[0] for line in done.stdout.splitlines()]
    fate = {
        "skipped step_0000004: it was removed (checkpoint.keep_last) before it was exported": [],
        "exported step_0000004": ["step_0000004"],  # all of it was read before it was gone
    }
    assert lines[0] == "exported step_0000002", done.stderr
    assert lines[1] in ([*fate][:1] if moment == "before" else fate), done.stderr
    assert lines[2:] == ["exported step_0000006", "the run is complete at step 6", "True"]
    assert exports(out) == sorted(["step_0000002", *fate[lines[1]], "step_0000006"])
    for name in exports(out):
        assert_equal(out / name, out / "step_0000002")
    assert not list(out.glob(".unfinished*"))


def test_damaged_checkpoint_is_named_and_the_others_are_exported(run: Path, tmp_path: Path) -> None:
    file = run / "checkpoints/step_0000004/state/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-64] + os.urandom(64))
    with following(run, tmp_path / "out") as follower:
        said = ended(follower)
    assert follower.returncode == 1
    assert "cannot export step_0000004: " in said
    assert "__0_0.distcp is damaged" in said
    assert exports(tmp_path / "out") == ["step_0000002", "step_0000006"]


@pytest.mark.slow
def test_step_that_was_saved_again_is_reported(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with following(run, out) as follower:
        ended(follower)
    file = run / "checkpoints/step_0000004/manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tensors": {}}))
    with following(run, out) as follower:
        said = ended(follower)
    assert "the run has saved step_0000004 again since it was exported" in said
    assert "exported step" not in said


# --- refused ----------------------------------------------------------------------------------------------------------


def adapters_alone(run: Path) -> None:
    state = TrainState(step=2, base="0123")
    (run / "checkpoints/step_0000002/train_state.json").write_text(json.dumps(vars(state)))


REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "both": (lambda run: None, ["--follow", "run", "--checkpoint", "run"], "either --checkpoint or --follow: both"),
    "neither": (lambda run: None, [], "use either --checkpoint or --follow: neither is given"),
    "seconds without a run": (
        lambda run: None,
        ["--checkpoint", "run", "--poll-seconds", "3"],
        "--poll-seconds is for --follow",
    ),
    "no time": (lambda run: None, ["--follow", "run", "--poll-seconds", "0"], "--poll-seconds 0: give more than 0"),
    "no run": (lambda run: None, ["--follow", "nowhere"], "nowhere does not exist: give the folder of a run"),
    "a checkpoint": (lambda run: None, ["--follow", "run/checkpoints/step_0000002"], "is one checkpoint: give the"),
    "an unknown dtype": (lambda run: None, ["--follow", "run", "--dtype", "fp8"], "--dtype fp8 is unknown"),
    "adapters": (adapters_alone, ["--follow", "run"], "trains adapters alone (LoRA)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_calls_are_refused_in_one_line(
    case: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, arguments, message = REFUSED[case]
    change(run)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", "--out", "out", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.slow
def test_folder_of_other_exports_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with following(run, out) as follower:
        ended(follower)
        other = shutil.copytree(run, tmp_path / "other")
        for arguments, message in (
            (["--follow", str(other)], "has exports with run "),
            (["--follow", str(run), "--dtype", "bf16"], "has exports with options "),
        ):
            result = CliRunner().invoke(app, ["export", "--out", str(out), *arguments])
            assert result.exit_code == 2
            assert message in result.stderr
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").touch()
    result = CliRunner().invoke(app, ["export", "--out", str(tmp_path / "thesis"), "--follow", str(run)])
    assert "has files (thesis.tex) but no follow.json" in result.stderr


@pytest.mark.slow
def test_two_processes_do_not_export_into_one_folder(run: Path, tmp_path: Path) -> None:
    set_state(run, "running")
    with following(run, tmp_path / "out") as first:
        wait_for(lambda: (tmp_path / "out/follow.json").exists(), first)
        with following(run, tmp_path / "out") as second:
            said = ended(second)
    assert second.returncode == 2
    assert f"error: another process exports into {tmp_path / 'out'}" in said
