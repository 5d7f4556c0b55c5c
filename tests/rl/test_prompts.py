"""The table of prompts of a run: what it knows of them, what it reads, and which sources it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.image_sizes import tokens_of
from data_pipeline.sharding.build import build_shards
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards.prompt_facts import add_grades, facts_path
from rl.config import RlConfig
from rl.metric_names import metric_name, metric_names
from rl.prompts import PromptTable
from rl.repeated import warnings_of_held_out, warnings_of_repeated
from rl.sampler import PromptSampler
from tests.data_pipeline.media_files import encoded, pattern

pytestmark = pytest.mark.fast

IMAGES = {"a.jpg": encoded(pattern(84, 112), "JPEG"), "b.png": encoded(pattern(90, 60, 1), "PNG")}
DOTS: list[dict[str, Any]] = [
    {"question": "<image>How many dots?", "answer": "7", "image": "a.jpg", "category": "dots", "tier": "hard"},
    {"question": "<image>Which digit?", "answer": "3", "image": "b.png", "category": "digits", "tier": "very_easy"},
    {"question": "1 + 1?", "answer": "2", "thinking": False, "category": "dots"},
]
CHARTS: list[dict[str, Any]] = [
    {
        "question": "<image> or <image>?",
        "answer": "left",
        "images": ["a.jpg", "b.png"],
        "data_source": "chartqa",
        "settings": {"year": True},
    }
]
Build = Callable[..., SourceConfig]


@pytest.fixture
def build(tmp_path: Path, tokenizer_folder: Path) -> Build:
    for name, data in IMAGES.items():
        (tmp_path / name).write_bytes(data)

    def build(
        folder: str, records: list[dict[str, Any]], *, options: tuple[str, ...] = ("verifier=exact",), **how: Any
    ):
        (tmp_path / f"{folder}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        out = tmp_path / folder
        outcome = build_shards(
            [tmp_path / f"{folder}.jsonl"], out, tokenizer=tokenizer_folder, settings=options, **{"name": folder, **how}
        )
        assert not outcome.counts.rejected
        return SourceConfig(str(out), name=folder)

    return build


def config(tokenizer_folder: Path, *sources: SourceConfig, **changed: Any) -> DataConfig:
    return DataConfig(tokenizer=str(tokenizer_folder), sources=list(sources), retry_seconds=0, **changed)


def opened(tokenizer_folder: Path, *sources: SourceConfig, max_tokens: int = 1000, **changed: Any) -> PromptTable:
    return PromptTable(config(tokenizer_folder, *sources, **changed), chat_form="glm45v", max_tokens=max_tokens)


def test_facts_are_those_of_all_sources_in_order(build, tokenizer_folder):
    """A record without a data source is of the one that its source is called."""
    named = [*DOTS[:2], {**DOTS[2], "data_source": "dots"}]
    dots, charts = build("dots", named, shard_bytes=1), build("charts", CHARTS)
    tar = next(Path(dots.path).glob("*.tar"))
    [key] = {row["key"] for row in _facts(tar)}
    add_grades(tar, {key: (3, 8)}, {"model": "m"})
    facts = opened(tokenizer_folder, dots, SourceConfig(charts.path, weight=2.0, name="charts")).facts
    facts.check(5)
    assert [name.partition("/")[0] for name in facts.ids] == [
        *(f"dots-00000-{number:05d}.tar" for number in range(3)),
        "charts-00000-00000.tar",
    ]
    assert facts.kind_names == ["dots/dots", "dots/digits", "charts/chartqa"]
    assert (facts.kinds.tolist(), facts.kind_sources, facts.source_weights) == ([0, 1, 0, 2], [0, 0, 1], [1.0, 2.0])
    assert facts.tiers.tolist() == [1, 4, -1, -1]  # 0 is the hardest
    graded = facts.rollouts.astype(bool)
    assert (facts.passes[graded].tolist(), facts.rollouts[graded].tolist()) == ([3], [8])


def _facts(tar: Path) -> list[dict[str, str]]:
    from data_pipeline.shards.index import read_index
    from data_pipeline.shards.prompt_facts import read_facts

    index = read_index(tar)
    return read_facts(tar, index.table, index.header.tar_fingerprint).to_pylist()


def test_sources_and_kinds_have_metrics_of_their_own(build, tokenizer_folder):
    """Not those of tiers, of answers without a judge, or of another kind that joins to the same name."""
    records = [{**DOTS[2], "category": ""}, {**DOTS[0], "data_source": "b", "category": "c"}]
    dots, other = build("dots", records), build("other", [{**DOTS[1], "category": "b/c"}])
    sources = [SourceConfig(dots.path, name="tier_0"), SourceConfig(other.path, name="no_judge")]
    facts = opened(tokenizer_folder, *sources).facts
    assert facts.kind_names == ["source/tier_0", "tier_0/b/c", "no_judge/b/c"]
    assert metric_names(["a/b", "tier_0", "a/b", "tier_0"]) == ["a/b", "source/tier_0", "a/b (2)", "source/tier_0 (2)"]
    assert [metric_name(name) for name in ("tier_12", "tier_x", "a/tier_1")] == [
        "source/tier_12",
        "tier_x",
        "a/tier_1",
    ]


def test_prompts_that_are_there_twice_are_named(build, tokenizer_folder):
    """The same question about another image, or without thinking, is another prompt."""
    again = [
        {**DOTS[0], "answer": "8"},
        {**DOTS[1], "category": "other", "tier": ""},
        {**DOTS[0], "image": "b.png"},
        {**DOTS[2], "thinking": True},
        {**DOTS[0], "question": "How many dots?<image>"},
    ]
    dots, more, charts = build("dots", DOTS), build("more", again), build("charts", CHARTS)
    assert not list(warnings_of_repeated(opened(tokenizer_folder, dots, charts)))
    [warning] = warnings_of_repeated(table := opened(tokenizer_folder, charts, dots, more))
    assert warning.startswith(
        "2 of 9 prompts of data.sources ask the same as an earlier one (1 of them with another reference, verifier or "
        f"setting), such as {table.facts.ids[4]} and {table.facts.ids[1]}: "
    )
    held_out, training = opened(tokenizer_folder, more), opened(tokenizer_folder, charts, dots)
    [warning] = warnings_of_held_out(held_out, training)
    named = f"such as {held_out.facts.ids[0]} and {training.facts.ids[1]}: "
    assert warning.startswith(f"2 of 5 held-out prompts ask the same as training prompts, {named}")
    assert not list(warnings_of_held_out(opened(tokenizer_folder, charts), opened(tokenizer_folder, dots)))


def test_tokens_equal_transformers_prompt_with_expanded_images(build, tokenizer_folder):
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    table = opened(tokenizer_folder, build("dots", DOTS), build("charts", CHARTS))
    for row, given in enumerate([*DOTS, *CHARTS]):
        prompt, record = table.read(row)
        parts: list[dict[str, str]] = []
        for piece in given["question"].split("<image>"):
            parts += [{"type": "text", "text": piece}, {"type": "image"}]
        text = hf.apply_chat_template(
            [{"role": "user", "content": parts[:-1]}],
            add_generation_prompt=True,
            enable_thinking=given.get("thinking", True),
            tokenize=False,
        )
        for grid in prompt.sample.grids:
            text = text.replace("<|image|>", "@" * tokens_of(grid), 1)
        assert (
            prompt.sample.input_ids.tolist()
            == hf(text.replace("@", "<|image|>"), add_special_tokens=False)["input_ids"]
        )
        assert not prompt.sample.loss.any()
        assert prompt.images == tuple(IMAGES[name] for name in given.get("images", [given.get("image")]) if name)
        assert (prompt.id, len(prompt.sample)) == (table.facts.ids[row], table.lengths[row])
        assert (record.reference, record.verifier) == (given["answer"], "exact")
        assert prompt.thinks is record.thinks is given.get("thinking", True)
    assert (record.source, record.settings, record.question) == ("chartqa", {"year": True}, "or ?")
    assert table.read(0)[1].source == "dots"


def test_expected_work_counts_images_and_responses(build, tokenizer_folder):
    table = opened(tokenizer_folder, build("dots", DOTS), build("charts", CHARTS))
    lengths, patches = table.expected_work(response_tokens=10)
    assert lengths == (table.lengths + 10).tolist()
    grids = [grid for row in range(len(table)) for grid in table.read(row)[0].sample.grids]
    assert patches == [height * width for height, width in grids]


def test_fingerprint_changes_with_the_content_and_not_with_the_place_or_the_grades(build, tokenizer_folder, tmp_path):
    dots = build("dots", DOTS)
    before = opened(tokenizer_folder, dots).fingerprint
    moved = SourceConfig(str(shutil.copytree(dots.path, tmp_path / "elsewhere")), name="dots")
    add_grades(next(Path(moved.path).glob("*.tar")), {}, {"model": "m"})
    assert opened(tokenizer_folder, moved).fingerprint == before
    changed = build("other", [{**DOTS[0], "answer": "8"}, *DOTS[1:]], name="dots")
    assert opened(tokenizer_folder, SourceConfig(changed.path, name="dots")).fingerprint != before


def test_state_of_prompts_whose_content_has_changed_is_refused(build, tokenizer_folder):
    changed = build("other", [{**DOTS[0], "answer": "8"}, *DOTS[1:]], name="dots")
    before, after = (
        PromptSampler(RlConfig(), opened(tokenizer_folder, source))
        for source in (build("dots", DOTS), SourceConfig(changed.path, name="dots"))
    )
    assert before.table.facts.fingerprint() == after.table.facts.fingerprint()
    before.load_state_dict(before.state_dict())
    with pytest.raises(DataError, match=r"data\.tokenizer .* is not that of the checkpoint: bring it back"):
        before.load_state_dict(before.state_dict() | {"tokenizer": "another"})
    with pytest.raises(DataError, match=r"are not those of the checkpoint: .* checkpoint\.allow_changes=true"):
        after.load_state_dict(before.state_dict())
    after.load_state_dict(before.state_dict(), allow_changes=True)
    assert [line.partition(":")[0] for line in after.changed] == [
        "the content of prompts is not that of the checkpoint"
    ]
    assert not before.changed


def test_shards_behind_a_url_are_read_with_facts_and_grades(build, tokenizer_folder, tmp_path):
    dots = build("dots", DOTS)
    here = opened(tokenizer_folder, dots)
    url = SourceConfig(f"file://{dots.path}", name="dots")
    there = opened(tokenizer_folder, url, cache_dir=str(tmp_path / "cache"))
    assert there.facts.fingerprint() == here.facts.fingerprint()
    assert there.read(1)[0].sample.input_ids.tolist() == here.read(1)[0].sample.input_ids.tolist()
    [tar] = Path(dots.path).glob("*.tar")
    key = here.facts.ids[0].partition("/")[2]
    add_grades(tar, {key: (1, 2)}, {"model": "m"})
    assert opened(tokenizer_folder, url, cache_dir=str(tmp_path / "cache")).facts.passes.tolist() == [1, 0, 0]
    facts_path(tar).unlink()
    with pytest.raises(DataError, match=r"has prompts but no dots-00000-00000\.prompts\.arrow"):
        opened(tokenizer_folder, url, cache_dir=str(tmp_path / "cache"))


CHAT = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]}


def test_other_samples_are_refused_with_the_fix(build, tokenizer_folder):
    chats = build("chats", [CHAT, {"domain": "text", "text": "Words."}], options=())
    with pytest.raises(DataError, match=r"source 'chats' holds 2 samples that are no prompts \(domain chat, text\)"):
        opened(tokenizer_folder, build("dots", DOTS), chats)


def test_prompts_in_another_form_are_refused_and_the_command_in_the_message_helps(build, tokenizer_folder):
    dots = build("dots", DOTS[:2], chat_form="glm41v")
    with pytest.raises(DataError, match=r"holds prompts in the form glm41v, but .* glm45v: run .* --chat-form glm45v`"):
        opened(tokenizer_folder, dots)
    index_shards(sorted(Path(dots.path).glob("*.tar")), tokenizer=tokenizer_folder, chat_form="glm45v")
    assert len(opened(tokenizer_folder, dots)) == 2


def test_long_prompts_are_refused_by_name(build, tokenizer_folder):
    dots = build("dots", [*DOTS, {"question": "why? " * 300, "answer": "so"}])
    table = opened(tokenizer_folder, dots, max_tokens=2000)
    longest = int(table.lengths.argmax())
    said = rf"1 of 4 prompts are longer than the 200 tokens .*: {table.facts.ids[longest]} \([\d,]+ tokens\)\. Lower"
    with pytest.raises(DataError, match=said):
        opened(tokenizer_folder, dots, max_tokens=200)


def test_sources_that_cannot_be_drawn_from_are_refused(build, tokenizer_folder):
    one, two = build("dots", DOTS), build("other", CHARTS, name="dots")
    with pytest.raises(
        DataError, match=r"two prompts are called dots-00000-00000\.tar/.* \(sources 'dots' and 'other'\)"
    ):
        opened(tokenizer_folder, one, two)
    with pytest.raises(DataError, match="source 'dots' has epochs 2, but the curriculum decides"):
        opened(tokenizer_folder, SourceConfig(one.path, epochs=2.0, name="dots"))


def test_damaged_prompt_has_a_reason_and_the_others_are_read(build, tokenizer_folder):
    dots = build("dots", DOTS)
    table = opened(tokenizer_folder, dots)
    [tar] = Path(dots.path).glob("*.tar")
    data = tar.read_bytes()
    place = data.index(IMAGES["b.png"]) + 100
    tar.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(BadSample, match="checksum"):
        table.read(1)
    assert table.read(0)[1].reference == "7"
    table.close()
    tar.unlink()
    with pytest.raises(
        DataError, match=r"a shard of source 'dots' is lost: .*data\.on_lost_shard=quarantine"
    ) as caught:
        table.read(2)
    assert not isinstance(caught.value, BadSample)
