"""Fill in the job scripts of slurm/: their #SBATCH lines, and the settings at their head."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.config import ConfigError

REPO = Path(__file__).parent.parent
FOLDER = REPO / "slurm"
SETTING = re.compile(r"^([A-Z_]+)=\$\{\1:-", re.MULTILINE)
# Settings of the scripts that are options of tools.launch.
OWN = {
    "REPO",
    "CONFIG",
    "OUTPUT_DIR",
    "CONTAINER_IMAGE",
    "CONTAINER_MOUNTS",
    "GPUS_PER_NODE",
    "NPROC_PER_NODE",
    "SERVER_NODES",
}
STAGES = ("pretrain", "long_context", "sft", "rl")  # each has a script of its name


def fill_script(
    name: str,
    directives: Mapping[str, str | None],
    settings: Mapping[str, str],
    overrides: Sequence[str] = (),
    written_by: str = "",
) -> str:
    """Return a shipped script with other values; all else stays as it is shipped.

    Args:
        name: file in slurm/.
        directives: options of sbatch without their dashes; None removes one.
        settings: variables that the script sets at its head.
        overrides: keys of the run, dotted.key=value, before those that sbatch is given behind the script.
        written_by: the command, for a comment.
    """
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    lines = _with_directives(lines, directives)
    for variable, value in settings.items():
        lines = _with_setting(lines, variable, shlex.quote(value))
    if overrides:
        lines = _with_setting(lines, "OVERRIDES", f'({" ".join(map(shlex.quote, overrides))} "$@")')
    if written_by:
        lines.insert(1, f"# Written from slurm/{name} by: {written_by}")
    return "".join(f"{line}\n" for line in lines)


def _with_directives(lines: Sequence[str], directives: Mapping[str, str | None]) -> list[str]:
    changed = []
    left = dict(directives)
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    for number, line in enumerate(lines):
        option = re.match(r"#SBATCH --([\w-]+)", line)
        if option and option[1] in left:
            value = left.pop(option[1])
            changed += [f"#SBATCH --{option[1]}={value}"] if value is not None else []
        else:
            changed.append(line)
        if number == last:
            changed += [f"#SBATCH --{name}={value}" for name, value in left.items() if value is not None]
    return changed


def _with_setting(lines: Sequence[str], variable: str, value: str) -> list[str]:
    """Replace the value of a variable, which must be there, and keep the comment behind it."""
    pattern = re.compile(rf"{variable}=\S+(\s+#.*)?")
    found = [number for number, line in enumerate(lines) if pattern.fullmatch(line)]
    (number,) = found
    comment = pattern.fullmatch(lines[number])
    changed = list(lines)
    changed[number] = f"{variable}={value}{(comment and comment[1]) or ''}"
    return changed


def parse_settings(words: Sequence[str]) -> dict[str, str]:
    """Return the settings of --setting, NAME=VALUE, by name.

    Raises:
        ConfigError: one is not of this form, or no script has it, or it has an option of its own.
    """
    known = {name for stage in STAGES for name in re.findall(SETTING, (FOLDER / f"{stage}.sbatch").read_text())}
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value or name not in known:
            raise ConfigError(f"--setting {word}: give NAME=VALUE; the scripts have {', '.join(sorted(known - OWN))}")
        if name in OWN:
            raise ConfigError(f"--setting {word}: tools.launch sets {name} itself; see its options")
        found[name] = value
    return found


def is_setting_of(name: str, stage: str) -> bool:
    """Return whether the script of a stage has a setting: those of servers are of rl alone."""
    return name in re.findall(SETTING, (FOLDER / f"{stage}.sbatch").read_text())
