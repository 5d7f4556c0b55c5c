"""Read samples from shards in any order."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from xxhash import xxh3_64_intdigest

from common.urls import is_url, shown
from data_pipeline.domains.rl_record import is_foreign_prompt
from data_pipeline.errors import BadSample, LostShard, Unavailable
from data_pipeline.shards.lost import PASSING, LostShards
from data_pipeline.shards.members import Member, ShardSample, index_command
from data_pipeline.shards.shard_cache import ShardCache
from data_pipeline.shards.tar import size_in


@dataclass(frozen=True)
class RawSample:
    """A sample's record, and the bytes of its images and videos."""

    record: dict[str, Any]
    images: list[bytes]
    videos: list[bytes]


class ShardReader:
    """Reads samples from tars in any order, and keeps the most recently used files open."""

    def __init__(self, keep_open: int = 64, cache: ShardCache | None = None, lost: LostShards | None = None) -> None:
        """Create a reader.

        Args:
            keep_open: The largest number of open files.
            cache: Where copies of shards behind a URL are kept.
            lost: How long to wait for a shard that cannot be read; by default not at all.
        """
        self.keep_open, self.cache, self.lost = keep_open, cache or ShardCache(), lost or LostShards()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._fetched_again: set[str] = set()

    def read(self, path: str, sample: ShardSample, tar_fingerprint: str = "") -> RawSample:
        """Read and check one sample.

        Args:
            path: A file or URL.
            sample: Where its members lie.
            tar_fingerprint: The fingerprint of the tar as it was indexed; a URL needs it.

        Raises:
            LostShard: `unreadable_shard`, if the tar is missing or storage fails, even after waiting for it.
            BadSample: `unreadable_shard`, if the tar is shorter than its index says, or another one; `checksum`, if it
                is the right one but bytes of this sample have changed; `bad_record`.
        """
        contents: dict[str, list[bytes]] = {"json": [], "txt": [], "image": [], "video": []}
        for member, data in zip(sample.members, self.read_members(path, sample, tar_fingerprint), strict=True):
            contents[member.kind].append(data)
        return RawSample(parse_record(contents["json"], contents["txt"]), contents["image"], contents["video"])

    def read_members(self, path: str, sample: ShardSample, tar_fingerprint: str = "") -> list[bytes]:
        """Return the bytes of a sample's members. Arguments and errors are those of `read`."""
        try:
            return self._read(path, sample, tar_fingerprint)
        except BadSample:
            if not is_url(path) or path not in self._open or path in self._fetched_again:
                raise
        # A copy in the cache may be bad although the shard is good.
        self._fetched_again.add(path)
        self._close(path)
        self.cache.discard(path, tar_fingerprint)
        return self._read(path, sample, tar_fingerprint)

    def close(self) -> None:
        """Close all files. The reader can be used again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, path: str, sample: ShardSample, tar_fingerprint: str) -> list[bytes]:
        return self.lost.attempt(path, partial(self._read_once, path, sample, tar_fingerprint))

    def _read_once(self, path: str, sample: ShardSample, tar_fingerprint: str, may_wait: bool) -> list[bytes]:
        descriptor = self._descriptor(path, tar_fingerprint, may_wait)
        try:
            contents = [os.pread(descriptor, member.size, member.offset) for member in sample.members]
        except OSError as error:
            self._close(path)
            raise _failure(error, f"{shown(path)} cannot be read ({error.strerror})", may_wait) from error
        for member, data in zip(sample.members, contents, strict=True):
            if xxh3_64_intdigest(data) != member.xxh3:
                raise self._changed(path, descriptor, member, len(data), tar_fingerprint)
        return contents

    @staticmethod
    def _changed(path: str, descriptor: int, member: Member, got: int, tar_fingerprint: str) -> BadSample:
        """Return the error for bytes that are not those of the index."""
        size = os.fstat(descriptor).st_size
        if got < member.size or (tar_fingerprint and size != size_in(tar_fingerprint)):
            return BadSample(
                "unreadable_shard",
                f"{shown(path)} has {size} bytes and is not what was indexed: copy it again, or run "
                f"{index_command(shown(path))}",
            )
        return BadSample("checksum", f"its {member.kind} of {member.size} bytes differs from what was indexed")

    def _descriptor(self, path: str, tar_fingerprint: str, may_wait: bool) -> int:
        descriptor = self._open.get(path, -1)
        if descriptor >= 0:
            self._open.move_to_end(path)
            return descriptor
        self._make_room()
        try:
            if is_url(path):
                delays = () if self.lost.seconds else None  # one loop of attempts, not two
                descriptor = self.cache.open(path, tar_fingerprint, delays=delays, may_wait=may_wait)
            else:
                descriptor = self._open_file(path, tar_fingerprint, may_wait)
        except OSError as error:
            what = f"{shown(path)} cannot be opened ({error.strerror}): restore it"
            raise _failure(error, what, may_wait) from error
        self._open[path] = descriptor
        return descriptor

    def _open_file(self, path: str, tar_fingerprint: str, may_wait: bool) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        if may_wait and self.lost.is_missing(path) and tar_fingerprint and size < size_in(tar_fingerprint):
            os.close(descriptor)
            raise Unavailable(f"{size} of its {size_in(tar_fingerprint)} bytes are back")
        return descriptor

    def _make_room(self) -> None:
        """Close files until one more may be opened, and those that were deleted: they still take up disk space."""
        for path, descriptor in list(self._open.items()):
            if os.fstat(descriptor).st_nlink == 0 or len(self._open) >= self.keep_open:
                self._close(path)

    def _close(self, path: str) -> None:
        os.close(self._open.pop(path))


def _failure(error: OSError, what: str, may_wait: bool) -> Exception:
    """Return the error to raise for what the file system says."""
    if may_wait and error.errno in PASSING:
        return Unavailable(error.strerror or what)
    return LostShard("unreadable_shard", what)


def parse_record(jsons: Sequence[bytes], texts: Sequence[bytes]) -> dict[str, Any]:
    """Return the content of KEY.json, or a record made of KEY.txt, an image's caption, if no JSON names a domain.

    Raises:
        BadSample: `bad_record`, if the files cannot be read, are missing or come twice; `foreign_prompt`.
    """
    if len(jsons) > 1 or len(texts) > 1:
        raise BadSample("bad_record", "two samples of the shard have this key")
    try:
        record = json.loads(jsons[0]) if jsons else {}
        caption = texts[0].decode("utf-8-sig").strip() if texts else None
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_record", f"the record cannot be read: {error}") from error
    _refuse_foreign_prompt(record)
    if caption is not None and not (isinstance(record, dict) and "domain" in record):
        return {"domain": "image_text", "text": caption}
    if not isinstance(record, dict) or not record:
        raise BadSample("bad_record", "the sample has no KEY.json with an object in it")
    return record


def _refuse_foreign_prompt(record: Any) -> None:
    """Refuse a prompt of another tool, which with KEY.txt would become a caption. Raises BadSample."""
    if not isinstance(record, dict) or not is_foreign_prompt(record):
        return
    if record.get("domain") is None or (record["domain"] == "rl" and "messages" not in record):
        raise BadSample(
            "foreign_prompt",
            "KEY.json is a prompt as verl or GLM-V write it: convert the tar with `python -m tools.shard build --input "
            "THE.tar --set verifier=NAME`",
        )
