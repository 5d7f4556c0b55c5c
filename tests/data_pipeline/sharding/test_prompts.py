"""Shards of prompts: built from verl's tables, indexed again, verified, and refused where nothing could be learned."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from data_pipeline.config import SourceConfig
from data_pipeline.domains.rl_record import RlRecord
from data_pipeline.errors import BadSample, DataError
from data_pipeline.sharding.build import build_shards
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.sharding.verify import VerifyJob, verify_shard
from data_pipeline.shards.index import read_index, write_index
from data_pipeline.shards.prompt_facts import (
    FACTS,
    FactsRow,
    add_grades,
    facts_path,
    grades_path,
    read_facts,
    read_grades,
    write_facts,
)
from tests.data_pipeline.inputs.records.test_prompt_formats import JPEG, VERL, verl_row
from tests.data_pipeline.loaders import loader
from tests.data_pipeline.sharding.builds import contents

pytestmark = pytest.mark.fast


def check_reference(prompt: RlRecord) -> None:
    """Stand in for the check of verifiers, which this package does not know."""
    if not prompt.reference.isdecimal():
        raise BadSample("bad_reference", f"{prompt.reference!r} is not a number")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        verl_row(number, reward_model={"style": "rule", "ground_truth": "7x"[: 1 + number % 2]}) for number in range(6)
    ]
    rows[4]["data_source"] = "other"
    pq.write_table(pa.Table.from_pylist(rows, VERL), tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


@pytest.fixture
def shard(table: Path, tokenizer) -> Path:
    out = table.parent / "out"
    build_shards([table], out, tokenizer=tokenizer.folder, settings=["verifier=math"], check_prompt=check_reference)
    [tar] = out.glob("*.tar")
    return tar


def facts_of(tar: Path) -> list[FactsRow]:
    index = read_index(tar)
    return read_facts(tar, index.table, index.header.tar_fingerprint).to_pylist()


def test_prompts_are_checked_when_they_are_built_and_have_facts_beside_the_index(shard):
    assert {row["domain"] for row in read_index(shard).table.to_pylist()} == {"rl"}
    kept = {"verifier": "math", "category": "math", "tier": ""}
    names = ("key", "source", "verifier", "category", "tier")
    assert [{name: row[name] for name in names} for row in facts_of(shard)] == [
        {"key": "00000-000000", "source": "hiyouga/geometry3k", **kept},
        {"key": "00000-000001", "source": "hiyouga/geometry3k", **kept},
        {"key": "00000-000002", "source": "other", **kept},
    ]
    rejected = [json.loads(line) for line in (shard.parent / "rejected.jsonl").read_text().splitlines()]
    assert [(line["reason"], line["origin"]) for line in rejected] == [
        ("bad_reference", f"train.parquet:{number}") for number in (2, 4, 6)
    ]
    with pa.memory_map(str(facts_path(shard))) as file:  # other programs read it without the last 16 bytes
        assert (
            pa.ipc.open_file(file.read_buffer(file.size() - 16)).read_all().column("verifier").to_pylist()
            == ["math"] * 3
        )


def test_two_builds_are_equal_and_workers_check_too(table, tokenizer):
    for name, executor, workers in (("one", "here", 1), ("two", "processes", 2)):
        build_shards(
            [table],
            table.parent / name,
            tokenizer=tokenizer.folder,
            settings=["verifier=math"],
            executor=executor,
            workers=workers,
            check_prompt=check_reference,
            shard_bytes=1,
        )
    one, two = (contents(table.parent / name) for name in ("one", "two"))
    assert one == two
    assert sum(name.endswith(".prompts.arrow") for name in one) == 3


def test_index_writes_facts_again_and_grades_survive(shard, tokenizer):
    before = facts_of(shard)
    add_grades(shard, {"00000-000001": (3, 8)}, {"model": "first", "samples": 8})
    facts_path(shard).unlink()
    with pytest.raises(DataError, match=r"has prompts but no .*\.prompts\.arrow: run `python -m tools.shard index"):
        facts_of(shard)
    counts = index_shards([shard], tokenizer=tokenizer.folder, check_prompt=check_reference)
    assert (counts.samples, facts_of(shard)) == (3, before)
    add_grades(shard, {"00000-000001": (1, 8), "00000-000000": (8, 8)}, {"model": "second", "samples": 8})
    grades = read_grades(shard, read_index(shard).header.tar_fingerprint)
    assert grades.passes == {"00000-000001": 4, "00000-000000": 8}
    assert grades.rollouts == {"00000-000001": 16, "00000-000000": 8}
    assert [grader["model"] for grader in grades.graders] == ["first", "second"]
    with pytest.raises(DataError, match="holds this grading already"):
        add_grades(shard, {"00000-000001": (1, 8)}, {"samples": 8, "model": "second"})


def test_index_rejects_prompts_of_other_programs_that_cannot_be_scored(shard, tokenizer):
    def refuse_all(prompt: RlRecord) -> None:
        raise BadSample("unknown_verifier", prompt.verifier)

    facts_path(shard).unlink()
    counts = index_shards([shard], tokenizer=tokenizer.folder, check_prompt=refuse_all)
    assert (counts.samples, dict(counts.rejected)) == (0, {"unknown_verifier": 3})
    assert facts_of(shard) == []


def test_facts_and_grades_of_another_tar_are_refused(shard):
    add_grades(shard, {"00000-000000": (1, 2)}, {"model": "m"})
    other = Path(shutil.copy(shard, shard.with_name("other.tar")))
    other.write_bytes(shard.read_bytes() + bytes(10240))
    for path_of in (facts_path, grades_path):
        shutil.copy(path_of(shard), path_of(other))
    index = read_index(shard)
    write_index(other, index.table.to_pylist(), tokenizer_hash=index.header.tokenizer_hash, chat_form="glm45v")
    with pytest.raises(DataError, match="is not of this shard's index: run"):
        facts_of(other)
    with pytest.raises(DataError, match=r"grades another version of other\.tar: remove"):
        read_grades(other, read_index(other).header.tar_fingerprint)
    write_facts(other, [{**row, "key": "x"} for row in facts_of(shard)])
    with pytest.raises(DataError, match="is not of this shard's index: run"):
        facts_of(other)


def read_both(shard: Path) -> None:
    facts_of(shard)
    read_grades(shard, read_index(shard).header.tar_fingerprint)


@pytest.mark.parametrize("path_of", [facts_path, grades_path])
def test_every_flipped_byte_of_facts_and_grades_is_noticed(path_of, shard):
    add_grades(shard, {"00000-000000": (1, 2)}, {"model": "m"})
    good = path_of(shard).read_bytes()
    for place in range(0, len(good), max(1, len(good) // 60)):
        path_of(shard).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(DataError, match=path_of(shard).name):
            read_both(shard)


def test_impossible_grade_is_refused(shard):
    with pytest.raises(DataError, match="00000-000000: 3 right answers of 2 cannot be"):
        add_grades(shard, {"00000-000000": (3, 2)}, {"model": "m"})
    assert not grades_path(shard).exists()


def test_verify_compares_facts_with_the_tar(shard, tokenizer):
    job = VerifyJob(shard, "", str(tokenizer.folder), check_reference)
    assert not verify_shard(job).rejected
    rows = facts_of(shard)
    write_facts(shard, [{**rows[0], "verifier": "ocr"}, *rows[1:]])
    [found] = verify_shard(job).rejected
    assert (found.origin, found.reason) == (f"{shard.name}/{rows[0]['key']}", "wrong_facts")
    facts_path(shard).unlink()
    [found] = verify_shard(job).rejected
    assert (found.origin, found.reason) == (shard.name, "unusable_facts")


def test_shard_without_prompts_has_no_facts(tmp_path, tokenizer):
    (tmp_path / "r.jsonl").write_text('{"domain": "text", "text": "Words."}\n')
    build_shards([tmp_path / "r.jsonl"], tmp_path / "out", tokenizer=tokenizer.folder)
    [tar] = (tmp_path / "out").glob("*.tar")
    assert not facts_path(tar).exists()
    index = read_index(tar)
    assert read_facts(tar, index.table, index.header.tar_fingerprint).schema == FACTS


def test_training_on_prompts_is_refused_at_the_start(shard, data_config):
    prompts = SourceConfig(str(shard.parent), name="questions")
    with pytest.raises(DataError, match=r"source 'questions' holds prompts \(domain rl\).*train on them with rl.train"):
        loader(replace(data_config, sources=[*data_config.sources, prompts]))


def test_own_record_in_a_tar_of_another_program_is_a_prompt(tmp_path, tokenizer):
    import webdataset as wds

    record = {"domain": "rl", "messages": [{"role": "user", "content": "<image>x?"}], "reference": "7", "verifier": "m"}
    with wds.TarWriter(str(tmp_path / "theirs.tar")) as tar:
        tar.write({"__key__": "a", "json": record, "0.jpg": JPEG})
    index_shards([tmp_path / "theirs.tar"], tokenizer=tokenizer.folder, check_prompt=check_reference)
    assert [row["verifier"] for row in facts_of(tmp_path / "theirs.tar")] == ["m"]


@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("domain", [{}, {"domain": "rl"}])
def test_index_refuses_verls_prompts_and_names_the_build(with_text, domain, tmp_path, tokenizer):
    """With a KEY.txt beside it, such a prompt would be indexed as an image with a caption."""
    record = {"prompt": [{"role": "user", "content": "Find x."}], "reward_model": {"ground_truth": "7"}, **domain}
    with wds.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        text = {"txt": "Find x."} if with_text else {}
        writer.write({"__key__": "0", "jpg": JPEG, "json": record, **text})
    counts = index_shards([tmp_path / "theirs.tar"], tokenizer=tokenizer.folder)
    assert (counts.samples, counts.rejected) == (0, {"foreign_prompt": 1})
    assert "tools.shard build --input THE.tar" in (tmp_path / "rejected.jsonl").read_text()
