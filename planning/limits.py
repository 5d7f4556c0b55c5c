"""What a GPU's memory must hold beside tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from model.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """The memory of a GPU, and what is reserved of it."""

    gpu_memory: float = 79.6  # GiB; what a GPU of 80 GB has
    context: float = 1.0  # GiB of CUDA and the driver
    nccl: float = 2.0  # GiB of NCCL's buffers, for a dozen groups
    workspaces: float = 1.0  # GiB of matrix products and attention
    fragmentation: float = 0.05  # of all tensors: what the allocator cannot use
    imbalance: float = 1.3  # tokens that the busiest expert rank receives, over an even share

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < float("inf") or (name == "imbalance" and value < 1):
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}: give a number of at least {name[0] == 'i'}")

    @property
    def bytes(self) -> float:
        """Bytes that tensors can have, fragmentation included."""
        return (self.gpu_memory - self.context - self.nccl - self.workspaces) * GIB

    def needed(self, tensors: float) -> float:
        """Return the bytes of the GPU that are needed for these bytes of tensors."""
        return tensors * (1 + self.fragmentation) + self.gpu_memory * GIB - self.bytes

    def fits(self, tensors: float) -> bool:
        """Return whether tensors of this size fit, in bytes."""
        return self.needed(tensors) <= self.gpu_memory * GIB

    def describe(self) -> str:
        """Return the reserves in one line."""
        return (
            f"{self.gpu_memory:g} GiB per GPU; reserved {self.context:g} for CUDA, {self.nccl:g} for NCCL, "
            f"{self.workspaces:g} for workspaces, and {self.fragmentation:.0%} of all tensors for fragmentation; the "
            f"busiest expert rank receives {self.imbalance:g} times its share"
        )
