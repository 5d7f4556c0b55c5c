"""Pretrain, or continue at a longer context (the same code with another YAML).

torchrun --nproc_per_node N -m pretrain.train --config configs/tiny/pretrain.yaml [dotted.key=value ...]
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

from training.config import RunConfig
from training.launch import main


@dataclass
class PretrainConfig(RunConfig):
    """Pretraining has the keys and defaults of every run."""

    command: ClassVar[str] = "pretrain.train"

    def warnings_of_domains(self, domains: Collection[str]) -> Iterator[str]:
        """Yield a warning where there are chats alone."""
        if set(domains) == {"chat"}:
            yield "every sample is a chat: this looks like fine-tuning, which is sft.train, with other defaults"


if __name__ == "__main__":
    main(PretrainConfig, __doc__)
