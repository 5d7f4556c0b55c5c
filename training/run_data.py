"""What a run asks of its data, whatever a step takes from it: packs of a plan, or prompts to roll out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.loading.quarantine import Tally
from data_pipeline.loading.source import Source
from data_pipeline.plan.mixture_report import DomainShare, SourceUse


class RunData(Protocol):
    """The data of a run: `PackedLoader` in most stages."""

    tally: Tally

    @property
    def tokenizer(self) -> GlmTokenizer:
        """The tokenizer of all sources."""

    @property
    def sources(self) -> Sequence[Source]:
        """The sources, in the order of data.sources."""

    @property
    def has_media(self) -> bool:
        """Whether any sample has images or videos."""

    @property
    def chat_forms(self) -> Mapping[str, Sequence[str]]:
        """{label: forms} of the sources that contain chats."""

    def expected_work(self) -> tuple[list[int], list[int]]:
        """Return tokens of segments and patches of images such as the run's."""

    def planned_mixture(self) -> dict[str, DomainShare]:
        """Return what the next steps take from every domain; nothing where that is not known."""

    def source_use(self) -> Sequence[SourceUse]:
        """Return how much of every source a step takes; nothing where that is not known."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a crash, as JSON types."""

    def load_state_dict(self, state: dict[str, Any], *, allow_changes: bool = False) -> None:
        """Continue where the state was taken."""

    def stop_waiting(self) -> None:
        """Do not wait any longer for storage: the run was asked to stop."""

    def unread(self) -> None:
        """Take back what was read last: it is not trained on."""

    def close(self) -> None:
        """Release what is held open."""
