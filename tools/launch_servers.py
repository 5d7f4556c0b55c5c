"""The vLLM servers that a job of reinforcement learning starts on nodes of its own, by slurm/servers.sh."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.urls import is_url, shown
from model.config import ConfigError
from model.hf_config import CONFIG_FILE
from rl.config import RlConfig
from rl.engines.server_gpus import SERVED, check_options
from tools.job_script import REPO
from tools.launch_stages import Stage
from training.config import RunConfig

STAND_IN = "rollout.addresses=[http://server-of-the-job:8000]"  # for the checks; the job sets the true ones
PYTHON = ".venv-engines/bin/python"  # of the clone, as slurm/servers.sh has it


@dataclass(frozen=True)
class JobServers:
    """What of a job serves rollouts.

    Attributes:
        nodes: Beside those that train; 0: none.
        given: Settings of the script that the user has given.
        skip_files: Do not look whether files are there.
    """

    nodes: int
    given: Mapping[str, str]
    skip_files: bool

    @property
    def stand_ins(self) -> dict[str, list[str]]:
        """Keys, by stage, that stand for what the job will set."""
        return {"rl": [STAND_IN]} if self.nodes else {}

    def nodes_of(self, config: RunConfig) -> int:
        """Return the nodes that serve in the job of a run."""
        return self.nodes if isinstance(config, RlConfig) else 0

    def settings_of(self, config: RunConfig) -> dict[str, str]:
        """Return the settings of slurm/rl.sbatch for a run; none for other stages.

        Raises:
            ConfigError: There is no model to start servers with.
        """
        if not isinstance(config, RlConfig) or not self.nodes:
            return {}
        model = {} if self.given.get("SERVER_MODEL") else {"SERVER_MODEL": self._first_model(config)}
        return {"SERVER_NODES": str(self.nodes), **model}

    def check(self, stages: Sequence[Stage], gpus_per_node: int) -> None:
        """Check that the servers of the jobs can start, and name those that the jobs do not start.

        Raises:
            ConfigError: They cannot.
        """
        learning = [(stage, stage.config) for stage in stages if isinstance(stage.config, RlConfig)]
        of_servers = [name for name in self.given if name.startswith("SERVER") and self.given[name]]
        if self.nodes and not learning:
            raise ConfigError(f"--server-nodes {self.nodes}: no stage draws rollouts; leave it out")
        if of_servers and not self.nodes:
            raise ConfigError(f"--setting {of_servers[0]} has no effect without --server-nodes")
        for stage, config in learning:
            if self.nodes:
                self._check_run(stage.files[0], config)
            elif config.rollout.addresses:
                _name_servers(stage.files[0], config)
        if self.nodes:
            self._check_settings(gpus_per_node)

    def _check_run(self, file: Path, config: RlConfig) -> None:
        if config.rollout.engine != "vllm":
            raise ConfigError(
                f"--server-nodes {self.nodes} starts vLLM, and {file} has rollout.engine={config.rollout.engine}: set "
                "rollout.engine=vllm, or leave --server-nodes out"
            )
        if config.rollout.start:
            raise ConfigError(
                f"--server-nodes {self.nodes} and rollout.start={config.rollout.start}: the one starts servers on "
                "nodes of their own, the other beside the first process; give one of them"
            )

    def _check_settings(self, gpus_per_node: int) -> None:
        each = self.given.get("SERVERS_PER_NODE") or "1"
        if not each.isdecimal() or not int(each) or gpus_per_node % int(each):
            raise ConfigError(f"--setting SERVERS_PER_NODE={each}: it must divide the {gpus_per_node} GPUs of a node")
        options = self.given.get("SERVER_OPTIONS", "").split()
        check_options(options, SERVED, "--setting SERVER_OPTIONS")
        if bool(self.given.get("CONTAINER_IMAGE")) != bool(self.given.get("SERVER_IMAGE")):
            raise ConfigError(
                "where training runs in a container, the servers run in another one, which has vLLM: give --container "
                "and --setting SERVER_IMAGE=..., or neither"
            )
        if self.skip_files:
            return
        python = Path(self.given.get("SERVER_PYTHON") or REPO / PYTHON)
        if not self.given.get("SERVER_IMAGE") and not python.exists():
            raise ConfigError(
                f"{python} is not there: make it with `make .venv-engines/installed`, or give the Python of another "
                "environment with vLLM, --setting SERVER_PYTHON=..."
            )
        if (model := self.given.get("SERVER_MODEL")) and not _has_weights(model):
            raise ConfigError(f"--setting SERVER_MODEL={model}: this is no Hugging Face folder with weights")

    def _first_model(self, config: RlConfig) -> str:
        """Return the folder that servers start with. Any of the policy's sizes will do: its weights are replaced."""
        if self.skip_files:
            return config.data.tokenizer
        named = [folder for folder in (config.model.init_from, config.data.tokenizer) if not is_url(folder)]
        if not (found := [folder for folder in named if _has_weights(folder)]):
            raise ConfigError(
                "--server-nodes needs --setting SERVER_MODEL=..., a Hugging Face folder of the policy's sizes with "
                "weights and tokenizer, with which servers start before they get the run's weights: neither "
                "model.init_from nor data.tokenizer is one"
            )
        return found[0]


def _has_weights(folder: str) -> bool:
    return (Path(folder) / CONFIG_FILE).is_file() and any(Path(folder).glob("*.safetensors"))


def _name_servers(file: Path, config: RlConfig) -> None:
    named = ", ".join(shown(address) for address in config.rollout.addresses)
    print(
        f"note: {file} draws rollouts from {named}: they must answer when the job starts; --server-nodes starts "
        "servers in the job",
        file=sys.stderr,
    )
