"""Which members of a tar make a sample, where names have more dots than webdataset's convention knows.

The convention: members share the name up to the first dot of the file name, KEY.txt, KEY.0.jpg, KEY.1.jpg. Members
that all follow it are grouped by it alone. Where one of them does not, a text decides: NAME.txt or NAME.json, whatever
dots NAME has, belongs with NAME.jpg, NAME.0.jpg, NAME.1.jpg ...

    KEY        members                                             becomes
    img_22     img_22.05.jpg .05.txt .06.jpg .06.txt               img_22.05 and img_22.06
    3          3.jpg 3.txt 3.mask.png                              3; `.mask.png` is not read, and counted
    s0         s0.input.jpg s0.outputs.txt                         s0: one image and one text with names of FIELDS
    1          1.left.jpg 1.right.jpg 1.caption.txt                rejected as missing_member, with the names
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipeline.errors import BadSample
from data_pipeline.shards.members import Member, kind_of

TEXTS = ("json", "txt")  # kinds of members
# What the only image (video, text) of a sample may be called: KEY.image.jpg, KEY.caption.txt.
FIELDS = {
    "image": ("", "image", "img", "input", "inputs", "photo"),
    "video": ("", "video", "input", "inputs"),
    "txt": ("", "text", "caption", "output", "outputs", "target", "response"),
    "json": ("", "text", "caption", "output", "outputs", "target", "response"),
}
_SHOWN = 4  # names in a message


@dataclass(frozen=True, slots=True)
class Found:
    """A member that a sample may have."""

    extension: str  # what follows the first dot of its file name: "jpg", "0.jpg", "0 (Clean Version).jpg"
    kind: str  # as in Member, of its last extension
    member: Member | None  # None: `error` says why it cannot be used
    error: BadSample | None = None
    count: int = 1  # members that this is; 0 for damage that is not a member

    @property
    def stem(self) -> str:
        """What lies between the key and the last extension: "", "0", "0 (Clean Version)"."""
        return self.extension.rpartition(".")[0]


@dataclass
class Group:
    """What the members that share a key become."""

    members: dict[str, dict[tuple[str, int], Member]] = field(default_factory=dict)  # by key of a sample, then place
    errors: list[tuple[str, BadSample]] = field(default_factory=list)  # (key, why it is rejected)
    rejected: dict[str, int] = field(default_factory=dict)  # members of rejected samples, by key
    not_read: list[Found] = field(default_factory=list)

    def reject(self, key: str, error: BadSample, members: int) -> None:
        """Reject a sample, or a member of it."""
        self.errors.append((key, error))
        self.rejected[key] = self.rejected.get(key, 0) + members


def group_members(key: str, found: Sequence[Found]) -> Group:
    """Group members that share the name up to the first dot, `key`, into samples."""
    group = Group()
    places = [kind_of(one.extension) for one in found]
    if all(kind is not None for kind, _ in places):
        _add_sample(
            group, key, [((kind or "", number), one) for (kind, number), one in zip(places, found, strict=True)]
        )
        return group
    claims, unclaimed = _claim(found)
    whole = {stem: claim for stem, claim in claims.items() if any(one.kind not in TEXTS for _, one in claim)}
    lonely = {stem: claim for stem, claim in claims.items() if stem not in whole}
    if not whole and (fields := _by_fields(found)) is not None:
        chosen = [one for _, one in fields]
        group.not_read += [one for one in found if one not in chosen and one.error is None]
        _add_sample(group, key, fields)
        _add_errors(group, key, [one for one in found if one not in chosen])
        return group
    if "" in claims:  # KEY.txt: others are not read
        _add_sample(group, key, claims[""])
        rest = [*unclaimed, *(one for stem, claim in lonely.items() if stem for _, one in claim)]
        group.not_read += [one for one in rest if one.error is None]
        _add_errors(group, key, rest)
    elif unclaimed:
        _reject_all(group, key, [*unclaimed, *(one for claim in lonely.values() for _, one in claim)])
    else:
        whole = claims  # texts alone are samples, too
    for stem, claim in whole.items():
        if stem:
            _add_sample(group, f"{key}.{stem}", claim)
    return group


_Claim = list[tuple[tuple[str, int], Found]]  # members of a sample with their places, (kind, number)


def _claim(found: Sequence[Found]) -> tuple[dict[str, _Claim], list[Found]]:
    """Return the members that belong with each text, by its stem, and the images and videos of no text."""
    claims: dict[str, _Claim] = {one.stem: [] for one in found if one.kind in TEXTS}
    unclaimed = []
    for one in found:
        front, _, number = one.stem.rpartition(".")
        if one.stem in claims:
            claims[one.stem].append(((one.kind, 0), one))
        elif number and front in claims and kind_of(f"{number}.jpg")[0]:
            claims[front].append(((one.kind, int(number)), one))
        else:
            unclaimed.append(one)
    return claims, unclaimed


def _by_fields(found: Sequence[Found]) -> _Claim | None:
    """Return the sample of one image or video and its text that have names of FIELDS, or None."""
    media = [one for one in found if one.kind not in TEXTS]
    if len(media) != 1 or media[0].stem not in FIELDS[media[0].kind]:
        return None
    texts = [one for one in found if one.kind in TEXTS and one.stem in FIELDS[one.kind]]
    if not texts or len({one.kind for one in texts}) < len(texts):
        return None
    return [((one.kind, 0), one) for one in (*texts, *media)]


def _add_sample(group: Group, key: str, claim: _Claim) -> None:
    """Add a sample, or the reasons why it is rejected."""
    members: dict[tuple[str, int], Member] = {}
    errors: list[tuple[BadSample, int]] = []
    for place, one in claim:
        if one.member is None:
            errors.append((one.error or BadSample("missing_member", one.extension), one.count))
        elif place in members:
            what = f"{key} has two files for one place: the second is {one.extension}"
            errors.append((BadSample("duplicate_key", what), one.count))
        else:
            members[place] = one.member
    if not errors and (gap := _gap(members)):
        errors = [(BadSample("missing_member", gap), 0)]
    if not errors:
        group.members[key] = members
        return
    for error, count in errors:
        group.reject(key, error, count)
    group.rejected[key] += len(members)


def _add_errors(group: Group, key: str, found: Sequence[Found]) -> None:
    """Reject members beside a sample that cannot be used."""
    for one in found:
        if one.error is not None:
            group.reject(f"{key}.{one.stem}".rstrip("."), one.error, one.count)


def _reject_all(group: Group, key: str, found: Sequence[Found]) -> None:
    """Reject members of which it is not clear what belongs together."""
    _add_errors(group, key, found)
    usable = [one for one in found if one.error is None]
    if usable:
        names = ", ".join(f"{key}.{one.extension}" for one in usable[:_SHOWN]) + ", ..." * (len(usable) > _SHOWN)
        detail = f"it is not clear what belongs together of {names}: name them KEY.jpg and KEY.txt, or KEY.0.jpg ..."
        group.reject(key, BadSample("missing_member", detail), len(usable))


def _gap(members: dict[tuple[str, int], Member]) -> str | None:
    """Say which image or video is missing although a later one exists."""
    for kind in ("image", "video"):
        numbers = sorted(number for other, number in members if other == kind)
        for expected, number in enumerate(numbers):
            if number != expected:
                return f"{kind} {number} without {kind} {expected}"
    return None
