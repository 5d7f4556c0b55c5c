"""A run's configuration: YAML, dotted overrides, and what must hold between the keys.

Each section is a dataclass, in a module that does not import torch: `--help` and wrong keys are answered without it.
`RunConfig` only composes them. The comment on a field's line is the key's documentation (training.keys).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from data_pipeline.config import DataConfig
from model.config import ConfigError, GlmvConfig
from model.dispatch import DISPATCHERS, check_dispatch
from model.fp8 import Fp8Config
from model.lora_config import LoraConfig
from model.parallel import ParallelConfig
from model.parts import check_freeze
from model.recompute import RecomputeConfig
from model.verify import VERIFY
from training.bounds import NOT_NEGATIVE, POSITIVE, check_bounds
from training.health import HealthConfig
from training.metrics_config import MetricsConfig, ProfileConfig
from training.optimizer_config import OptimizerConfig
from training.recipe import last_value, merge, read_layers
from training.validation_config import ValidationConfig

if TYPE_CHECKING:
    from model.backend import Backend

PRECISIONS = ("fp32", "bf16")
RESUME = ("auto", "never")
# By train.stage.
COMMANDS = {"pretrain": "pretrain.train", "long_context": "pretrain.train", "sft": "sft.train", "rl": "rl.train"}
MAX_SEED = 2**63 - 1  # of torch's generators


@dataclass
class ModelChoice:
    """Which model, where its weights come from, and what computes it."""

    preset: str = ""  # name of a file in configs/model; optional where model.init_from says which model it is
    init_from: str = ""  # Hugging Face folder (or URL), checkpoint or run folder of the weights; empty: random weights
    init_optimizer: bool = False  # take Adam's moments from model.init_from, too; the steps begin at 1 all the same
    # transformer_engine, torch, or auto: Transformer Engine where it is installed, with a GPU and bf16, else torch; may
    # change when a run resumes
    backend: str = "auto"
    allow_untested_versions: bool = False  # accept megatron-core and Transformer Engine that no test has run with
    max_position_embeddings: int = 0  # longest sequence that the exported config.json allows; 0: as the model has it
    rope_theta: float = 0.0  # base of the decoder's rotary positions; 0: as the model has it

    def __post_init__(self) -> None:
        check_bounds("model", self, {"max_position_embeddings": NOT_NEGATIVE, "rope_theta": NOT_NEGATIVE})


@dataclass
class TrainConfig:
    """The run itself."""

    steps: int = 0  # optimizer steps
    global_batch_size: int = 0  # packs per step, over all ranks
    micro_batch_size: int = 1  # packs per micro-batch: always 1
    seq_length: int = 0  # tokens per pack
    seed: int = 1234  # of random weights
    output_dir: str = ""  # the run folder
    precision: str = "bf16"  # fp32, or bf16 with float32 main weights and gradients
    deterministic: bool = False  # refuse kernels that may give different bits in another run
    # pretrain, long_context, sft or rl: what a recipe is for, and so which command runs it; empty: any
    stage: str = ""
    # collect Python's garbage after every N-th step, on all processes at once, and never in between, so that none waits
    # for the collections of others; 0: whenever Python does
    gc_interval: int = 0
    check_determinism: int = 0  # compute the gradients of every N-th step twice, and stop if a bit differs; 0: never

    def check(self) -> None:
        """Check the keys that have no usable default.

        Raises:
            ConfigError: a value is missing or not allowed.
        """
        check_bounds("train", self, dict.fromkeys(("steps", "seq_length"), POSITIVE))
        check_bounds("train", self, dict.fromkeys(("check_determinism", "gc_interval"), NOT_NEGATIVE))
        _check_seed("train.seed", self.seed)
        if self.micro_batch_size != 1:
            raise ConfigError(
                f"train.micro_batch_size={self.micro_batch_size}: samples are packed, and one pack is one micro-batch; "
                "set it to 1 and choose the amount of work with train.seq_length and train.global_batch_size"
            )
        if not self.output_dir:
            raise ConfigError("train.output_dir is empty: give the folder of the run")
        _one_of("train.precision", self.precision, PRECISIONS)
        if self.stage:
            _one_of("train.stage", self.stage, COMMANDS)


@dataclass
class MoeConfig:
    """Load balancing of the experts (report, section 3.2), which the dense model ignores; and how tokens reach them."""

    balance_loss_coeff: float = 1e-4  # weight of the sequence-level balance loss, which is computed per sample
    expert_bias_update_rate: float = 1e-3  # step of the experts' biases (loss-free balancing)
    # what sends tokens to experts on other ranks: alltoall, or flex (DeepEP; not run on a GPU)
    dispatcher: str = "alltoall"
    shared_expert_overlap: bool = False  # compute the shared expert while tokens travel; not run on a GPU

    def __post_init__(self) -> None:
        _one_of("moe.dispatcher", self.dispatcher, DISPATCHERS)
        check_bounds("moe", self, {"balance_loss_coeff": NOT_NEGATIVE, "expert_bias_update_rate": NOT_NEGATIVE})


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and what happens to a run that is found in the output folder."""

    save_interval: int = 1000  # steps between checkpoints, and one at the end; 0: never
    keep_last: int = 0  # newest checkpoints to keep; 0: all
    keep_every: int = 0  # keep every checkpoint whose step is a multiple of this, whatever keep_last says; 0: none
    async_save: bool = False  # write checkpoints in the background, from a copy of the state in main memory
    resume: str = "auto"  # auto: resume the run found in train.output_dir; never: refuse to touch it
    verify: str = "full"  # check of a checkpoint that is loaded: full (sizes and checksums of its files) or sizes
    allow_changes: bool = False  # resume although keys that decide the model or the data plan have changed

    def __post_init__(self) -> None:
        _one_of("checkpoint.resume", self.resume, RESUME)
        _one_of("checkpoint.verify", self.verify, VERIFY)
        check_bounds("checkpoint", self, dict.fromkeys(("save_interval", "keep_last", "keep_every"), NOT_NEGATIVE))
        if self.save_interval and self.keep_every % self.save_interval:
            raise ConfigError(
                f"checkpoint.keep_every={self.keep_every} is not a multiple of "
                f"checkpoint.save_interval={self.save_interval}: most of these steps are not saved; choose a multiple"
            )
        if self.keep_every and not self.keep_last:
            raise ConfigError(
                f"checkpoint.keep_every={self.keep_every} has no effect, because checkpoint.keep_last=0 keeps every "
                "checkpoint; set checkpoint.keep_last, or remove it"
            )


