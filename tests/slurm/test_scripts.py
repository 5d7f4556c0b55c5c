"""The job scripts as texts: bash and shellcheck accept them, and what they share is not written three times."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.test_house import pins, setup_arguments

SCRIPTS = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch"))
TRACKERS = ROOT / "tests" / "trackers" / "requirements.txt"
DOCKERFILE = ROOT / "docker" / "Dockerfile"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_accept_a_script(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert shutil.which("shellcheck"), "shellcheck is missing: run tools/debian.sh as root"
    done = subprocess.run(["shellcheck", "-x", "-s", "bash", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_of_training_differ_in_name_size_and_entry_alone() -> None:
    def common_part(name: str) -> str:
        text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
        text = re.sub(r"^# (?!Settings|shellcheck).*\n", "", text, flags=re.MULTILINE)
        return re.sub(r"--job-name=\w+|--nodes=\d+|\w+\.train\b", "", text)

    assert common_part("pretrain") == common_part("long_context") == common_part("sft")
    beside = (
        r"^(SERVERS?_\w+=.*|# shellcheck source=slurm/servers.sh|source .*/servers.sh\"|split_nodes|start_servers)\n"
    )
    learning = re.sub(beside, "", common_part("rl"), flags=re.MULTILINE)
    assert learning.replace(' "${served[@]}"', "") == common_part("sft")


def test_every_setting_of_a_script_is_described() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    for script in SCRIPTS:
        for name in re.findall(r"^([A-Z_]+)=\$\{", script.read_text(), flags=re.MULTILINE):
            assert f"`{name}`" in page, f"{script.name} reads {name}, which docs/cluster.md does not describe"


def test_dockerfile_copies_what_exists_and_installs_what_is_pinned() -> None:
    text = DOCKERFILE.read_text()
    for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
    packages = {package.split(".")[0] for package in setup_arguments()["packages"]}
    assert packages <= set(re.findall(r"^COPY (\w+) \./", text, flags=re.MULTILINE))
    (extras,) = re.findall(r"-e '\.\[([\w,]+)\]'", text)
    pinned = {*pins(), *re.findall(r"^([\w-]+)==", TRACKERS.read_text().replace("_", "-"), flags=re.MULTILINE)}
    for extra in extras.split(","):
        for requirement in setup_arguments()["extras_require"][extra]:
            assert re.sub(r"[-_.]+", "-", requirement).lower() in pinned, f"{requirement} of [{extra}] is not pinned"
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", text, flags=re.MULTILINE)
