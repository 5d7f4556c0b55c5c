"""A dry look at an input: what it is taken for, and what becomes of its names, without writing anything.

Reads the first items of each input alone, so that it takes a second for an input of any size. Media are opened, not
decoded. Nothing here imports torch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data_pipeline.domains import build_sample
from data_pipeline.domains.rl_record import read_rl_record
from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Input, NotRead, ReadsFirst, Rejected
from data_pipeline.media.image_files import probe_image
from data_pipeline.sample import Sample
from data_pipeline.sharding.fields import unused_fields, unused_message_keys
from data_pipeline.sharding.tasks import PromptCheck

MOST_ITEMS = 64  # of an input
SECONDS = 0.5  # after which no further item of an input is read; the first of its units is read in any case


@dataclass(frozen=True)
class Seen:
    """A sample of a preview."""

    draft: Draft  # what was read
    sample: Sample  # what it becomes
    sizes: list[tuple[int, int]]  # (height, width) of its images, pixels


@dataclass
class Preview:
    """What the first items of an input become."""

    kind: str
    paths: tuple[str, ...]
    seen: int = 0  # drafts and rejections
    samples: dict[str, Seen] = field(default_factory=dict)  # the first of each domain
    read: Counter[str] = field(default_factory=Counter)  # "column img -> images", "text" and so on: names that are read
    unused: Counter[str] = field(default_factory=Counter)  # names that are stored but not used
    not_read: Counter[str] = field(default_factory=Counter)  # names of what is in no sample
    rejected: Counter[str] = field(default_factory=Counter)  # by reason
    examples: dict[str, Rejected] = field(default_factory=dict)  # the first rejection of each reason

    def add(self, found: Draft | Rejected | NotRead, chat_form: str, check_prompt: PromptCheck | None = None) -> None:
        """Count one thing that was read."""
        if isinstance(found, NotRead):
            self.not_read[found.name] += found.count
            return
        self.seen += 1
        if isinstance(found, Draft):
            try:
                self._add_sample(found, chat_form, check_prompt)
                return
            except BadSample as error:
                found = Rejected(found.origin, error.reason, error.detail)
            except (DataError, OSError, MemoryError):
                raise
            except Exception as error:  # rejected by a build, too
                found = Rejected(found.origin, "unreadable_sample", f"{type(error).__name__}: {error}")
        self.rejected[found.reason] += 1
        self.examples.setdefault(found.reason, found)

    def _add_sample(self, draft: Draft, chat_form: str, check_prompt: PromptCheck | None) -> None:
        sizes = [probe_image(image.data) for image in draft.images]
        sample = build_sample(draft.record, images=len(draft.images), videos=len(draft.videos), chat_form=chat_form)
        if check_prompt and sample.domain == "rl":
            check_prompt(read_rl_record(draft.record))
        self.samples.setdefault(sample.domain, Seen(draft, sample, sizes))
        renamed = set(draft.read_as.values())
        unused = unused_fields(draft.record)
        self.read.update(f"{name} -> {became}" for name, became in draft.read_as.items())
        self.read.update(draft.record.keys() - unused - renamed)
        self.unused.update(unused)
        self.unused.update(unused_message_keys(draft.record))
        self.not_read.update(draft.not_read)


def preview(kind: str, given: Input, chat_form: str, check_prompt: PromptCheck | None = None) -> Preview:
    """Read the first items of an input.

    Args:
        kind: Its kind.
        given: The input.
        chat_form: How chats are written.
        check_prompt: As in BuildOptions.

    Raises:
        DataError: There is nothing to read.
    """
    found = Preview(kind, given.paths)
    for entry in _first_entries(given):
        found.add(entry, chat_form, check_prompt)
    return found


def _first_entries(given: Input) -> Iterator[Draft | Rejected | NotRead]:
    began = time.monotonic()
    count = 0
    for unit in given.units():
        found = given.read_first(unit, MOST_ITEMS) if isinstance(given, ReadsFirst) else given.read(unit)
        try:
            for entry in found:
                yield entry
                count += 1
                if count >= MOST_ITEMS or time.monotonic() - began > SECONDS:
                    return
        except BadSample as error:
            yield Rejected(unit.path, error.reason, error.detail)
        except (DataError, OSError, MemoryError):
            raise
        except Exception as error:  # rejected by a build, too
            yield Rejected(unit.path, "unreadable_input", f"{type(error).__name__}: {error}")


def options_of(given: Input) -> Sequence[str]:
    """Return the options of an input with their values: ["domain=", "allow_outside=False"]."""
    names = [name for name in given.__dataclass_fields__ if name != "paths"]
    return [f"{name}={_shown(getattr(given, name))}" for name in names]


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
