"""What every engine does: take the policy's weights, and draw rollouts with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from rl.rollouts import Request, Rollout, Sampling

if TYPE_CHECKING:
    from training.step import TrainStep


class Engine(Protocol):
    """A source of rollouts. Every process of the run has one, and they work together.

    Attributes:
        quarantined: prompts of the last call of `generate` that the engine could not answer, with the reason. Their
            groups are not among the rollouts.
    """

    quarantined: dict[str, str]

    def publish(self, trainer: TrainStep, version: int) -> None:
        """Take the weights that the trainer has now. Collective over all processes of the run.

        Args:
            trainer: Of the run.
            version: The iteration after which these weights are, which rollouts will carry; 0 at the start.

        Raises:
            EngineError: The engine did not take them.
        """

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Draw rollouts with the weights published last. Collective over all processes of the run.

        Args:
            requests: The same on every process.
            sampling: Likewise.

        Returns:
            The rollouts of all requests on every process: in the order of the requests, then of their seeds.

        Raises:
            EngineError: The engine did not answer, or not with what was asked for.
            Interrupted: The run was asked to stop before all were drawn. Raised on all processes.
        """

    def close(self) -> None:
        """Release what the engine holds: memory, connections, processes."""