@dataclass
class RunConfig:
    """All keys of a run."""

    command: ClassVar[str] = ""  # what runs it; empty: a tool that reads the configurations of several

    model: ModelChoice = field(default_factory=ModelChoice)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    # parts not to train: vision, adapter, decoder (with its routers) or router (weights and expert biases)
    freeze: list[str] = field(default_factory=list)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def check(self) -> None:
        """Check what must hold whatever the number of processes. Each section has checked itself.

        Raises:
            ConfigError: a key is missing, or two keys contradict each other.
            DataError: the same, of a data key.
        """
        train, optimizer = self.train, self.optimizer
        train.check()
        self.check_batch()
        if not self.model.preset and not self.model.init_from:
            raise ConfigError(
                "model.preset and model.init_from are both empty: name a preset or a folder to start from"
            )
        if self.model.init_optimizer and not self.model.init_from:
            raise ConfigError("model.init_optimizer=true needs model.init_from, the run to take the moments from")
        self.select_backend()
        optimizer.check_steps(train.steps)
        optimizer.check_precision(train.precision)
        self._check_moe()
        self.data.check()
        _check_seed("data.seed", self.data.seed)
        if train.seq_length % self.data.segment_multiple:
            raise ConfigError(
                f"train.seq_length={train.seq_length} must be a multiple of "
                f"data.segment_multiple={self.data.segment_multiple}, to which every sample is padded"
            )
        check_freeze(self.freeze)
        self.validation.check()

    def check_batch(self) -> None:
        """Check how much a step takes.

        Raises:
            ConfigError: a key is missing or not allowed.
        """
        check_bounds("train", self.train, {"global_batch_size": POSITIVE})

    def describe_packs(self, ranks: int) -> str:
        """Return how many packs a step takes, for people.

        Args:
            ranks: data-parallel ranks.
        """
        packs = self.train.global_batch_size
        each = f"{packs // ranks:,} on each data-parallel rank"
        return f"{packs:,} of {self.train.seq_length:,} tokens per step, {each}"

    def warnings_of_domains(self, domains: Collection[str]) -> Iterator[str]:
        """Yield what is rarely intended about the domains of the data; stages know more."""
        yield from ()

    def _check_moe(self) -> None:
        if self.moe.dispatcher == "flex" and self.train.precision != "bf16":
            raise ConfigError(
                "moe.dispatcher=flex sends tokens in bf16; set train.precision=bf16, or dispatcher=alltoall"
            )
        if self.moe.dispatcher == "flex" and self.train.deterministic:
            raise ConfigError(
                "moe.dispatcher=flex is not known to give the same bits twice; set train.deterministic=false, or "
                "dispatcher=alltoall"
            )
        if self.moe.shared_expert_overlap and self.lora.rank:
            raise ConfigError(
                "moe.shared_expert_overlap=true is not supported with adapters; set it to false, or lora.rank=0"
            )

    @property
    def moe_in_effect(self) -> MoeConfig:
        """`moe`, or no balancing where routers are frozen, by `freeze` or LoRA: its gradient would reach others."""
        frozen = {"decoder", "router"} & set(self.freeze) or self.lora.rank > 0
        return replace(self.moe, balance_loss_coeff=0.0, expert_bias_update_rate=0.0) if frozen else self.moe

    def select_backend(self) -> Backend:
        """Return the modules that compute the model.

        Raises:
            ConfigError: this machine does not have what `model.backend` asks for.
        """
        from model.backend import select_backend  # it needs torch
        from training.dtypes import DTYPES

        dtype, allow_untested = DTYPES[self.train.precision], self.model.allow_untested_versions
        backend = select_backend(self.model.backend, dtype, allow_untested)
        return backend.with_separate_norms() if self.lora.rank else backend

    def check_layout(self, model: GlmvConfig, world_size: int) -> None:
        """Check what depends on the model and on the number of processes.

        Raises:
            ConfigError: the layout is impossible, or the global batch does not divide over the data-parallel ranks or
                the pipeline schedule.
        """
        if "router" in self.freeze and not model.decoder.is_moe:
            raise ConfigError("freeze names router, but the model is dense and has none; remove it")
        self.parallel.check(model, world_size, self.train.seq_length, self.data.segment_multiple)
        check_dispatch(self.moe.dispatcher, self.moe.shared_expert_overlap, model.decoder, self.parallel)
        self.check_shares(world_size)
        self.profile.check(self.train.steps, world_size)

    def check_shares(self, world_size: int) -> None:
        """Check that the ranks can share what a step takes.

        Raises:
            ConfigError: they cannot.
        """
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


