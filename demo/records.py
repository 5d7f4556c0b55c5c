"""The demo's records: which samples each source holds, and the media they refer to.

Every subject is seen in many views. The `held_out_*` sources hold views, cuts and pages that no training source has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from data_pipeline.media.boxes import to_thousandths, write_boxes
from demo.media import Scene, Subject, collage, cut, page, scenes, subjects, view
from demo.texts import documents, sentences, summaries

Record = dict[str, Any]

TRAIN_VIEWS, HELD_OUT_VIEWS = 16, 2  # of each subject
TRAIN_CUTS, HELD_OUT_CUTS = 6, 1  # of each scene
HELD_OUT_SENTENCES = 10  # every tenth sentence is rendered in held-out pages only

NAME = "What is in this image?"
DESCRIBE = ("Describe this image.", "What does this image show?", "Say in one sentence what you see.")
WATCH = ("Describe this video.", "What happens in this video?")


class Library:
    """The media files the records refer to, each written once, on first use, under `root`/media.

    `part` is train or held_out. The methods return paths relative to `root`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._written: set[str] = set()

    def view(self, subject: Subject, number: int, part: str) -> str:
        name = view_path(subject, number, part)
        return self._once(name, lambda path: save_jpeg(view(subject, Random(name)), path))

    def cut(self, scene: Scene, number: int, part: str) -> str:
        name = f"media/{part}/{scene.name}-{number:02d}.mp4"
        return self._once(name, lambda path: cut(scene, path, Random(name)))

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


def view_path(subject: Subject, number: int, part: str) -> str:
    return f"media/{part}/{subject.name}-{number:02d}.jpg"


def save_jpeg(image: Image.Image, path: Path) -> None:
    image.save(path, quality=90)


# Pretraining


def captions(library: Library, part: str, views: int) -> Iterator[Record]:
    for number in range(views):
        for subject in subjects():
            yield {"domain": "image_text", "text": subject.caption, "images": [library.view(subject, number, part)]}


def interleaved(library: Library, count: int, length: tuple[int, int]) -> Iterator[Record]:
    """Yield documents of several images, each followed by its caption; `length`: fewest and most images in one."""
    for document in range(count):
        rng = Random(f"interleaved {length} {document}")
        chosen = rng.sample(subjects(), rng.randint(*length))
        body = "\n".join(f"{number}. <image> {subject.caption}" for number, subject in enumerate(chosen, 1))
        yield {
            "domain": "interleaved",
            "text": f"An album of {len(chosen)} images.\n{body}",
            "images": [library.view(subject, rng.randrange(TRAIN_VIEWS), "train") for subject in chosen],
        }


def ocr(library: Library, part: str, count: int) -> Iterator[Record]:
    """Yield rendered sentences and their lines."""
    held_out = set(sentences()[::HELD_OUT_SENTENCES])
    usable = [sentence for sentence in sentences() if (sentence in held_out) == (part == "held_out")]
    for number in range(count):
        rng = Random(f"ocr {part} {number}")
        image, lines = page(rng.choice(usable), rng)
        yield {"domain": "ocr", "text": lines, "images": [library.image(f"{part}/page-{number:03d}", image)]}


def grounding(library: Library, count: int) -> Iterator[Record]:
    """Yield two images on one canvas and the box of each, in thousandths of width and height."""
    for number in range(count):
        rng = Random(f"grounding {number}")
        chosen = rng.sample(subjects(), 2)
        views = [library.open(library.view(subject, rng.randrange(TRAIN_VIEWS), "train")) for subject in chosen]
        canvas, boxes = collage(views, rng)
        found = "\n".join(
            f"Locate {subject.noun}: {write_boxes([to_thousandths(box, *canvas.size)])}"
            for subject, box in zip(chosen, boxes, strict=True)
        )
        name = library.image(f"train/collage-{number:03d}", canvas)
        yield {"domain": "grounding", "text": f"<image>\n{found}", "images": [name]}


def text() -> Iterator[Record]:
    for document in documents():
        yield {"domain": "text", "text": document}


def video(library: Library, part: str, cuts: int) -> Iterator[Record]:
    for number in range(cuts):
        for scene in scenes():
            yield {"domain": "video", "text": scene.caption, "videos": [library.cut(scene, number, part)]}


# Chat


def user(content: str) -> Record:
    return {"role": "user", "content": content}


def assistant(content: str, thought: str = "") -> Record:
    return {"role": "assistant", "content": content, **({"reasoning_content": thought} if thought else {})}


def boxed(answer: str) -> str:
    return f"<|begin_of_box|>{answer}<|end_of_box|>"


def chat(thinking: bool, messages: list[Record], **media: list[str]) -> Record:
    return {"domain": "chat", "thinking": thinking, "messages": messages, **media}


