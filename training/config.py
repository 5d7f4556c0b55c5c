"""A run's configuration: YAML, dotted overrides, and what must hold between the keys.

Each section is a dataclass beside the code it configures; `RunConfig` only composes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.config import DataConfig
from model.backend import require_fp8, select_backend
from model.config import ConfigError
from model.parallel import ParallelConfig
from model.parts import check_freeze
from model.recompute import RecomputeConfig
from training.optimizer import OptimizerConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FP8_RECIPES = ("none", "blockwise", "mxfp8", "tensorwise", "delayed")
RESUME = ("auto", "never")


@dataclass
class ModelChoice:
    """Which model, where its weights come from, and what computes it."""

    preset: str = ""  # a name in configs/model/; may be left out where init_from says it
    init_from: str = ""  # a Hugging Face folder, a checkpoint or a run's folder; empty: random weights
    backend: str = "auto"  # transformer_engine, torch, or auto: the first where there is a GPU and it is installed


@dataclass
class TrainConfig:
    """The run itself."""

    steps: int = 0
    global_batch_size: int = 0  # packs of seq_length tokens that one optimizer step sees
    micro_batch_size: int = 1  # a pack is a micro-batch
    seq_length: int = 0
    seed: int = 1234  # of the weights, where they are random
    output_dir: str = ""
    precision: str = "bf16"  # fp32, or bf16 with float32 main weights and gradients
    deterministic: bool = False  # refuse kernels that could give other bits in another run
    check_determinism: int = 0  # every so many steps, compute the gradients twice and stop if a bit differs; 0: never

    def check(self) -> None:
        for key in ("steps", "global_batch_size", "seq_length"):
            if getattr(self, key) < 1:
                raise ConfigError(f"train.{key}={getattr(self, key)}: give a positive number")
        if self.micro_batch_size != 1:
            raise ConfigError(
                f"train.micro_batch_size={self.micro_batch_size}: samples are packed, and one pack is one micro-batch; "
                "set it to 1 and choose the amount of work with train.seq_length and train.global_batch_size"
            )
        if not self.output_dir:
            raise ConfigError("train.output_dir is empty: give the folder of the run")
        if self.check_determinism < 0:
            raise ConfigError(f"train.check_determinism={self.check_determinism} must not be negative; 0 is never")
        _one_of("train.precision", self.precision, PRECISIONS)


@dataclass
class MoeConfig:
    """Balancing of experts (report, section 3.2). Without effect on the dense model."""

    balance_loss_coeff: float = 1e-4  # sequence-level balance loss
    expert_bias_update_rate: float = 1e-3  # loss-free balancing

    def __post_init__(self) -> None:
        for key in ("balance_loss_coeff", "expert_bias_update_rate"):
            if getattr(self, key) < 0:
                raise ConfigError(f"moe.{key}={getattr(self, key)} must not be negative")


@dataclass
class Fp8Config:
    """FP8 training, which needs Transformer Engine."""

    recipe: str = "none"

    def __post_init__(self) -> None:
        _one_of("fp8.recipe", self.recipe, FP8_RECIPES)
        require_fp8(self.recipe)


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and what happens to a run that is found in the output folder."""

    save_interval: int = 1000  # steps; 0: never, not even at the end
    keep_last: int = 0  # 0: keep all
    resume: str = "auto"  # auto: continue the run found in train.output_dir; never: refuse to touch it
    allow_changes: bool = False  # resume although keys that decide the model or the plan of data have changed

    def __post_init__(self) -> None:
        _one_of("checkpoint.resume", self.resume, RESUME)
        for key in ("save_interval", "keep_last"):
            if getattr(self, key) < 0:
                raise ConfigError(f"checkpoint.{key}={getattr(self, key)} must not be negative")


@dataclass
class RunConfig:
    """All keys of a run."""

    model: ModelChoice = field(default_factory=ModelChoice)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    freeze: list[str] = field(default_factory=list)  # parts that are not trained: vision, adapter, decoder
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def check(self) -> None:
        """What must hold whatever the number of processes. Each section has checked itself."""
        train, optimizer = self.train, self.optimizer
        train.check()
        if not self.model.preset and not self.model.init_from:
            raise ConfigError(
                "model.preset and model.init_from are both empty: name a preset or a folder to start from"
            )
        select_backend(self.model.backend, PRECISIONS[train.precision])
        if optimizer.warmup_steps >= train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={optimizer.warmup_steps} must be below train.steps={train.steps}"
            )
        if train.seq_length % self.data.segment_multiple:
            raise ConfigError(
                f"train.seq_length={train.seq_length} must be a multiple of "
                f"data.segment_multiple={self.data.segment_multiple}, to which every sample is padded"
            )
        check_freeze(self.freeze)
        self.data.check()

    @property
    def balancing(self) -> MoeConfig:
        """`moe`, but a frozen decoder's experts are not balanced."""
        return MoeConfig(balance_loss_coeff=0.0, expert_bias_update_rate=0.0) if "decoder" in self.freeze else self.moe

    def check_world(self, world_size: int) -> None:
        """What depends on the number of processes."""
        ranks = self.parallel.data_parallel_size(world_size)
        if self.train.global_batch_size % ranks:
            raise ConfigError(
                f"train.global_batch_size={self.train.global_batch_size} is not a multiple of the {ranks} "
                f"data-parallel ranks that {world_size} processes make"
            )
        self.parallel.check_micro_batches(self.train.global_batch_size // ranks)


def _one_of(key: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value!r}: choose one of {', '.join(choices)}")


# --- reading ----------------------------------------------------------------------------------------------------------

Schema = TypeVar("Schema", bound=RunConfig)


def load_config(schema: type[Schema], path: Path, overrides: Sequence[str] = ()) -> Schema:
    """Read a YAML file and `dotted.key=value` overrides into `schema`.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the nearest known one is named), a value is of the
            wrong type, or keys contradict each other.
    """
    if not path.is_file():
        raise ConfigError(f"--config {path}: {'this is a folder' if path.is_dir() else 'there is no such file'}")
    if malformed := [o for o in overrides if "=" not in o]:
        raise ConfigError(f"{malformed[0]!r} is not an override; write dotted.key=value")
    try:
        layers = [OmegaConf.load(path), *(_read_override(override) for override in overrides)]
        for layer in layers:
            _refuse_unknown_keys(schema, OmegaConf.to_container(layer))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *layers))
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{path} with the overrides given: {key}{str(error).splitlines()[0]}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    assert isinstance(config, schema)
    config.check()
    return config


def _read_override(override: str) -> Any:
    # "key=" sets an empty string, not YAML's null.
    text = f"{override}''" if override.endswith("=") else override
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{override!r} cannot be read: {str(error).splitlines()[0]}") from None


def _refuse_unknown_keys(schema: type, content: Any) -> None:
    known = dict(_dotted_keys(schema))
    for key in _keys_of(content):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(f"unknown key {key!r}; the nearest known one is {near[0]!r}")


def _dotted_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every key of a schema; the items of a list have the list's name."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        kind = hints[f.name]
        yield prefix + f.name, kind
        for inner in (kind, *get_args(kind)):
            if isinstance(inner, type) and is_dataclass(inner):
                yield from _dotted_keys(inner, f"{prefix}{f.name}.")


def _keys_of(content: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(content, list):
        for item in content:
            yield from _keys_of(item, prefix)
    elif isinstance(content, dict):
        for key, value in content.items():
            yield f"{prefix}{key}"
            yield from _keys_of(value, f"{prefix}{key}.")
