"""Fine-tune on chats, from a pretrained model.

torchrun --nproc_per_node N -m sft.train --config configs/tiny/sft.yaml [dotted.key=value ...]
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from model.config import ConfigError
from training.config import RunConfig
from training.launch import main
from training.optimizer_config import OptimizerConfig


@dataclass
class SftConfig(RunConfig):
    """Fine-tuning differs from pretraining in where it starts and in its smaller steps.

    The report gives 32,768 tokens per pack and 32 packs per step, but no learning rate: these are this project's.
    """

    command: ClassVar[str] = "sft.train"

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=5e-6, min_lr=5e-7, weight_decay=0.0, beta2=0.98)
    )

    def check(self) -> None:
        """Check the keys of a run, and that there is a model to start from."""
        super().check()
        if not self.model.init_from:
            raise ConfigError("model.init_from is empty: fine-tuning starts from a pretrained model; name its folder")

    def warnings_of_domains(self, domains: Collection[str]) -> Iterator[str]:
        """Yield a warning where there is no chat."""
        if "chat" not in domains:
            yield "no sample is a chat: this looks like pretraining, which is pretrain.train, with other defaults"


if __name__ == "__main__":
    main(SftConfig, __doc__)
