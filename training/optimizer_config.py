"""The keys of the optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field

from model.errors import ConfigError
from training.bounds import FRACTION, NOT_NEGATIVE, POSITIVE, SHARE, check_bounds

DECAY_STYLES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "wsd": "WSD"}  # megatron-core's names
COOLDOWN_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")
MAIN_GRADS = ("fp32", "bf16")
MOMENTS = ("fp32", "bf16", "fp16")
BOUNDS = {
    "lr": POSITIVE,
    "eps": POSITIVE,  # where a gradient has always been 0, the update would be 0 / 0
    "warmup_steps": NOT_NEGATIVE,
    "cooldown_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "clip_grad": NOT_NEGATIVE,
    "beta1": FRACTION,
    "beta2": FRACTION,
    "offload_fraction": SHARE,
}


@dataclass
class LrScale:
    """Learning rates of the model's parts (model.parts), relative to the run's."""

    vision: float = 1.0  # factor of lr and min_lr for the vision tower
    adapter: float = 1.0  # factor of lr and min_lr for the adapter
    decoder: float = 1.0  # factor of lr and min_lr for the decoder without its routers
    router: float = 1.0  # factor of lr and min_lr for the routers

    def __post_init__(self) -> None:
        for part, scale in asdict(self).items():
            if not 0 < scale < float("inf"):
                raise ConfigError(
                    f"optimizer.lr_scale.{part}={scale} must be positive and finite; to leave a part as it is, use "
                    "freeze"
                )


@dataclass
class OptimizerConfig:
    """AdamW. The report names no learning rate, schedule or weight decay: these defaults are this project's choice."""

    lr: float = 1e-4  # highest learning rate
    min_lr: float = 1e-5  # learning rate of the last step
    lr_scale: LrScale = field(default_factory=LrScale)
    warmup_steps: int = 0  # steps in which the learning rate rises linearly from 0; below train.steps
    # cosine or linear: from lr after warmup_steps to min_lr at the last step; constant: lr; wsd (warmup, stable, decay;
    # also called constant with cooldown): lr until the last cooldown_steps, which end at min_lr
    decay_style: str = "cosine"
    cooldown_steps: int = 0  # last steps of decay_style=wsd, in which the learning rate falls to min_lr
    cooldown_style: str = "linear"  # shape of that fall: linear, cosine, exponential (halving) or minus_sqrt
    weight_decay: float = 0.1  # decoupled weight decay; biases and norms have none
    beta1: float = 0.9  # decay rate of Adam's first moment
    beta2: float = 0.95  # decay rate of Adam's second moment
    eps: float = 1e-8  # added to the square root of Adam's second moment
    clip_grad: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    overlap_grad_reduce: bool = True  # reduce gradients during the last backward pass of a step
    overlap_param_gather: bool = True  # gather updated weights during the first forward pass of the next step
    main_grads: str = "fp32"  # precision in which gradients are accumulated and reduced: fp32, or bf16 to save memory
    exp_avg_dtype: str = "fp32"  # of Adam's first moment: fp32, bf16 or fp16; below fp32 with Transformer Engine alone
    exp_avg_sq_dtype: str = "fp32"  # of Adam's second moment, likewise
    offload_fraction: float = 0.0  # share of the optimizer state kept and updated in main memory; needs a GPU

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ConfigError(f"optimizer.{key}={getattr(self, key)!r}: choose one of {', '.join(choices)}")
        check_bounds("optimizer", self, BOUNDS)
        self._check_cooldown()
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"optimizer.min_lr={self.min_lr} must be between 0 and optimizer.lr={self.lr}")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigError(
                "optimizer.overlap_param_gather=true needs optimizer.overlap_grad_reduce=true; set both, or neither"
            )
        if self.offload_fraction and self.is_low_precision:
            raise ConfigError(
                f"optimizer.offload_fraction={self.offload_fraction} keeps moments in float32: set "
                "optimizer.exp_avg_dtype and exp_avg_sq_dtype to fp32, or offload_fraction=0"
            )

    def _check_cooldown(self) -> None:
        if self.decay_style == "wsd" and not self.cooldown_steps:
            raise ConfigError(
                "optimizer.decay_style=wsd needs optimizer.cooldown_steps, the last steps in which the rate falls; or "
                "choose decay_style=constant"
            )
        if self.decay_style != "wsd" and self.cooldown_steps:
            raise ConfigError(
                f"optimizer.cooldown_steps={self.cooldown_steps} belongs to optimizer.decay_style=wsd, and the style "
                f"is {self.decay_style}; set the one or remove the other"
            )

    @property
    def is_low_precision(self) -> bool:
        """Whether a moment is kept below float32."""
        return (self.exp_avg_dtype, self.exp_avg_sq_dtype) != ("fp32", "fp32")

    def check_steps(self, steps: int) -> None:
        """Check the schedule against the length of the run.

        Raises:
            ConfigError: warm-up and cooldown do not fit into `steps`.
        """
        if self.warmup_steps >= steps:
            raise ConfigError(f"optimizer.warmup_steps={self.warmup_steps} must be below train.steps={steps}")
        if self.warmup_steps + self.cooldown_steps > steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.warmup_steps} and optimizer.cooldown_steps={self.cooldown_steps} are "
                f"together more than train.steps={steps}"
            )

    def check_precision(self, precision: str) -> None:
        """Check the precisions of gradients and moments against that of the weights, `train.precision`.

        Raises:
            ConfigError: they contradict each other.
        """
        if precision == "fp32" and self.main_grads != "fp32":
            raise ConfigError(
                f"optimizer.main_grads={self.main_grads} with train.precision=fp32: gradients have the precision of "
                "the weights; set main_grads=fp32, or train.precision=bf16"
            )
        if self.is_low_precision and precision == "fp32":
            raise ConfigError(
                "optimizer.exp_avg_dtype and exp_avg_sq_dtype below fp32 need train.precision=bf16; or set both to fp32"
            )

    def check_machine(self) -> None:
        """Check that this machine has what the configuration needs.

        Raises:
            ConfigError: it does not. megatron-core would crash, or ignore the configuration.
        """
        from model.backend import has_fused_adam, has_gpu  # it needs torch

        if self.is_low_precision and not has_fused_adam():
            raise ConfigError(
                "optimizer.exp_avg_dtype and exp_avg_sq_dtype below fp32 need Transformer Engine's FusedAdam, which is "
                "not in use here (it needs a GPU); set both to fp32"
            )
        if self.offload_fraction and not has_gpu():
            raise ConfigError(
                f"optimizer.offload_fraction={self.offload_fraction}: there is no GPU to offload from; set it to 0"
            )
        if self.offload_fraction and not has_fused_adam():  # megatron-core asks for its version
            raise ConfigError(
                f"optimizer.offload_fraction={self.offload_fraction} needs Transformer Engine; install it (README.md "
                "says how), or set it to 0"
            )


CHOICES: dict[str, Collection[str]] = {
    "decay_style": DECAY_STYLES,
    "cooldown_style": COOLDOWN_STYLES,
    "main_grads": MAIN_GRADS,
    "exp_avg_dtype": MOMENTS,
    "exp_avg_sq_dtype": MOMENTS,
}
