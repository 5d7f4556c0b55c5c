"""What reinforcement learning does around its updates, as far as a GPU must have memory for it.

The embedded engine has the whole model once more on the lead of each data-parallel rank, for the whole run. What it
needs while it draws, and what the publication of weights needs, lives while nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EmbeddedEngineMemory:
    """The embedded engine on a lead; bytes.

    Attributes:
        weights: Of the whole model, for the whole run.
        drawing: Keys, values and probabilities, at most, while rollouts are drawn.
    """

    weights: float
    drawing: float


@dataclass(frozen=True)
class Rollouts:
    """Rollouts and updates of a step.

    Attributes:
        updates: Of the optimizer, in a step.
        publishing: Bytes that a process needs beside the model while weights are handed on.
        engine: The embedded engine; None: servers draw.
        facts: Lines about it, for people: a name and what is said.
        unknown: What is not planned, and what stands in its place.
    """

    updates: int
    publishing: float
    engine: EmbeddedEngineMemory | None
    facts: tuple[tuple[str, str], ...]
    unknown: tuple[str, ...]

    @property
    def resident(self) -> float:
        """Bytes that a lead has for the whole run."""
        return self.engine.weights if self.engine is not None else 0.0

    def between_updates(self, is_lead: bool) -> float:
        """Return the bytes that live at most while nothing is trained."""
        drawing = self.engine.drawing if self.engine is not None and is_lead else 0.0
        return max(drawing, self.publishing)
