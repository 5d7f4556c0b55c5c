"""The stages that tools.launch starts: their configurations, and the checks that each run would make at its start."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from common.urls import is_url, shown
from model.config import ConfigError, GlmvConfig
from pretrain.train import PretrainConfig
from rl import setup as rl_setup
from rl.config import RlConfig
from sft.train import SftConfig
from tools.job_script import REPO
from tools.launch_plan import check_fits
from tools.run_config import RL_SECTIONS
from tools.submission import not_in_container
from training.config import RunConfig, load_config
from training.errors import EXPECTED_ERRORS
from training.recipe import last_value, read_layers
from training.setup import build_loader, prepare
from training.start_point import with_positions

# Of each stage that has a script.
SCHEMAS: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "long_context": PretrainConfig,
    "sft": SftConfig,
    "rl": RlConfig,
}
MOST_NODES = 4096  # up to here a suitable number is looked for


@dataclass(frozen=True)
class Stage:
    """A run of the chain."""

    name: str
    files: list[Path]
    config: RunConfig
    nodes: int
    keys: list[str]  # overrides, with those that stand for what the job will set


def read_stages(
    stacks: Sequence[list[Path]],
    keys: Sequence[str],
    name: str,
    nodes: Sequence[int],
    more: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[Stage]:
    """Read the configurations of stages.

    Args:
        stacks: The YAML files of each; later ones win.
        keys: Overrides of their keys.
        name: One of SCHEMAS; empty: what train.stage says, or the one with which the name of a stage's first file
            begins.
        nodes: Number of nodes of each.
        more: Further overrides by stage, which stand for what the job will set.

    Raises:
        ConfigError: A file or key is wrong, or nothing says which stage it is.
    """
    return [_read_stage(files, keys, name, count, more) for files, count in zip(stacks, nodes, strict=True)]


def _read_stage(
    files: list[Path], keys: Sequence[str], name: str, nodes: int, more: Mapping[str, Sequence[str]]
) -> Stage:
    if not files[0].is_file():
        raise ConfigError(f"{files[0]}: {'this is a folder' if files[0].is_dir() else 'there is no such file'}")
    if name and name not in SCHEMAS:
        raise ConfigError(f"--stage {name}: give {' or '.join(SCHEMAS)}")
    said = last_value(read_layers(files, keys), "train", "stage")
    names = [name, said if isinstance(said, str) else "", *(one for one in SCHEMAS if files[0].stem.startswith(one))]
    name = next((one for one in names if one in SCHEMAS), "")
    if not name:
        raise ConfigError(
            f"{files[0]}: neither its name nor train.stage says which stage it is; give --stage {' or '.join(SCHEMAS)}"
        )
    for key in keys:
        if name != "rl" and key.partition(".")[0] in RL_SECTIONS:
            raise ConfigError(f"{key}: {files[0]} draws no rollouts; set it in the file of the stage that does")
    own = [*keys, *more.get(name, ())]
    return Stage(name, files, load_config(SCHEMAS[name], files, own), nodes, own)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_stages(stages: Sequence[Stage], processes: int, skip_files: bool, waits: bool) -> None:
    """Check what each run checks at its start, and that the runs of a chain fit each other.

    Args:
        stages: The runs, in their order.
        processes: Processes of a node.
        skip_files: Open no data, tokenizer or model to start from.
        waits: The first one waits for another job, which may write the model that it starts from.

    Raises:
        ConfigError: A run would not start.
    """
    written: dict[Path, Stage] = {}
    for stage in stages:
        config, where = stage.config, stage.files[0]
        folder = Path(config.train.output_dir).absolute()
        if folder in written:
            raise ConfigError(f"{where} and {written[folder].files[0]} both write to train.output_dir={folder}")
        init_from = config.model.init_from
        before = Path(init_from).absolute() if init_from and not is_url(init_from) else None
        later = waits or before in written  # the model that it starts from need not be there yet
        if written and before not in written:
            start = before or shown(init_from) or "random weights"
            print(f"warning: {where} starts from {start}, which no earlier stage of the chain writes", file=sys.stderr)
        written[folder] = stage
        try:
            _check_stage(config, stage.nodes * processes, later, skip_files)
        except ConfigError as error:
            raise ConfigError(f"{where} on {stage.nodes} nodes: {error}{_suitable(stage, processes)}") from None
        except EXPECTED_ERRORS as error:  # of its data, or of the model to start from
            raise ConfigError(f"{where}: {error}") from None


def _check_stage(config: RunConfig, processes: int, later: bool, skip_files: bool) -> None:
    """Check what a run checks at its start, as far as its files are here."""
    if config.model.preset:  # a wrong number of nodes first: it needs no file
        config.check_layout(_preset(config), processes)
    if not skip_files and not later:
        prepared = rl_setup.prepare(config, processes) if isinstance(config, RlConfig) else prepare(config, processes)
        prepared.loader.close()
        return
    config.check_layout(_preset(config), processes)
    if not skip_files and isinstance(config, RlConfig):
        rl_setup.open_prompts(config, _preset(config)).table.close()
    elif not skip_files:
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


def check_memory(stages: Sequence[Stage], processes: int, gpu_memory: float) -> None:
    """Check that each run fits the memory of its GPUs; see check_fits."""
    for stage in stages:
        files = [file.absolute() for file in stage.files]
        check_fits(files, stage.keys, stage.config, stage.nodes * processes, gpu_memory)


def warn_of_missing_mounts(stages: Sequence[Stage], mounts: str, server_model: str) -> None:
    """Warn of what runs read, or servers beside them, and the container would not have.

    Args:
        stages: The runs.
        mounts: FROM:TO,... into the containers.
        server_model: With which the servers of a run start; empty: with the model or the tokenizer of the run.
    """
    for stage in stages:
        config = stage.config
        sources = [*config.data.located, *replace(config.data, sources=config.validation.sources).located]
        paths = [config.data.tokenizer, config.model.init_from, *(one.path for one in sources)]
        if isinstance(config, RlConfig):
            paths += [config.reward.registry, config.reward.judge.cache, config.rollout.publish_dir]
            paths.append(server_model)
        outputs = [Path(one.config.train.output_dir).absolute() for one in stages]
        missing = not_in_container(paths, mounts, [REPO, *outputs])
        if missing:
            print(
                f"warning: --mounts does not bring in what {stage.files[0]} reads: {', '.join(missing)}",
                file=sys.stderr,
            )
