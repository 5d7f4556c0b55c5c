"""The prompts of a run: one table of the samples of all sources, read when they are drawn.

    table = PromptTable(config.data, chat_form="glm45v", max_tokens=4096)
    table.facts                 what the curriculum knows of them, from the files beside the indexes
    table.read(row)             (RolloutPrompt, RlRecord): what an engine continues, and how the answer is scored

The rows are the samples of the sources in order, each in the order of its shards. Opening the table reads no tar.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.urls import is_url, shown
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.domains import build_sample
from data_pipeline.domains.rl_record import TIERS, RlRecord, read_rl_record
from data_pipeline.encoding.encode import LongSample
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample, DataError, LostShard
from data_pipeline.loading.source import Source
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.shards.lost import LostShards
from data_pipeline.shards.members import index_command
from data_pipeline.shards.prompt_facts import HASHES, Grades, facts_path, grades_path, read_facts, read_grades
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.shard_cache import ShardCache
from rl.curriculum.facts import NO_TIER, PromptFacts
from rl.metric_names import metric_names
from rl.rollouts import RolloutPrompt

SHOWN = 3  # prompts that a message names
MOST_EXPECTED = 4096  # prompts whose images are counted for the pipeline layout


class PromptTable:
    """The prompts of all sources, numbered from 0.

    Attributes:
        tokenizer: Of the run.
        sources: The sources, in the order of `data.sources`.
        facts: What the curriculum knows of each prompt.
        scored: {(data source, verifier): prompts}. What the records call their sources, or the labels of
            `data.sources`.
        pass_scores: From which score on an answer was right, of all gradings of the prompts.
        lengths: int64 [prompts], tokens of each prompt, image tokens included.
        contents: uint64 [prompts, 2], hashes of what each prompt asks and of how its answers are scored.
    """

    def __init__(self, config: DataConfig, *, chat_form: str, max_tokens: int) -> None:
        """Open the indexes of the sources, and the facts and grades beside them.

        Args:
            config: The data.* keys.
            chat_form: How the model's chats are written, one of domains.chat.CHAT_FORMS.
            max_tokens: The longest prompt that the run can use.

        Raises:
            DataError: A source holds other samples than prompts, or prompts in another chat form or that are too long;
                two prompts have the same name; a file cannot be used. The message names the prompts and the fix.
        """
        config.check()
        self.tokenizer = GlmTokenizer(config.tokenizer)
        self._budget = PixelBudget(config.image_max_tokens, config.video_max_tokens)
        cache = ShardCache(config.cache_dir, config.cache_bytes)
        self.sources = [_open(source, self.tokenizer, self._budget, cache, chat_form) for source in config.located]
        self._first_rows = np.cumsum([0, *map(len, self.sources)], dtype=np.int64)
        self.lengths = np.concatenate([source.lengths.astype(np.int64) for source in self.sources])
        self.facts, self.scored, self.pass_scores, self.contents = _facts(self.sources, cache)
        self._check_lengths(max_tokens)
        locations = chain.from_iterable(source.locations() for source in self.sources)
        self._lost = LostShards(config.retry_seconds, locations, give_up=config.on_lost_shard == "quarantine")
        self._reader = ShardReader(cache=cache, lost=self._lost)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, row: int) -> tuple[RolloutPrompt, RlRecord]:
        """Read and tokenise a prompt. Its images and videos are measured by their headers: it has no patches yet.

        Args:
            row: Of the table.

        Raises:
            BadSample: It cannot be used: a damaged file, or changed bytes.
            DataError: Its shard is lost, and `data.on_lost_shard` is stop.
        """
        source, row_of_source = self._locate(row)
        stored = source.sample(row_of_source)
        try:
            raw = self._reader.read(stored.shard, stored.sample, stored.tar_fingerprint)
        except LostShard as error:
            if self._lost.give_up:
                raise
            raise DataError(
                f"a shard of source {source.label!r} is lost: {error.detail}. Bring it back and start the run again; "
                "data.on_lost_shard=quarantine continues without its prompts"
            ) from error
        undecoded = LongSample(
            build_sample(raw.record, images=len(raw.images), videos=len(raw.videos), chat_form=stored.chat_form),
            raw.images,
            raw.videos,
            tokenizer=self.tokenizer,
            budget=self._budget,
            sample_id=self.facts.ids[row],
        )
        sample = undecoded.without_patches()
        if len(sample) != self.lengths[row]:
            raise BadSample("length_changed", f"{len(sample)} tokens, but the index says {self.lengths[row]}")
        record = read_rl_record(raw.record)
        images, videos = tuple(raw.images), tuple(raw.videos)
        prompt = RolloutPrompt(sample.sample_id, sample, images, videos, record.thinks, undecoded)
        return prompt, replace(record, source=record.source or source.label)

    def stop_waiting(self) -> None:
        """Wait for lost shards no longer, because the run ends: not now, and not later."""
        self._lost.stop_waiting()

    def close(self) -> None:
        """Close all files. The table can be used again."""
        self._reader.close()

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes with the prompts, their order and their content, but not with paths and grades."""
        digest = blake2b(digest_size=16)
        for source in self.sources:
            digest.update(f"{source.label}:{source.fingerprint}\n".encode())
            for shard in source.shards:
                digest.update(f"{shard.name}:{shard.header.tar_fingerprint}\n".encode())
        return digest.hexdigest()

    def expected_work(self, response_tokens: int = 0) -> tuple[list[int], list[int]]:
        """Return the tokens of prompts with their responses, and the patches of their images and frame pairs.

        Of MOST_EXPECTED prompts. The same on every rank and at every restart.

        Args:
            response_tokens: Tokens that a response is expected to have.
        """
        prompts = self.spread(MOST_EXPECTED)
        lengths = [length + response_tokens for length, _ in prompts]
        return lengths, list(chain.from_iterable(patches for _, patches in prompts))

    def spread(self, most: int) -> list[tuple[int, list[int]]]:
        """Return the tokens of prompts, and the patches of the images and frame pairs of each.

        Args:
            most: Number of prompts, at most; they are spread evenly over the table.
        """
        count = min(len(self), most)
        rows = (np.arange(count) * len(self) // max(count, 1)).tolist()
        places = map(self._locate, rows)
        return [
            (int(self.lengths[row]), list(source.image_patches(place)))
            for row, (source, place) in zip(rows, places, strict=True)
        ]

    def _locate(self, row: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self.sources[number], row - int(self._first_rows[number])

    def _check_lengths(self, max_tokens: int) -> None:
        long = np.flatnonzero(self.lengths > max_tokens)
        if len(long):
            named = ", ".join(f"{self.facts.ids[row]} ({self.lengths[row]:,} tokens)" for row in long[:SHOWN].tolist())
            raise DataError(
                f"{len(long):,} of {len(self):,} prompts are longer than the {max_tokens:,} tokens that a prompt may "
                f"have: {named}{' ...' if len(long) > SHOWN else ''}. Lower data.image_max_tokens or "
                "data.video_max_tokens, allow longer prompts, or build the source without these"
            )


def _open(
    config: SourceConfig, tokenizer: GlmTokenizer, budget: PixelBudget, cache: ShardCache, chat_form: str
) -> Source:
    source = Source(config, tokenizer_hash=tokenizer.hash, budget=budget, cache=cache)
    label, path = source.label, shown(config.path)
    if others := [domain for domain in source.domains if domain != "rl"]:
        count = int(np.isin(source.domain_codes, [source.domains.index(domain) for domain in others]).sum())
        raise DataError(
            f"source {label!r} holds {count:,} samples that are no prompts (domain {', '.join(others)}): train on them "
            "with sft.train or pretrain.train, or make prompts of them with `python -m tools.shard build --set "
            "domain=rl` (docs/data.md)"
        )
    if wrong := [form for form in source.chat_forms if form != chat_form]:
        raise DataError(
            f"source {label!r} holds prompts in the form {wrong[0]}, but this model is asked in the form {chat_form}: "
            f"run {index_command(path, chat_form=chat_form)}"
        )
    if source.epochs:
        raise DataError(
            f"source {label!r} has epochs {source.epochs:g}, but the curriculum decides how often a prompt is drawn: "
            "remove it, and use weight"
        )
    return source


def _facts(
    sources: Sequence[Source], cache: ShardCache
) -> tuple[PromptFacts, Counter[tuple[str, str]], set[float], np.ndarray]:
    """Return what the curriculum knows, and `scored`, `pass_scores` and `contents` of PromptTable. Raises DataError."""
    ids: list[str] = []
    contents = [np.empty((0, 2), np.uint64)]
    scored, pass_scores = Counter[tuple[str, str]](), set[float]()
    kinds: dict[tuple[int, str, str], int] = {}  # (source, data source, category) -> number
    columns: dict[str, list[float]] = {name: [] for name in ("kind", "tier", "passes", "rollouts")}
    for number, source in enumerate(sources):
        for name, table, grades in _shards(source, cache):
            pass_scores.update(grader["pass_score"] for grader in grades.graders if "pass_score" in grader)
            contents.append(np.stack([table.column(hashed).to_numpy() for hashed in HASHES], axis=1))
            for row in table.drop_columns(list(HASHES)).to_pylist():
                key = row["key"]
                ids.append(f"{name}/{key}")
                given = row["source"] or source.label
                scored[given, row["verifier"]] += 1
                columns["kind"].append(kinds.setdefault((number, given, row["category"]), len(kinds)))
                columns["tier"].append(TIERS.index(row["tier"]) if row["tier"] in TIERS else NO_TIER)
                columns["passes"].append(grades.passes.get(key, 0))
                columns["rollouts"].append(grades.rollouts.get(key, 0))
    _check_unique(ids, sources)
    facts = PromptFacts(
        ids=ids,
        kinds=np.array(columns["kind"], np.int64),
        kind_names=metric_names(
            _kind_name(sources[number].label, given, category) for number, given, category in kinds
        ),
        kind_sources=[number for number, _, _ in kinds],
        source_weights=[source.weight for source in sources],
        tiers=np.array(columns["tier"], np.int64),
        passes=np.array(columns["passes"], np.float64),
        rollouts=np.array(columns["rollouts"], np.float64),
    )
    return facts, scored, pass_scores, np.concatenate(contents)


def _shards(source: Source, cache: ShardCache) -> Iterator[tuple[str, pa.Table, Grades]]:
    """Yield the name of each shard, the facts of its prompts, and their grades."""
    for shard, index in source.shard_tables():
        tar = Path(shown(source.location_of(shard.name)))
        facts, grades = (
            _beside(source, path_of(Path(shard.name)).name, cache) or path_of(tar)
            for path_of in (facts_path, grades_path)
        )
        tar_fingerprint = shard.header.tar_fingerprint
        graded = read_grades(tar, tar_fingerprint, file=grades)
        yield shard.name, read_facts(tar, index, tar_fingerprint, file=facts), graded


def _beside(source: Source, name: str, cache: ShardCache) -> Path | None:
    """Return a file beside the shards of a source, or a copy of it in the cache; None if there is none."""
    location = source.location_of(name)
    return cache.find(location) if is_url(location) else Path(location)


def _kind_name(label: str, given: str, category: str) -> str:
    """Return the name of a kind: "label/category", with the data source between if it is another name."""
    return "/".join(filter(None, (label, given if given != label else "", category)))


def _check_unique(ids: Sequence[str], sources: Sequence[Source]) -> None:
    if len(set(ids)) == len(ids):
        return
    [(twice, _)] = Counter(ids).most_common(1)
    shard = twice.partition("/")[0]
    labels = " and ".join(repr(source.label) for source in sources if shard in {entry.name for entry in source.shards})
    raise DataError(
        f"two prompts are called {twice} (sources {labels}), so that their rollouts could not be told apart: build one "
        "of the sources again with another --name"
    )