def _check_seed(key: str, value: int) -> None:
    if not 0 <= value <= MAX_SEED:
        raise ConfigError(f"{key}={value}: give a number from 0 to {MAX_SEED}")


# --- reading ----------------------------------------------------------------------------------------------------------

Schema = TypeVar("Schema", bound=RunConfig)


def load_config(schema: type[Schema], files: Path | Sequence[Path], overrides: Sequence[str] = ()) -> Schema:
    """Read YAML files, each over the ones before it, and `dotted.key=value` overrides into `schema`.

    Raises:
        ConfigError: a file cannot be read, a key is unknown (the probable ones are named), a value is of the wrong
            type, or keys contradict each other.
    """
    layers = read_layers([files] if isinstance(files, Path) else files, overrides)
    _check_command(schema.command, last_value(layers, "train", "stage"))
    config = merge(schema, layers)
    assert isinstance(config, schema)
    config.check()
    return config


def _check_command(command: str, stage: object) -> None:
    """Check that a configuration is for a command, before its keys are: another stage has other keys.

    Raises:
        ConfigError: the stage that it names is another command's.
    """
    meant = COMMANDS.get(stage, command) if isinstance(stage, str) else command
    if command and meant != command:
        raise ConfigError(
            f"train.stage={stage}: this is not a configuration for {command}; run it with {meant}, or set train.stage= "
            "if it is meant"
        )
