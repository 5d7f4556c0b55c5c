"""How a run stands, for the scripts that start it again: RUN/state.json, and the exit code.

    {"state": "stopped", "step": 400, "steps": 1000, "reason": "by SIGUSR1 on rank 3"}

| state    | meaning                                              | exit code |
|----------|------------------------------------------------------|-----------|
| running  | it runs now, or has crashed                          | another   |
| complete | the last step, of the run or of the data, is done    | 0         |
| stopped  | it was asked to stop; the same command resumes       | 75        |
| failed   | an error that the user must fix                      | 2         |

torchrun answers every exit code but 0 with its own exit code 1, so that the file is what a script should read.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from common.files import write_json
from training.metrics import logger
from training.ranks import rank
from training.run_lock import run_lock

RUN_STATE = "state.json"
RUNNING, COMPLETE, STOPPED, FAILED = "running", "complete", "stopped", "failed"
EXIT_STOPPED, EXIT_FAILED = 75, 2  # 75: EX_TEMPFAIL, try again
EXIT_CODES = {COMPLETE: 0, STOPPED: EXIT_STOPPED, FAILED: EXIT_FAILED}


def write_state(folder: Path, state: str, step: int, steps: int, reason: str = "") -> None:
    """Write how the run stands. Where the disk is full it is only said: the cause has its own message."""
    try:
        write_json(folder / RUN_STATE, {"state": state, "step": step, "steps": steps, "reason": reason})
    except OSError as error:
        logger.warning("%s cannot be written (%s)", folder / RUN_STATE, error.strerror)


def note_start(folder: Path, steps: int) -> None:
    """Write `running` over how the run ended before. The main process writes, and holds the run folder's lock.

    Weights are loaded after this. A process that is lost meanwhile is restarted by torchrun, and must not take the end
    of the run before for that of this one. A run that has not ended before has no state until its first step.
    """
    if rank() == 0 and (before := read_state(folder)):
        write_state(folder, RUNNING, before.get("step", 0), steps)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of state.json; empty where there is none that can be read."""
    try:
        content = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def note_refusal(folder: Path, error: Exception) -> None:
    """Write `failed` into a run folder whose run cannot start again, unless another run uses the folder now."""
    if rank() != 0 or not (before := read_state(folder)):
        return
    with run_lock(folder) as refusal:
        if not refusal:
            write_state(folder, FAILED, before.get("step", 0), before.get("steps", 0), str(error))


def end_restart_of_an_ended_run(folder: Path) -> None:
    """End this process if torchrun restarted it although the run had ended on purpose.

    `torchrun --max-restarts` cannot tell a run that was asked to stop from one that crashed.

    Raises:
        SystemExit: the exit code of the run.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    before = read_state(folder)
    if before.get("state") in EXIT_CODES:
        if rank() == 0:
            print(f"the run has {before['state']} ({before['reason']}): not restarted", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODES[before["state"]])
