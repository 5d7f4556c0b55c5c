"""What a source of records with boxes yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import BadSample


@dataclass(frozen=True)
class Found:
    """A record, or why it cannot be read, and the items that it is made of."""

    origin: str
    record: dict[str, Any] | BadSample
    items: Mapping[str, int]
