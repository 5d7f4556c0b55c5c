"""Build the demo tokenizer and shards from real pictures, clips and texts: `python -m demo.data --out demo_out`.

    demo_out/tokenizer/          a byte-level BPE with GLM's special tokens
    demo_out/records/NAME.jsonl  what each source holds, for people to read (pictures and clips in records/media/)
    demo_out/shards/NAME/        the same, sharded and indexed: what configs/tiny/*.yaml train on

Every picture is seen in many crops; `held_out_*` sources hold crops, cuts and pages that no training source has. The
same command writes the same shards every time.
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console

import data_pipeline
from data_pipeline.catalogue import REJECTED
from data_pipeline.errors import DataError
from data_pipeline.sharding.build import build_shards
from demo.media import Clip, DemoError, Picture, clips, collage, cut, page, pictures, view
from demo.tokenizer import train_tokenizer

Record = dict[str, Any]

CODE = [Path(__file__).with_name(name) for name in ("data.py", "media.py", "media.yaml", "tokenizer.py")]
MARKER = "built.json"  # written last: what was built, and by which code

TRAIN_VIEWS, HELD_OUT_VIEWS = 16, 2  # crops of each picture
TRAIN_CUTS, HELD_OUT_CUTS = 6, 1  # cuts of each clip
TEXT_CHARACTERS = 800  # of one document, about: whole paragraphs are kept
CAPTION_REPEATS = 8  # how often the tokenizer's training text repeats the captions: their words become tokens

DESCRIBE = ("Describe this picture.", "What does this picture show?", "Say in one sentence what you see.")
WATCH = ("Describe this clip.", "What happens in this video?")


class Library:
    """The views and cuts the records refer to, each written once, on first use, under `root`/media."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._written: set[str] = set()

    def picture(self, picture: Picture, number: int, part: str) -> str:
        """Path (relative to root) of the view `number` of a picture; part: train or held_out."""
        name = f"media/{part}/{picture.name}-{number:02d}.jpg"
        return self._once(name, lambda path: save_jpeg(view(picture, Random(name)), path))

    def clip(self, clip: Clip, number: int, part: str) -> str:
        name = f"media/{part}/{clip.name}-{number:02d}.mp4"
        return self._once(name, lambda path: cut(clip, path, Random(name)))

    def image(self, name: str, image: Image.Image) -> str:
        return self._once(f"media/{name}.jpg", lambda path: save_jpeg(image, path))

    def open(self, name: str) -> Image.Image:
        return Image.open(self.root / name).convert("RGB")

    def _once(self, name: str, write: Callable[[Path], None]) -> str:
        if name not in self._written:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            write(self.root / name)
            self._written.add(name)
        return name


def save_jpeg(image: Image.Image, path: Path) -> None:
    image.save(path, quality=90)


# Pretraining domains. Each function yields records; `part` says whether the crops are train or held_out.


def captions(library: Library, part: str, views: int) -> Iterator[Record]:
    for number in range(views):
        for picture in pictures():
            yield {"domain": "image_text", "text": picture.caption, "images": [library.picture(picture, number, part)]}


def interleaved(library: Library, count: int, length: tuple[int, int]) -> Iterator[Record]:
    """Documents of several pictures, each followed by its caption; `length`: fewest and most pictures in one."""
    for number in range(count):
        random = Random(f"interleaved {length} {number}")
        chosen = random.sample(pictures(), random.randint(*length))
        body = "\n".join(f"{place}. <image> {picture.caption}" for place, picture in enumerate(chosen, 1))
        yield {
            "domain": "interleaved",
            "text": f"An album of {len(chosen)} pictures.\n{body}",
            "images": [library.picture(picture, random.randrange(TRAIN_VIEWS), "train") for picture in chosen],
        }


def ocr(library: Library, part: str, count: int) -> Iterator[Record]:
    sentences = [
        sentence
        for document in texts()
        for sentence in re.findall(r"(?<=[.:] )[A-Z][^.:*|]{30,70}\.", " ".join(document.split()))
    ]
    held_out = sentences[::10]
    sentences = held_out if part == "held_out" else [each for each in sentences if each not in held_out]
    for number in range(count):
        random = Random(f"ocr {part} {number}")
        image, lines = page(random.choice(sentences), random)
        yield {"domain": "ocr", "text": lines, "images": [library.image(f"{part}/page-{number:03d}", image)]}


