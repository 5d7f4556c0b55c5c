"""The `data.*` keys of a run's configuration (OmegaConf structured configs)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.urls import is_url, shown, url_in
from data_pipeline.errors import DataError
from data_pipeline.media.pixel_budget import MIN_IMAGE_TOKENS

TOO_LONG_CHOICES = ("refuse", "truncate", "split")
ON_LOST_SHARD = ("stop", "quarantine")


@dataclass
class SourceConfig:
    """One source of the mixture."""

    path: str = ""  # folder of shards, one .tar file, or a pattern such as shards/caption-*.tar; or a URL of these
    weight: float = 1.0  # share of the mixture's tokens, relative to the other sources
    name: str = ""  # name in logs and checkpoints; empty: the last part of the path
    epochs: float = 0.0  # times each sample is seen before the source leaves the mixture; 0: endless

    def label(self) -> str:
        """Return the name, or the last part of the path if there is none."""
        return self.name or Path(shown(self.path)).name or self.path


@dataclass
class DataConfig:
    """Where training data comes from and how large its images may become."""

    tokenizer: str = ""  # Hugging Face tokenizer folder (tokenizer.json)
    root: str = ""  # folder or URL in front of relative paths of sources; empty: the folder the command runs in
    sources: list[SourceConfig] = field(default_factory=list)  # the mixture: a list of {path, weight, name, epochs}
    seed: int = 0  # of the order of samples
    num_workers: int = 2  # processes that decode, per data-parallel rank; 0: the training process decodes
    prefetch: int = 2  # packs that each worker holds ready
    # largest share of the samples so far (at least 1,000) that may be quarantined before the run stops
    max_quarantined_fraction: float = 0.01
    retry_seconds: float = 300.0  # how long to wait for a shard that storage has lost during the run
    # a shard that is lost for longer: stop the run, or quarantine its samples
    on_lost_shard: str = "stop"
    image_max_tokens: int = 6144  # largest image, in tokens (transformers: longest_edge = 28*28*2 * this)
    video_max_tokens: int = 30000  # largest video, in tokens
    # samples longer than train.seq_length: refuse counts them as too long, truncate keeps the beginning, split makes
    # several; no image or video is cut, a chat is never split, plain text is always split
    too_long: str = "refuse"
    cache_dir: str = ""  # where each machine keeps shards that are URLs; empty: ~/.cache/glmv-train/shards
    cache_bytes: int = 0  # most bytes of shards to keep there; 0: all
    segment_multiple: int = 8  # every sample is padded to a multiple of this many tokens, at every layout

    @property
    def located(self) -> list[SourceConfig]:
        """The sources with their paths under `root`, unless a path is absolute or a URL."""
        return [self._under_root(source) for source in self.sources]

    def _under_root(self, source: SourceConfig) -> SourceConfig:
        if not self.root or is_url(source.path) or Path(source.path).is_absolute():
            return source
        path = url_in(self.root.rstrip("/"), source.path) if is_url(self.root) else str(Path(self.root, source.path))
        return replace(source, path=path, name=source.label())

    def check(self) -> None:
        """Check the values one by one and together.

        Raises:
            DataError: A value cannot work. The message names its key.
        """
        check_sources("data.sources", self.sources)
        if not self.tokenizer:
            raise DataError("data.tokenizer is empty: give the folder of a Hugging Face tokenizer")
        if self.too_long not in TOO_LONG_CHOICES:
            raise DataError(f"data.too_long is {self.too_long!r}: choose one of {', '.join(TOO_LONG_CHOICES)}")
        if self.on_lost_shard not in ON_LOST_SHARD:
            raise DataError(f"data.on_lost_shard is {self.on_lost_shard!r}: choose one of {', '.join(ON_LOST_SHARD)}")
        if not 0 <= self.retry_seconds < math.inf:
            raise DataError(f"data.retry_seconds is {self.retry_seconds}: give a number of seconds, or 0")
        budgets = (("image_max_tokens", MIN_IMAGE_TOKENS), ("video_max_tokens", MIN_IMAGE_TOKENS))
        for key, least in (*budgets, ("segment_multiple", 1), ("num_workers", 0), ("prefetch", 1)):
            if getattr(self, key) < least:
                raise DataError(f"data.{key} is {getattr(self, key)}: it must be {least} or more")
        if self.cache_bytes < 0:
            raise DataError(f"data.cache_bytes is {self.cache_bytes}: give a number of bytes, or 0 to keep all shards")
        if not 0 <= self.max_quarantined_fraction <= 1:
            raise DataError(
                f"data.max_quarantined_fraction is {self.max_quarantined_fraction}: give a fraction from 0 (stop "
                "at the first quarantined sample) to 1 (never stop)"
            )


def check_sources(key: str, sources: Sequence[SourceConfig]) -> None:
    """Check a list of sources, without opening any.

    Args:
        key: Its name in the configuration.
        sources: The list.

    Raises:
        DataError: It is empty, a value cannot work, or two sources have the same name.
    """
    if not sources:
        raise DataError(f"{key} is empty: name at least one, e.g. {key}=[{{path: shards/}}]")
    for source in sources:
        if not source.path:
            raise DataError(f"a source in {key} has no path: give the folder of its shards")
        if not 0 < source.weight < math.inf:
            raise DataError(
                f"source {source.label()!r} has weight {source.weight}: give a positive weight or remove the source"
            )
        if not 0 <= source.epochs < math.inf:
            raise DataError(f"source {source.label()!r} has epochs {source.epochs}: give 0 for endless, or a number")
    labels = [source.label() for source in sources]
    for label in labels:
        if labels.count(label) > 1:
            raise DataError(f"two sources are called {label!r}: give each its own `name` in {key}")
