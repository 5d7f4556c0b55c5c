"""slurm/serve.sh, where a small program stands for the Python with vLLM: servers that end again and again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.launch import ROOT
from tests.slurm.cluster import wait_for

# The first server of a node ends at once, with an error as Python prints it; the other ones run.
PROGRAM = """#!/bin/bash
while [ "$1" != --port ]; do shift; done
echo "start of $2"
if [ "$2" = 8000 ]; then
    printf 'RuntimeError: no memory for the cache\\nMore about it.\\n'
    exit 3
fi
sleep 600
"""


@pytest.mark.slow
def test_a_server_that_ends_again_and_again_is_given_up_and_the_others_serve(tmp_path: Path) -> None:
    program, ready, host = tmp_path / "python", tmp_path / "ready", socket.gethostname()
    program.write_text(PROGRAM)
    program.chmod(0o755)
    ready.touch()
    command = ["bash", "slurm/serve.sh", str(program), "model", "8000", "2", "0", str(ready), str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as serving:
        own = psutil.Process(serving.pid)
        assert serving.stderr is not None
        said = [serving.stderr.readline() for _ in range(5)]
        time.sleep(7)  # longer than between two starts
        assert serving.poll() is None
        assert (tmp_path / f"{host}-0.log").read_text().count("start of 8000") == 5
        assert (tmp_path / f"{host}-1.log").read_text().count("start of 8001") == 1
        assert any("8001" in each.cmdline() for each in own.children(recursive=True))
        family = own.children(recursive=True)
        serving.send_signal(signal.SIGTERM)  # as SLURM ends a step
        assert not psutil.wait_procs(family, timeout=10)[1]
    assert said[:4] == [f"server 0 on {host} ended with exit code 3 and is started again\n"] * 4
    assert said[4] == (
        f"error: server 0 on {host} ended 5 times in a row within 600 s of its start, at last with exit code 3 "
        f"(RuntimeError: no memory for the cache), and is not started again: see {tmp_path}/{host}-0.log\n"
    )


def test_a_server_that_never_answered_ends_all(tmp_path: Path) -> None:
    program, host = tmp_path / "python", socket.gethostname()
    program.write_text(PROGRAM)
    program.chmod(0o755)
    command = [
        "bash",
        "slurm/serve.sh",
        str(program),
        "model",
        "8000",
        "2",
        "0",
        str(tmp_path / "ready"),
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, timeout=60)
    assert done.returncode
    assert done.stderr == (
        f"error: the server on {host} ended with exit code 3 before it answered: see {tmp_path}/{host}-0.log\n"
    )
    wait_for(
        lambda: not [each for each in psutil.process_iter(["cmdline"]) if str(program) in (each.info["cmdline"] or [])],
        "the end of all servers",
    )
