"""Damaged and hostile shards, from the tar on disk to the packed batch.

A case is a small shard of all domains with something wrong: in a sample (its record, its images), in the tar (bytes,
headers, names, links), or on disk after it was indexed. In each case the shard is refused with a message that names it,
or each of its samples is trained on, rejected or quarantined with a reason; nothing else is written, and nothing hangs.
"""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.encoding.batch import Batch
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import DataError
from data_pipeline.loading.fetch import PackFetcher
from data_pipeline.loading.source import Source
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.plan.plan import Pack, Piece
from data_pipeline.sharding.foreign import index_shards
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.timeout(1800),
]

BUDGET = PixelBudget(image_max_tokens=16, video_max_tokens=30)
SECONDS = 20  # of processor time, at most for a single case
Files = list[tuple[str, bytes]]  # names and contents of a tar

# The reasons with which samples of these shards may be rejected or quarantined.
REASONS = {
    "bad_record",
    "chat_form",
    "checksum",
    "damaged_tar",
    "duplicate_key",
    "empty_answer",
    "extreme_aspect",
    "image_too_large",
    "length_changed",
    "media_mismatch",
    "member_too_large",
    "missing_member",
    "not_a_file",
    "not_a_tar",
    "nothing_to_learn",
    "path_traversal",
    "truncated_tar",
    "unknown_domain",
    "unreadable_image",
    "unreadable_shard",
    "unreadable_video",
    "video_too_large",
    "video_without_frames",
}


# --- good samples -----------------------------------------------------------------------------------------------------


def jpeg(n: int) -> bytes:
    return encoded(pattern(40 + n, 50, n))


def good_files() -> Files:
    """Return a sample of each domain, as the members of a tar."""
    image = {"JPEG": jpeg(1), "PNG": encoded(pattern(33, 44), "PNG"), "WEBP": encoded(pattern(30, 30), "WEBP")}
    chat = [{"role": "user", "content": "<image>Why?"}, {"role": "assistant", "content": "Because."}]
    samples: dict[str, tuple[dict, Files]] = {
        "caption": ({"domain": "image_text", "text": "A square."}, [("0.jpg", image["JPEG"])]),
        "ocr": ({"domain": "ocr", "text": "17.50"}, [("0.png", image["PNG"])]),
        "pages": (
            {"domain": "interleaved", "text": "One <image> two <image>."},
            [("0.png", image["PNG"]), ("1.webp", image["WEBP"])],
        ),
        "boxes": ({"domain": "grounding", "text": "<image> [[1,2,3,4]]"}, [("0.jpg", image["JPEG"])]),
        "video": ({"domain": "video", "text": "It moves."}, [("0.mp4", encoded_video(5, 32, 48))]),
        "plain": ({"domain": "text", "text": "Nothing to see."}, []),
        "chat": ({"domain": "chat", "messages": chat}, [("0.jpg", image["JPEG"])]),
    }
    return [
        (f"{key}.{extension}", data)
        for key, (record, media) in samples.items()
        for extension, data in [("json", json.dumps(record).encode()), *media]
    ]


GOOD = good_files()
SAMPLES, CASES = 7, 12  # of each kind in the tests that always run


def tar_of(files: Files, format: int = tarfile.USTAR_FORMAT) -> bytearray:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return bytearray(buffer.getvalue())


# --- what is wrong with a sample --------------------------------------------------------------------------------------