def grounding(library: Library, count: int) -> Iterator[Record]:
    """Two pictures on one canvas and where each lies, as [[x1,y1,x2,y2]] in thousandths of width and height."""
    for number in range(count):
        random = Random(f"grounding {number}")
        chosen = random.sample(pictures(), 2)
        views = [library.open(library.picture(picture, random.randrange(TRAIN_VIEWS), "train")) for picture in chosen]
        canvas, boxes = collage(views, random)
        found = "\n".join(
            f"Locate {picture.noun}: [[{','.join(map(str, box))}]]" for picture, box in zip(chosen, boxes, strict=True)
        )
        name = library.image(f"train/collage-{number:03d}", canvas)
        yield {"domain": "grounding", "text": f"<image>\n{found}", "images": [name]}


def text() -> Iterator[Record]:
    for document in texts():
        yield {"domain": "text", "text": document}


def texts() -> Iterator[str]:
    """Python's language reference in pieces of whole paragraphs, each about TEXT_CHARACTERS long."""
    for topic in sorted(pydoc_data.topics.topics):
        piece = ""
        for paragraph in pydoc_data.topics.topics[topic].strip().split("\n\n"):
            if piece and len(piece) + len(paragraph) > TEXT_CHARACTERS:
                yield piece
                piece = ""
            piece += paragraph.strip("\n") + "\n\n"
        yield piece


def video(library: Library, part: str, cuts: int) -> Iterator[Record]:
    for number in range(cuts):
        for clip in clips():
            yield {"domain": "video", "text": clip.caption, "videos": [library.clip(clip, number, part)]}


# Chat


def user(content: str) -> Record:
    return {"role": "user", "content": content}


def assistant(content: str, thought: str = "") -> Record:
    return {"role": "assistant", "content": content, **({"reasoning_content": thought} if thought else {})}


def boxed(answer: str) -> str:
    return f"<|begin_of_box|>{answer}<|end_of_box|>"


def chat(thinking: bool, messages: list[Record], **media: list[str]) -> Record:
    return {"domain": "chat", "thinking": thinking, "messages": messages, **media}


def describing_chat(library: Library, part: str, views: int) -> Iterator[Record]:
    """Non-thinking: a picture, a request to describe it, its caption."""
    for number in range(views):
        for picture in pictures():
            prompt = DESCRIBE[number % len(DESCRIBE)]
            image = library.picture(picture, number, part)
            yield chat(False, [user(f"<image>{prompt}"), assistant(picture.caption)], images=[image])


def thinking_chat(library: Library, part: str, views: int) -> Iterator[Record]:
    """Thinking: name what is there, or answer a question about it. The answer is boxed."""
    for number in range(views):
        for picture in pictures():
            questions = {"What is in this picture?": picture.noun, **picture.ask}
            question = list(questions)[number % len(questions)]
            answer = questions[question]
            thought = f"The picture shows {picture.noun}, so the answer is {answer}."
            messages = [user(f"<image>{question}"), assistant(boxed(answer), thought=thought)]
            yield chat(True, messages, images=[library.picture(picture, number, part)])


def comparing_chat(library: Library, count: int) -> Iterator[Record]:
    """Thinking: two pictures, and which of them shows a thing."""
    for number in range(count):
        random = Random(f"comparing {number}")
        pair = random.sample(pictures(), 2)
        place = random.randrange(2)
        messages = [
            user(f"<image><image>Which picture shows {pair[place].noun}, the first or the second?"),
            assistant(
                boxed(("first", "second")[place]),
                thought=f"The first picture shows {pair[0].noun}. The second picture shows {pair[1].noun}.",
            ),
        ]
        images = [library.picture(picture, random.randrange(TRAIN_VIEWS), "train") for picture in pair]
        yield chat(True, messages, images=images)


def several_turns_chat(library: Library, count: int) -> Iterator[Record]:
    """Non-thinking: a description, then a question about the same picture."""
    asked = [picture for picture in pictures() if picture.ask]
    for number in range(count):
        random = Random(f"several turns {number}")
        picture = random.choice(asked)
        question, answer = random.choice(list(picture.ask.items()))
        messages = [
            user(f"<image>{random.choice(DESCRIBE)}"),
            assistant(picture.caption),
            user(question),
            assistant(f"{answer[0].upper()}{answer[1:]}."),
        ]
        yield chat(False, messages, images=[library.picture(picture, random.randrange(TRAIN_VIEWS), "train")])


def video_chat(library: Library, part: str, cuts: int) -> Iterator[Record]:
    for number in range(cuts):
        for clip in clips():
            prompt = WATCH[number % len(WATCH)]
            messages = [user(f"<video>{prompt}"), assistant(clip.caption)]
            yield chat(False, messages, videos=[library.clip(clip, number, part)])


