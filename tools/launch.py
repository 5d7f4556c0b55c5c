"""Write the job script of a run for SLURM, or submit it, after checking that the run can start.

    python -m tools.launch --config configs/glm45v/pretrain.yaml --nodes 32 --out job.sbatch
    python -m tools.launch --config configs/glm45v/pretrain.yaml --nodes 32 --submit [dotted.key=value ...]
    python -m tools.launch --nodes 32,32,16 --submit --chain configs/glm45v/pretrain.yaml
                           configs/glm45v/long_context.yaml configs/glm45v/sft.yaml
    python -m tools.launch --config configs/glm45v/rl.yaml --nodes 16 --server-nodes 4 --submit

The configuration, the number of processes, the layout, the data and the model to start from are checked first, as the
run would check them. The script is slurm/STAGE.sbatch with its settings filled in; it needs the clone that it is
written from. With --chain each stage starts when the one before it is complete; if one fails, the later ones are
cancelled. Reinforcement learning draws rollouts from vLLM servers, which --server-nodes starts in the same job.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.files import write_text
from model.config import ConfigError
from planning.limits import Limits
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines
from tools.job_script import REPO, STAGES, fill_script, is_setting_of, parse_settings
from tools.submission import Job, check_container, check_slurm, dependency, parse_directives, submit_jobs

if TYPE_CHECKING:  # they need torch
    from tools.launch_servers import JobServers
    from tools.launch_stages import Stage

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

# Options that need more than a line.
Files = Annotated[list[Path] | None, typer.Option(help="the run's YAML file; may be repeated: later ones win")]
Keys = Annotated[
    list[str] | None, typer.Argument(help="keys that replace those of the files", metavar="dotted.key=value")
]
Chain = Annotated[
    list[Path] | None, typer.Option(help="a YAML file per stage; more may follow. --config lies over each of them")
]
StageName = Annotated[
    str, typer.Option(help=f"{', '.join(STAGES)}; default: what train.stage or the first file's name says")
]
Directives = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE, another option of sbatch, such as qos=high; may be repeated")
]
ServerNodes = Annotated[
    int, typer.Option(min=0, help="of rl: nodes beside --nodes on which the job starts vLLM servers")
]
Settings = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE, a variable of the script (docs/cluster.md); may be repeated")
]


@dataclass(frozen=True)
class Cluster:
    """What the run gets of the cluster."""

    gpus_per_node: int
    processes_per_node: int
    directives: dict[str, str | None]
    settings: dict[str, str]


@app.command(help=keep_lines(__doc__))
def main(
    nodes: Annotated[str, typer.Option(help="number of nodes; with --chain also one per stage: 32,32,16")],
    config: Files = None,
    overrides: Keys = None,
    chain: Chain = None,
    stage: StageName = "",
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: train on CPUs")] = 8,
    processes_per_node: Annotated[int, typer.Option(min=0, help="default: one per GPU")] = 0,
    partition: Annotated[str, typer.Option(help="of the cluster")] = "",
    account: Annotated[str, typer.Option(help="to which the time is charged")] = "",
    time: Annotated[str, typer.Option(help="limit of a job, as SLURM writes it; the run continues in a next one")] = "",
    job_name: Annotated[str, typer.Option(help="default: the stage")] = "",
    sbatch: Directives = None,
    container: Annotated[str, typer.Option(help="image for pyxis; default: no container")] = "",
    mounts: Annotated[str, typer.Option(help="FROM:TO,... into the container, beside the clone and the run")] = "",
    server_nodes: ServerNodes = 0,
    setting: Settings = None,
    after: Annotated[str, typer.Option(help="number of a job that must be complete before")] = "",
    skip_files: Annotated[
        bool, typer.Option("--skip-files", help="open no data, tokenizer or model.init_from: they are not here")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan/--no-plan", help="refuse a run that does not fit its GPUs; a minute of planning")
    ] = True,
    gpu_memory: Annotated[float, typer.Option(help="GiB of a GPU, for --plan")] = Limits.gpu_memory,
    out: Annotated[Path | None, typer.Option(help="file for the script, with --chain a folder; default: print")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="submit the job with sbatch")] = False,
) -> None:
    from tools.launch_servers import JobServers
    from tools.launch_stages import check_memory, check_stages, read_stages, warn_of_missing_mounts
    from training.errors import EXPECTED_ERRORS

    with errors_in_one_line(*EXPECTED_ERRORS):
        given = overrides or []
        chained = [*(chain or []), *(Path(word) for word in given if "=" not in word)] if chain else []
        keys = [word for word in given if "=" in word or not chain]
        _check_call(chained, config or [], keys, out, submit, after)
        if submit:
            check_slurm(container)
        directives = {"partition": partition, "account": account, "time": time, "job-name": job_name}
        image = check_container(container, mounts, open_files=not skip_files)
        settings = {"CONTAINER_IMAGE": image, "CONTAINER_MOUNTS": mounts, **parse_settings(setting or [])}
        servers = JobServers(server_nodes, settings, skip_files)
        cluster = _cluster(gpus_per_node, processes_per_node, directives, sbatch or [], settings)
        stacks = [[file, *(config or [])] for file in chained] or [list(config or [])]
        stages = read_stages(stacks, keys, stage, _node_counts(nodes, len(stacks)), servers.stand_ins)
        check_stages(stages, cluster.processes_per_node, skip_files, bool(after))
        servers.check(stages, cluster.gpus_per_node)
        check_memory(stages if plan and gpus_per_node else (), cluster.processes_per_node, gpu_memory)
        warn_of_missing_mounts(stages if image else (), mounts, settings.get("SERVER_MODEL", ""))
        jobs = [Job(str(one.files[0]), _script(one, cluster, keys, servers)) for one in stages]
        if submit:
            submit_jobs(jobs, after)
        else:
            _write(stages, [job.script for job in jobs], after, out)


def _check_call(
    chained: Sequence[Path],
    config: Sequence[Path],
    keys: Sequence[str],
    out: Path | None,
    submit: bool,
    after: str,
) -> None:
    if not chained and not config:
        raise ConfigError("give the run's YAML file with --config, or those of several stages with --chain")
    if chained and not submit and out is None:
        raise ConfigError("--chain makes several scripts: give --submit, or a folder for them with --out")
    if submit and out is not None:
        raise ConfigError("--submit and --out: give one of them")
    if after and not all(part.isdecimal() for part in after.split(":")):
        raise ConfigError(f"--after {after}: give the number of a job, several separated by colons")
    for key in ("train.output_dir", "model.init_from"):
        if len(chained) > 1 and any(word.startswith(f"{key}=") for word in keys):
            raise ConfigError(f"{key} differs between the stages of a chain: set it in their files")


def _cluster(
    gpus_per_node: int,
    processes_per_node: int,
    directives: dict[str, str],
    sbatch: Sequence[str],
    settings: dict[str, str],
) -> Cluster:
    processes = processes_per_node or gpus_per_node
    if not processes:
        raise ConfigError("--gpus-per-node 0 needs --processes-per-node: the number of processes on a node's CPUs")
    named = {name: value or None for name, value in directives.items()}
    return Cluster(gpus_per_node, processes, {**named, **parse_directives(sbatch)}, settings)


def _node_counts(text: str, stages: int) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"--nodes {text}: give a number of nodes, or one per stage of --chain: 32,32,16")
    counts = [int(word) for word in words]
    if len(counts) not in (1, stages):
        raise ConfigError(f"--nodes {text}: {len(counts)} numbers for {stages} stages; give one number, or {stages}")
    return counts * stages if len(counts) == 1 else counts


# --- scripts ----------------------------------------------------------------------------------------------------------


def _script(stage: Stage, cluster: Cluster, keys: Sequence[str], servers: JobServers) -> str:
    gpus = str(cluster.gpus_per_node) if cluster.gpus_per_node else None
    directives = {name: value for name, value in cluster.directives.items() if value is not None}
    settings = {
        "REPO": str(REPO),
        "CONFIG": ":".join(str(file.absolute()) for file in stage.files),
        "OUTPUT_DIR": str(Path(stage.config.train.output_dir).absolute()),
        **{name: value for name, value in cluster.settings.items() if value and is_setting_of(name, stage.name)},
        **servers.settings_of(stage.config),
    }
    if cluster.processes_per_node != cluster.gpus_per_node:
        settings["NPROC_PER_NODE"] = str(cluster.processes_per_node)
    return fill_script(
        f"{stage.name}.sbatch",
        {"nodes": str(stage.nodes + servers.nodes_of(stage.config)), "gpus-per-node": gpus, **directives},
        settings,
        [key for key in keys if not key.startswith("train.output_dir=")],
        shlex.join(["python", "-m", "tools.launch", *sys.argv[1:]]),
    )


def _write(stages: Sequence[Stage], scripts: Sequence[str], after: str, out: Path | None) -> None:
    if out is None:
        print(scripts[0], end="")
        return
    files = [out]
    if len(stages) > 1:
        files = [out / f"{number}_{stage.name}.sbatch" for number, stage in enumerate(stages, 1)]
    for file, script in zip(files, scripts, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, script)
    commands = [shlex.join(["sbatch", *dependency(after if n == 0 else "JOB"), str(f)]) for n, f in enumerate(files)]
    print(
        "written; submit with:\n"
        + "\n".join(commands)
        + ("\nJOB: the number of the job before" if len(files) > 1 else "")
    )


if __name__ == "__main__":
    run(app)