def png_of_claimed_size(rng: random.Random) -> bytes:
    """Make a few bytes that promise gigabytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", rng.choice([9000, 30_000, 2**31 - 1]), rng.choice([9000, 60_000]), 8, 2, 0, 0, 0)
    bomb = zlib.compress(bytes(200_000))
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(b"x" * 5_000_000)) if rng.random() < 0.5 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + text + chunk(b"IDAT", bomb) + chunk(b"IEND", b"")


def hostile_records(rng: random.Random) -> list[bytes]:
    values: list[Any] = [
        None,
        True,
        -1,
        1e308,
        "",
        "x",
        [],
        {},
        [[]],
        {"a": None},
        ["<image>"],
        "<image>" * 50,
        "\u0000",
        "\ud800",
    ]
    record: dict = {"domain": rng.choice(["image_text", "interleaved", "grounding", "video", "text", "chat", "ocr"])}
    for name in ("text", "messages", "thinking", "domain", "images", "extra"):
        if rng.random() < 0.6:
            record[name] = rng.choice(values)
    message = {"role": rng.choice(["user", "assistant", "system", "tool", 3, None]), "content": rng.choice(values)}
    parts = [{"type": rng.choice(["text", "image", "x", None]), "text": rng.choice(values)} for _ in range(3)]
    chat = {"domain": "chat", "messages": [message, {"role": "assistant", "content": rng.choice([*values, parts])}]}
    return [
        json.dumps(record).encode(),
        json.dumps(chat).encode(),
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"domain": "text", "text": ' + b"9" * 5000 + b"}",
        b'{"domain": "text", "text": NaN}',
        b'{"domain": "text", "text": "' + b"a " * 20_000 + b'"}',
        '{"domain": "text", "text": "<|begin_of_image|><|image|><|end_of_image|>\u202e\uffff"}'.encode(),
        b"\xff\xfe{\x00}",
        b"",
        b"null",
    ]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, replace bytes or cut off the end, often near the beginning."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        position = rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 600))
        match rng.randrange(4):
            case 0:
                changed[position] ^= 1 << rng.randrange(8)
            case 1:
                changed[position : position + 4] = rng.randbytes(4)
            case 2:
                changed[position : position + 64] = bytes(64)
            case 3:
                del changed[max(position, 1) :]
    return bytes(changed)


def one_member(change: Callable[[bytes, random.Random], bytes], *endings: str) -> Callable[[random.Random], bytearray]:
    """Return a maker of tars of which one member with such an extension is changed."""

    def make(rng: random.Random) -> bytearray:
        files = list(GOOD)
        chosen = rng.choice([number for number, (name, _) in enumerate(files) if name.endswith(endings)])
        files[chosen] = (files[chosen][0], change(files[chosen][1], rng))
        return tar_of(files)

    return make


def swapped_members(rng: random.Random) -> bytearray:
    files = list(GOOD)
    first, second = rng.sample(range(len(files)), 2)
    (name, data), (other_name, other_data) = files[first], files[second]
    files[first], files[second] = (name, other_data), (other_name, data)
    return tar_of(files)


def missing_members(rng: random.Random) -> bytearray:
    return tar_of(rng.sample(GOOD, rng.randint(0, len(GOOD) - 1)))


# --- what is wrong with a tar -----------------------------------------------------------------------------------------


def damaged_bytes(rng: random.Random) -> bytearray:
    return bytearray(damaged(bytes(tar_of(GOOD)), rng))


def damaged_header(rng: random.Random) -> bytearray:
    """Replace a field of one header and correct its checksum, so that only the field is wrong."""
    tar = tar_of(GOOD, rng.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    headers, offset = [], 0
    while offset < len(tar) and tar[offset]:
        headers.append(offset)
        offset += 512 + -(-int(bytes(tar[offset + 124 : offset + 135]), 8) // 512) * 512
    header = rng.choice(headers)
    field, width = rng.choice([(0, 100), (100, 8), (124, 12), (124, 12), (124, 12), (156, 1), (157, 100), (345, 155)])
    absurd = [b"7" * width, b"\xff" * width, b"\x80" + b"\xff" * (width - 1), bytes(width), rng.randbytes(width)]
    types = [b"1", b"2", b"3", b"5", b"6", b"S", b"x", b"g", b"L", b"K", b"\0"]
    value = rng.choice(types) if field == 156 else rng.choice(absurd)[:width]
    tar[header + field : header + field + width] = value.ljust(width, b"\0")
    tar[header + 148 : header + 156] = b" " * 8
    tar[header + 148 : header + 156] = b"%06o\0 " % sum(tar[header : header + 512])
    return tar


def hostile_names(rng: random.Random) -> bytearray:
    names = [
        "../../evil",
        "/tmp/glmv-evil",
        "a/../../evil",
        "..",
        "~/evil",
        "C:\\evil",
        "evil\nname",
        "\u202elive",
        ".",
    ]
    name = rng.choice([*names, "x" * 90, "dir/" * 20 + "evil", "-rf", "$(touch evil)", "%n%s", " "])
    extension = rng.choice(["json", "0.jpg", "0.mp4", "txt", "99999999999.jpg", "-1.png", "0.0.jpg", "JSON"])
    files = [(f"{name}.{extension}", data) if rng.random() < 0.3 else (old, data) for old, data in GOOD]
    return tar_of(files, rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))


def links_and_devices(rng: random.Random) -> bytearray:
    buffer = io.BytesIO(bytes(tar_of(GOOD)))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for name in ("caption.1.jpg", "plain.json", "evil.json", "evil.0.jpg"):
            info = tarfile.TarInfo(name)
            info.type = rng.choice(
                [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
            )
            info.linkname = rng.choice(["/etc/passwd", "../../evil", "caption.json", name])
            tar.addfile(info)
    return bytearray(buffer.getvalue())


def hostile_pax(rng: random.Random) -> bytearray:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in GOOD:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if rng.random() < 0.3:
                key = rng.choice(["path", "size", "GNU.sparse.map", "GNU.sparse.size", "mtime", "linkpath", "comment"])
                info.pax_headers = {key: rng.choice(["../../evil", "-1", "99999999999999", "0,1,2", "nan", "x" * 5000])}
            tar.addfile(info, io.BytesIO(data))
    return bytearray(buffer.getvalue())


def written_twice(rng: random.Random) -> bytearray:
    return tar_of([*GOOD, *rng.sample(GOOD, 3)])


# --- what happens to a shard after it was indexed ---------------------------------------------------------------------


def cut(tar: bytes, rng: random.Random) -> bytes:
    return tar[: rng.randrange(len(tar))]


def replaced(tar: bytes, rng: random.Random) -> bytes:
    """Return another shard of the same name, whose first samples are the same."""
    same = rng.randrange(len(GOOD))
    return bytes(tar_of(GOOD[:same] + rng.sample(GOOD[same:], len(GOOD) - same)))


def zeroed(tar: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(tar))
    end = min(len(tar), begin + rng.randrange(5000))
    return tar[:begin] + bytes(end - begin) + tar[end:]


BEFORE: dict[str, Callable[[random.Random], bytearray]] = {
    "a damaged image": one_member(damaged, "jpg", "png", "webp"),
    "a damaged video": one_member(damaged, "mp4"),
    "a damaged record": one_member(damaged, "json"),
    "a hostile record": one_member(lambda _, rng: rng.choice(hostile_records(rng)), "json"),
    "a bomb": one_member(lambda _, rng: png_of_claimed_size(rng), "jpg", "png", "webp"),
    "another kind of file": one_member(lambda _, rng: rng.choice(GOOD)[1], "jpg", "png", "webp", "mp4", "json"),
    "an empty file": one_member(lambda _, rng: b"", "jpg", "png", "webp", "mp4", "json"),
    "swapped members": swapped_members,
    "members written twice": written_twice,
    "missing members": missing_members,
    "damaged bytes": damaged_bytes,
    "a damaged header": damaged_header,
    "hostile names": hostile_names,
    "links and devices": links_and_devices,
    "hostile PAX headers": hostile_pax,
}
AFTER: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes damaged later": damaged,
    "cut later": cut,
    "replaced later": replaced,
    "zeroed later": zeroed,
}
# Kinds after which every sample is still listed, good or bad.
COMPLETE_TARS = {
    "a damaged image",
    "a damaged video",
    "a damaged record",
    "a hostile record",
    "a bomb",
    "another kind of file",
    "an empty file",
    "swapped members",
    *AFTER,
}


# --- from tar to batch ------------------------------------------------------------------------------------------------


def run_case(kind: str, rng: random.Random, folder: Path, tokenizer: GlmTokenizer) -> Counter[str]:
    """Return what became of the samples of one shard, counted by reason."""
    shard = folder / "shard-00000.tar"
    shard.write_bytes(BEFORE[kind](rng) if kind in BEFORE else tar_of(GOOD))
    try:
        counts = index_shards([shard], tokenizer=tokenizer.folder)
        source = Source(SourceConfig(str(folder)), tokenizer_hash=tokenizer.hash, budget=BUDGET)
    except DataError as error:
        return Counter(["shard refused" if kind in BEFORE and shard.name in str(error) else f"stopped by {error}"])
    assert len(source) == counts.samples
    outcomes = counts.rejected
    if kind in AFTER:
        shard.write_bytes(AFTER[kind](shard.read_bytes(), rng))
    fetcher = PackFetcher([source], tokenizer, BUDGET, seq_length=1 << 17, segment_multiple=8)
    for row in range(len(source)):
        batch = fetcher[Pack([Piece(0, row, 0, int(source.lengths[row]))])]
        assert isinstance(batch, Batch), batch
        stored = source.sample(row)
        name = f"{stored.shard_name}/{stored.sample.key}"
        failed = [record["reason"] for record in batch.quarantined if f"{record['shard']}/{record['key']}" == name]
        assert len(failed) + (batch.sample_ids[0] == name) == 1, f"{name} is unaccounted for"
        outcomes[failed[0] if failed else "read"] += 1
    return outcomes


def run_cases(cases: int, seed: int, tmp_path: Path, tokenizer: GlmTokenizer) -> dict[str, Counter[str]]:
    """Return the outcomes by kind of damage."""
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in (*BEFORE, *AFTER)}
    kinds = list(outcomes)
    folder = tmp_path / "outer" / "shards"
    folder.mkdir(parents=True)
    for case in range(cases):
        kind = kinds[case % len(kinds)]
        began = time.process_time()
        outcomes[kind] += run_case(kind, random.Random(f"{seed} {case}"), folder, tokenizer)
        assert time.process_time() - began < SECONDS, f"case {case}, {kind}"
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    expected = ("shard-00000.tar", "shard-00000.index.arrow", "catalogue.arrow", "rejected.jsonl")
    assert written <= {"outer", "outer/shards", *(f"outer/shards/{name}" for name in expected)}
    assert not Path("/tmp/glmv-evil.json").exists()
    assert {reason for counter in outcomes.values() for reason in counter} <= {"read", "shard refused", *REASONS}
    return outcomes


def test_few_hundred_damaged_shards_are_read_or_refused(tmp_path, tokenizer):
    outcomes = run_cases(CASES * len(BEFORE | AFTER), 1, tmp_path, tokenizer)
    for kind, counter in outcomes.items():
        assert counter["read"], f"no sample could be read beside {kind}"
        if kind in COMPLETE_TARS:
            assert counter.total() == CASES * SAMPLES, kind
    assert len(sum(outcomes.values(), Counter())) >= 9


@pytest.mark.slow
def test_ten_thousand_damaged_shards_are_read_or_refused(tmp_path, tokenizer, capsys):
    outcomes = run_cases(10_000, 2, tmp_path, tokenizer)
    with capsys.disabled():
        for kind, counter in outcomes.items():
            print(f"\n{kind:24}", ", ".join(f"{count} {reason}" for reason, count in counter.most_common()), end="")
        print("\ntotal:", dict(sum(outcomes.values(), Counter()).most_common()))