def text_chat() -> Iterator[Record]:
    """Non-thinking, without pictures: the first paragraph of each topic of Python's reference."""
    for topic, body in sorted(pydoc_data.topics.topics.items()):
        paragraphs = [part for part in body.split("\n\n") if re.match(r"[A-Z][^*=]{60,400}\.$", part, re.DOTALL)]
        for paragraph in paragraphs[:1]:
            question = user(f'What does the reference of Python say about "{topic}"?')
            yield chat(False, [question, assistant(paragraph)])


# Sources: name -> records. configs/tiny/*.yaml give them weights; `held_out_*` are evaluated only.


def sources(library: Library) -> dict[str, Iterator[Record]]:
    return {
        "captions": captions(library, "train", TRAIN_VIEWS),
        "interleaved": interleaved(library, 150, (2, 4)),
        "ocr": ocr(library, "train", 200),
        "grounding": grounding(library, 150),
        "text": text(),
        "albums": interleaved(library, 60, (12, 24)),
        "video": video(library, "train", TRAIN_CUTS),
        "chat_describe": describing_chat(library, "train", TRAIN_VIEWS),
        "chat_think": thinking_chat(library, "train", TRAIN_VIEWS),
        "chat_compare": comparing_chat(library, 150),
        "chat_turns": several_turns_chat(library, 150),
        "chat_video": video_chat(library, "train", TRAIN_CUTS),
        "chat_text": text_chat(),
        "held_out_captions": captions(library, "held_out", HELD_OUT_VIEWS),
        "held_out_ocr": ocr(library, "held_out", 12),
        "held_out_video": video(library, "held_out", HELD_OUT_CUTS),
        "held_out_chat": describing_chat(library, "held_out", HELD_OUT_VIEWS),
        "held_out_think": thinking_chat(library, "held_out", 1),
    }


def tokenizer_texts() -> Iterator[str]:
    yield from texts()
    for _ in range(CAPTION_REPEATS):
        for picture in pictures():
            yield picture.caption
            yield from (f"{question} {answer}" for question, answer in picture.ask.items())
        yield from (clip.caption for clip in clips())
        yield from (*DESCRIBE, *WATCH)


def build_once(out: Path) -> dict[str, int]:
    """Build, unless `out` already holds what this code builds; returns samples per source."""
    marker = out / MARKER
    if marker.is_file() and (built := json.loads(marker.read_text()))["made_by"] == _code_hash():
        return built["samples"]
    return build(out)


def build(out: Path) -> dict[str, int]:
    """Write tokenizer, records and shards under `out`, replacing what is there; returns samples per source.

    Raises DemoError if a package with pictures is missing, DataError if a record cannot be sharded.
    """
    (out / MARKER).unlink(missing_ok=True)
    for stale in ("records", "shards", "tokenizer"):
        shutil.rmtree(out / stale, ignore_errors=True)
    train_tokenizer(tokenizer_texts(), out / "tokenizer")
    library = Library(out / "records")
    library.root.mkdir(parents=True)
    counts = {}
    for name, records in sources(library).items():
        jsonl = library.root / f"{name}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        jsonl.write_text("".join(lines), encoding="utf-8")
        counted = build_shards([jsonl], out / "shards" / name, tokenizer=out / "tokenizer", name=name).counts
        if counted.rejected:
            raise DataError(f"{jsonl} was not sharded whole: see {out / 'shards' / name / REJECTED}")
        counts[name] = len(lines)
    (out / MARKER).write_text(json.dumps({"made_by": _code_hash(), "samples": counts}, indent=1))
    return counts


def _code_hash() -> str:
    """Changes with whatever decides the shards: these modules, the list of media, and how samples are indexed."""
    code = [*CODE, *Path(str(data_pipeline.__file__)).parent.rglob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code))).hexdigest()


def main(out: Annotated[Path, typer.Option(help="folder to write")] = Path("demo_out")) -> None:
    """Build the demo's tokenizer and shards."""
    console = Console()
    started = time.monotonic()
    try:
        counts = build(out)
    except (DemoError, DataError) as error:
        console.print(f"error: {error}", style="red", highlight=False)
        raise typer.Exit(2) from error
    samples = sum(counts.values())
    console.print(
        f"{samples:,} samples of {len(pictures())} pictures, {len(clips())} clips and Python's reference in "
        f"{len(counts)} sources under {out}/shards ({time.monotonic() - started:.0f} s)"
    )


if __name__ == "__main__":
    typer.run(main)
