"""What tools.launch needs of the cluster: submit scripts with sbatch, check the container, name what it lacks."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.config import ConfigError

MOUNT = re.compile(r"(/[^:,]*):(/[^:,]*)(:[\w+]+)?")  # FROM:TO, or FROM:TO:ro
OWN_OPTIONS = ("nodes", "ntasks-per-node", "gpus-per-node", "partition", "account", "time", "job-name", "dependency")


@dataclass(frozen=True)
class Job:
    """A script and the file that it is for."""

    name: str
    script: str


def check_slurm(container: str) -> None:
    """Check that jobs can be submitted from this machine, with a container if there is one.

    Raises:
        ConfigError: SLURM, or pyxis for the container, is not here.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--submit: sbatch is not on this machine; write the script with --out, and submit it where SLURM is"
        )
    if container:
        said = subprocess.run(["srun", "--help"], capture_output=True, text=True, check=False)
        if "--container-image" not in said.stdout:
            raise ConfigError(
                "--container: srun --help on this machine does not list --container-image, an option of the plugin "
                "pyxis: ask the cluster's administrators for enroot and pyxis, or leave --container out; where only "
                "other machines have it, write the script with --out, and submit it there"
            )


def dependency(after: str) -> list[str]:
    """Return the options with which a job waits until others are complete, and is cancelled if one fails."""
    return [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []


def submit_jobs(jobs: Sequence[Job], after: str) -> None:
    """Submit jobs, each after the one before, and print their numbers.

    Args:
        jobs: in their order.
        after: numbers of jobs that the first one waits for, separated by colons; empty: none.

    Raises:
        ConfigError: sbatch refused a job. Those before it are cancelled.
    """
    submitted: list[str] = []
    for job in jobs:
        waits_for = submitted[-1] if submitted else after
        command = ["sbatch", "--parsable", *dependency(waits_for)]
        done = subprocess.run(command, input=job.script, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip()
            raise ConfigError(f"sbatch refused {job.name}: {' '.join(said.splitlines())}{_cancel(submitted)}")
        submitted.append(done.stdout.strip().split(";")[0])
        print(f"{submitted[-1]} {job.name}" + (f", after {waits_for}" if waits_for else ""))


def _cancel(jobs: Sequence[str]) -> str:
    """Cancel jobs, and return what to add to a message."""
    if not jobs:
        return ""
    done = subprocess.run(["scancel", *jobs], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"; the jobs before it wait or run: scancel {' '.join(jobs)}"
    return f"; the jobs before it are cancelled: {' '.join(jobs)}"


def parse_directives(words: Iterable[str]) -> dict[str, str]:
    """Return the options of --sbatch, NAME=VALUE, by name.

    Raises:
        ConfigError: one is not of this form, or has its own option.
    """
    found = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals or not value or not re.fullmatch(r"[a-z][a-z-]*", name):
            raise ConfigError(f"--sbatch {word}: give an option of sbatch as NAME=VALUE, such as qos=high")
        if name in OWN_OPTIONS:
            raise ConfigError(f"--sbatch {word}: tools.launch sets {name} itself; see its options")
        found[name] = value
    return found


# --- containers -------------------------------------------------------------------------------------------------------


def check_container(image: str, mounts: str, open_files: bool) -> str:
    """Check an image and its mounts, and return the image with its whole path if it is a file.

    Args:
        image: a file, or REGISTRY#IMAGE:TAG; empty: no container.
        mounts: FROM:TO,...
        open_files: the files must be here.

    Raises:
        ConfigError: the options contradict each other, or a file or folder is not there.
    """
    if not image:
        if mounts:
            raise ConfigError("--mounts has no effect without --container: remove it, or name the image")
        return ""
    for mount in mounts.split(",") if mounts else []:
        parts = MOUNT.fullmatch(mount)
        if parts is None:
            raise ConfigError(f"--mounts {mount}: give FROM:TO, two absolute paths; several separated by commas")
        if open_files and not Path(parts[1]).exists():
            raise ConfigError(f"--mounts {mount}: {parts[1]} is not there; --skip-files does not look")
    if not image.startswith(("/", "./", "../")) and not image.endswith(".sqsh"):
        return image
    file = Path(image).absolute()
    if open_files and not file.is_file():
        raise ConfigError(f"--container {image}: there is no such file; --skip-files does not look")
    return str(file)


def not_in_container(paths: Iterable[str], mounts: str, own: Sequence[Path]) -> list[str]:
    """Return the absolute paths, without URLs, that no mount brings into the container.

    Args:
        paths: that the run reads.
        mounts: as above.
        own: folders that the scripts mount themselves.
    """
    there = [*own, *(Path(parts[2]) for mount in mounts.split(",") if (parts := MOUNT.fullmatch(mount)))]
    return [path for path in paths if path.startswith("/") and not any(Path(path).is_relative_to(x) for x in there)]
