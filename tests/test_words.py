"""The public language of the project: plain words in code, messages, tests and pages."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
THIS = Path(__file__).name

# A pattern that may not appear, and the word to use. Underscores count as spaces, so that identifiers are checked too.
BANNED = {
    r"pictures?|pictured": "image",
    r"mend|mends|mended|mending": "fix",
    r"set aside|sets aside|setting aside": "rejected, filtered or quarantined",
    r"passed over|passes over|pass over": "skipped",
    r"left out|leaves out|leave out": "rejected, filtered, quarantined, omitted",
    r"goes on|going on|went on|go on": "resume, continue",
    r"anew": "again, new",
    r"(the )?whole road|the road": "pipeline, end to end",
    r"want of|lack of memory": "out of memory",
    r"by lot|drawn by lot|lots?": "at random, rng",
    r"so many|as many as there are": "a number: N per M",
    r"the dead|of the dead": "the process that died",
    r"whoever|whosoever": "the process (user, ...) that",
    r"thereby|hence|thus|herein|thereof|wherein": "so",
    r"nothing but|save for(?! backward)|none but": "only, except",
    r"all alike": "the same for all",
    r"companions?": "hf_files",
    r"blame|blamed|to blame": "cause",
    r"seldom|oft|ere": "rarely",
    r"stead|in its stead": "in place of",
    r"bears the name|bears": "has the name",
    r"is told of|are told of|is told that": "is reported",
    r"innermost|uttermost|idlest|commonest|likeliest": "most ...",
    r"twins?": "variant",
}

# "clip" has two senses: an excerpt that the input kind `clips` cuts out of a video, and to clip a value to a range.
FILES_ABOUT_CLIPS = re.compile(
    r"benchmarks/image_balance|data_pipeline/inputs/(video/|kinds\.py|__init__\.py)|tests/data_pipeline/inputs/|docs/(inputs|glossary|data|performance)\.md"
)
A_CLIP = re.compile(r"\bclips?\b", re.IGNORECASE)
CLIP_OF_OTHER_MEANING = re.compile(
    r"\bCLIP\b|clip_grad|grad_clip|\.clip\(|np\.clip|clip\(|and clips\(|clip-|--kind clips|kind `?clips|gradient",
    re.IGNORECASE,
)

# Names of other projects: torch, PyAV, python-pptx, HTML, columns of public data sets, keys of a binary file of the
# tests.
FOREIGN_NAMES = re.compile(
    r"save_for_backward"
    r"|PictureType|PlaceholderPicture|pptx\.shapes\.picture|import Picture\b|Picture \||isinstance\(shape, Picture"
    r"|add_picture|find_parent\(\"picture\"\)|</?picture\b|\"picture\"[,)]|f?\"picture/"
    r"|demo/pictures/|\"picture\": \"image\"|contaminated_pictures|min_pictures|min_words_per_picture"
)


def tracked(*suffixes: str) -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        wanted = path.suffix in suffixes or path.name in ("Makefile", "run")
        if wanted and path.exists() and path.name != THIS:
            yield path


def lines_to_check() -> Iterator[tuple[str, str]]:
    """Yield ("file:line", text), with underscores and joined words taken apart."""
    for path in tracked(".py", ".md", ".yaml", ".yml", ".sh", ".toml", ".html"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", FOREIGN_NAMES.sub("", line).replace("_", " "))
            yield f"{path.relative_to(ROOT)}:{number}", spaced


def test_no_banned_word_appears() -> None:
    lines = list(lines_to_check())
    found = []
    for pattern, better in BANNED.items():
        word = re.compile(rf"\b({pattern})\b", re.IGNORECASE)
        found += [f"{where}: {hit[0]!r}, use {better}" for where, line in lines if (hit := word.search(line))]
    assert not found, "\n".join(found)


def test_clip_is_used_in_its_two_senses_only() -> None:
    found = [
        f"{where}: {line.strip()}"
        for where, line in lines_to_check()
        if A_CLIP.search(line) and not FILES_ABOUT_CLIPS.match(where) and not CLIP_OF_OTHER_MEANING.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_index_of_the_pages_lists_every_page(name: str) -> None:
    assert name == "README.md" or f"({name})" in (ROOT / "docs" / "README.md").read_text()