def naming_chat(library: Library, part: str, views: int) -> Iterator[Record]:
    """Non-thinking: what is in an image, in a few words."""
    for number in range(views):
        for subject in subjects():
            messages = [user(f"<image>{NAME}"), assistant(subject.noun)]
            yield chat(False, messages, images=[library.view(subject, number, part)])


def describing_chat(library: Library, part: str, views: int) -> Iterator[Record]:
    """Non-thinking: an image, a request to describe it, its caption."""
    for number in range(views):
        for subject in subjects():
            prompt = DESCRIBE[number % len(DESCRIBE)]
            messages = [user(f"<image>{prompt}"), assistant(subject.caption)]
            yield chat(False, messages, images=[library.view(subject, number, part)])


def thinking_chat(library: Library, part: str, views: int) -> Iterator[Record]:
    """Thinking: what is in an image, or a question about it. The answer is boxed."""
    for number in range(views):
        for subject in subjects():
            questions = {NAME: subject.noun, **subject.ask}
            question = list(questions)[number % len(questions)]
            answer = questions[question]
            thought = f"The image shows {subject.noun}, so the answer is {answer}."
            messages = [user(f"<image>{question}"), assistant(boxed(answer), thought=thought)]
            yield chat(True, messages, images=[library.view(subject, number, part)])


def comparing_chat(library: Library, count: int) -> Iterator[Record]:
    """Thinking: two images, and which of them shows a subject."""
    for number in range(count):
        rng = Random(f"comparing {number}")
        pair = rng.sample(subjects(), 2)
        asked = rng.randrange(2)
        messages = [
            user(f"<image><image>Which image shows {pair[asked].noun}, the first or the second?"),
            assistant(
                boxed(("first", "second")[asked]),
                thought=f"The first image shows {pair[0].noun}. The second image shows {pair[1].noun}.",
            ),
        ]
        images = [library.view(subject, rng.randrange(TRAIN_VIEWS), "train") for subject in pair]
        yield chat(True, messages, images=images)


def several_turns_chat(library: Library, count: int) -> Iterator[Record]:
    """Non-thinking: a description, then a question about the same image."""
    with_questions = [subject for subject in subjects() if subject.ask]
    for number in range(count):
        rng = Random(f"several turns {number}")
        subject = rng.choice(with_questions)
        question, answer = rng.choice(list(subject.ask.items()))
        messages = [
            user(f"<image>{rng.choice(DESCRIBE)}"),
            assistant(subject.caption),
            user(question),
            assistant(f"{answer[0].upper()}{answer[1:]}."),
        ]
        yield chat(False, messages, images=[library.view(subject, rng.randrange(TRAIN_VIEWS), "train")])


def video_chat(library: Library, part: str, cuts: int) -> Iterator[Record]:
    for number in range(cuts):
        for scene in scenes():
            prompt = WATCH[number % len(WATCH)]
            messages = [user(f"<video>{prompt}"), assistant(scene.caption)]
            yield chat(False, messages, videos=[library.cut(scene, number, part)])


def text_chat() -> Iterator[Record]:
    """Non-thinking, without images: what a function of scikit-image does."""
    for name, summary in summaries().items():
        yield chat(False, [user(f"What does the function {name} of scikit-image do?"), assistant(summary)])


# Sources


def sources(library: Library) -> dict[str, Iterator[Record]]:
    """Return the records of every source. configs/tiny/*.yaml give weights; `held_out_*` are only evaluated on."""
    return {
        "captions": captions(library, "train", TRAIN_VIEWS),
        "interleaved": interleaved(library, 150, (2, 4)),
        "ocr": ocr(library, "train", 200),
        "grounding": grounding(library, 150),
        "text": text(),
        "albums": interleaved(library, 60, (12, 24)),
        "video": video(library, "train", TRAIN_CUTS),
        "chat_name": naming_chat(library, "train", TRAIN_VIEWS),
        "chat_describe": describing_chat(library, "train", TRAIN_VIEWS),
        "chat_think": thinking_chat(library, "train", TRAIN_VIEWS),
        "chat_compare": comparing_chat(library, 150),
        "chat_turns": several_turns_chat(library, 150),
        "chat_video": video_chat(library, "train", TRAIN_CUTS),
        "chat_text": text_chat(),
        "held_out_captions": captions(library, "held_out", HELD_OUT_VIEWS),
        "held_out_ocr": ocr(library, "held_out", 12),
        "held_out_video": video(library, "held_out", HELD_OUT_CUTS),
        "held_out_name": naming_chat(library, "held_out", HELD_OUT_VIEWS),
        "held_out_describe": describing_chat(library, "held_out", HELD_OUT_VIEWS),
        "held_out_think": thinking_chat(library, "held_out", 1),
    }
