"""Write the job script of a run for SLURM, or submit it, after checking that the run can start.

    python -m tools.launch --config configs/glm45v/pretrain.yaml --nodes 32 --out job.sbatch
    python -m tools.launch --config configs/glm45v/pretrain.yaml --nodes 32 --submit [dotted.key=value ...]
    python -m tools.launch --nodes 32,32,16 --submit --chain configs/glm45v/pretrain.yaml
                           configs/glm45v/long_context.yaml configs/glm45v/sft.yaml

The configuration, the number of processes, the layout, the data and the model to start from are checked first, as the
run would check them. The script is slurm/STAGE.sbatch with its settings filled in; it needs the clone that it is
written from. With --chain each stage starts when the one before it is complete; if one fails, the later ones are
cancelled.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from common.files import write_text
from model.config import ConfigError, GlmvConfig
from planning.limits import Limits
from pretrain.train import PretrainConfig
from sft.train import SftConfig
from tools.errors import errors_in_one_line
from tools.help_text import keep_lines
from tools.job_script import fill_script
from tools.launch_plan import check_fits
from tools.submission import (
    Job,
    check_container,
    check_slurm,
    dependency,
    not_in_container,
    parse_directives,
    submit_jobs,
)
from training.config import RunConfig, load_config
from training.errors import EXPECTED_ERRORS
from training.setup import build_loader, prepare
from training.start_point import with_positions

REPO = Path(__file__).parent.parent
SCHEMAS: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "long_context": PretrainConfig,
    "sft": SftConfig,
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
MOST_NODES = 4096  # up to here a suitable number is looked for


@dataclass(frozen=True)
class Cluster:
    """What the run gets of the cluster."""

    gpus_per_node: int
    processes_per_node: int
    directives: dict[str, str | None]
    settings: dict[str, str]


@dataclass(frozen=True)
class Stage:
    """A run of the chain."""

    name: str
    files: list[Path]
    config: RunConfig
    nodes: int


@app.command(help=keep_lines(__doc__))
def main(
    nodes: Annotated[str, typer.Option(help="number of nodes; with --chain also one per stage: 32,32,16")],
    config: Annotated[
        list[Path] | None, typer.Option(help="the run's YAML file; may be repeated: later ones win")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="keys that replace those of the files", metavar="dotted.key=value")
    ] = None,
    chain: Annotated[
        list[Path] | None, typer.Option(help="a YAML file per stage; more may follow. --config lies over each of them")
    ] = None,
    stage: Annotated[
        str, typer.Option(help=f"{', '.join(SCHEMAS)}; default: the one with which the name of the first file begins")
    ] = "",
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: train on CPUs")] = 8,
    processes_per_node: Annotated[int, typer.Option(min=0, help="default: one per GPU")] = 0,
    partition: Annotated[str, typer.Option(help="of the cluster")] = "",
    account: Annotated[str, typer.Option(help="to which the time is charged")] = "",
    time: Annotated[str, typer.Option(help="limit of a job, as SLURM writes it; the run continues in a next one")] = "",
    job_name: Annotated[str, typer.Option(help="default: the stage")] = "",
    sbatch: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, another option of sbatch, such as qos=high; may be repeated")
    ] = None,
    container: Annotated[str, typer.Option(help="image for pyxis; default: no container")] = "",
    mounts: Annotated[str, typer.Option(help="FROM:TO,... into the container, beside the clone and the run")] = "",
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
    with errors_in_one_line(*EXPECTED_ERRORS):
        given = overrides or []
        chained = [*(chain or []), *(Path(word) for word in given if "=" not in word)] if chain else []
        keys = [word for word in given if "=" in word or not chain]
        _check_call(chained, config or [], keys, out, submit, after)
        if submit:
            check_slurm(container)
        image = check_container(container, mounts, open_files=not skip_files)
        directives = {"partition": partition, "account": account, "time": time, "job-name": job_name}
        settings = {"CONTAINER_IMAGE": image, "CONTAINER_MOUNTS": mounts}
        cluster = _cluster(gpus_per_node, processes_per_node, directives, sbatch or [], settings)
        stacks = [[file, *(config or [])] for file in chained] or [list(config or [])]
        counts = _node_counts(nodes, len(stacks))
        stages = [_read_stage(files, keys, stage, count) for files, count in zip(stacks, counts, strict=True)]
        _check_stages(stages, cluster.processes_per_node, skip_files, bool(after))
        _check_fit(stages if plan and gpus_per_node else (), keys, cluster.processes_per_node, gpu_memory)
        if image:
            _warn_of_missing_mounts(stages, mounts)
        scripts = [_script(one, cluster, keys) for one in stages]
        if submit:
            jobs = [Job(str(one.files[0]), script) for one, script in zip(stages, scripts, strict=True)]
            submit_jobs(jobs, after)
        else:
            _write(stages, scripts, after, out)


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


def _read_stage(files: list[Path], keys: Sequence[str], name: str, nodes: int) -> Stage:
    if not files[0].is_file():
        raise ConfigError(f"{files[0]}: {'this is a folder' if files[0].is_dir() else 'there is no such file'}")
    if name and name not in SCHEMAS:
        raise ConfigError(f"--stage {name}: give {' or '.join(SCHEMAS)}")
    name = name or next((known for known in SCHEMAS if files[0].stem.startswith(known)), "")
    if not name:
        raise ConfigError(f"{files[0]}: its name does not say which stage it is; give --stage {' or '.join(SCHEMAS)}")
    return Stage(name, files, load_config(SCHEMAS[name], files, keys), nodes)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_stages(stages: Sequence[Stage], processes: int, skip_files: bool, waits: bool) -> None:
    written: dict[Path, Stage] = {}
    for stage in stages:
        config, where = stage.config, stage.files[0]
        folder = Path(config.train.output_dir).absolute()
        if folder in written:
            raise ConfigError(f"{where} and {written[folder].files[0]} both write to train.output_dir={folder}")
        before = Path(config.model.init_from).absolute() if config.model.init_from else None
        later = waits or before in written  # the model that it starts from need not be there yet
        if written and before not in written:
            print(f"warning: {where} starts from {before}, which no earlier stage of the chain writes", file=sys.stderr)
        written[folder] = stage
        try:
            _check_stage(config, stage.nodes * processes, later, skip_files)
        except ConfigError as error:
            raise ConfigError(f"{where} on {stage.nodes} nodes: {error}{_suitable(stage, processes)}") from None
        except EXPECTED_ERRORS as error:  # of its data, or of the model to start from
            raise ConfigError(f"{where}: {error}") from None


def _check_fit(stages: Sequence[Stage], keys: Sequence[str], processes: int, gpu_memory: float) -> None:
    for stage in stages:
        files = [file.absolute() for file in stage.files]
        check_fits(files, keys, stage.config, stage.nodes * processes, gpu_memory)


def _check_stage(config: RunConfig, processes: int, later: bool, skip_files: bool) -> None:
    """Check what a run checks at its start, as far as its files are here."""
    if config.model.preset:  # a wrong number of nodes first: it needs no file
        config.check_layout(_preset(config), processes)
    if not skip_files and not later:
        prepare(config, processes).loader.close()
        return
    config.check_layout(_preset(config), processes)
    if not skip_files:
        build_loader(config, _preset(config)).close()


def _preset(config: RunConfig) -> GlmvConfig:
    if not config.model.preset:
        raise ConfigError(
            "model.preset is empty: it is needed to check the layout before the model to start from exists"
        )
    return with_positions(GlmvConfig.from_preset(config.model.preset), config.model)


def _suitable(stage: Stage, processes: int) -> str:
    """Name the numbers of nodes that would do, if it is the number that is wrong."""
    if not stage.config.model.preset:
        return ""
    model = _preset(stage.config)
    if _fits(stage.config, model, stage.nodes * processes):
        return ""
    fewer = (n for n in range(stage.nodes - 1, 0, -1) if _fits(stage.config, model, n * processes))
    more = (n for n in range(stage.nodes + 1, MOST_NODES) if _fits(stage.config, model, n * processes))
    numbers = [str(n) for n in (next(fewer, None), next(more, None)) if n is not None]
    return f"; suitable numbers of nodes: {', '.join(numbers)}" if numbers else ""


def _fits(config: RunConfig, model: GlmvConfig, processes: int) -> bool:
    try:
        config.check_layout(model, processes)
    except ConfigError:
        return False
    return True


def _warn_of_missing_mounts(stages: Sequence[Stage], mounts: str) -> None:
    for stage in stages:
        config = stage.config
        sources = [*config.data.located, *replace(config.data, sources=config.validation.sources).located]
        paths = [config.data.tokenizer, config.model.init_from, *(one.path for one in sources)]
        outputs = [Path(one.config.train.output_dir).absolute() for one in stages]
        missing = not_in_container(paths, mounts, [REPO, *outputs])
        if missing:
            print(
                f"warning: --mounts does not bring in what {stage.files[0]} reads: {', '.join(missing)}",
                file=sys.stderr,
            )


# --- scripts ----------------------------------------------------------------------------------------------------------


def _script(stage: Stage, cluster: Cluster, keys: Sequence[str]) -> str:
    gpus = str(cluster.gpus_per_node) if cluster.gpus_per_node else None
    directives = {name: value for name, value in cluster.directives.items() if value is not None}
    settings = {
        "REPO": str(REPO),
        "CONFIG": ":".join(str(file.absolute()) for file in stage.files),
        "OUTPUT_DIR": str(Path(stage.config.train.output_dir).absolute()),
        **{name: value for name, value in cluster.settings.items() if value},
    }
    if cluster.processes_per_node != cluster.gpus_per_node:
        settings["NPROC_PER_NODE"] = str(cluster.processes_per_node)
    return fill_script(
        f"{stage.name}.sbatch",
        {"nodes": str(stage.nodes), "gpus-per-node": gpus, **directives},
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
    app()
