"""Try an exported model: a prompt, images and videos in, text out.

    python -m tools.generate --hf DIR --prompt "What is this?" [--image X ...] [--video Y ...] [--no-thinking]
    python -m tools.generate --hf DIR --prompt "The image shows" --image X --raw       continue a document

transformers runs the model. data_pipeline prepares images, videos and text as in training. Images and videos come
before the prompt, or where it says <image> and <video>. Only the answer goes to standard output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.domains.prompts import document_prompt
from data_pipeline.errors import DataError
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=keep_lines(__doc__))
def main(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder, for example from tools.convert export")],
    prompt: Annotated[str, typer.Option(help="the question; with --raw, the beginning of the document")],
    image: Annotated[list[Path] | None, typer.Option(help="image file; may be repeated")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="video file; may be repeated")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue a document, for a model that is not fine-tuned on chats")
    ] = False,
    thinking: Annotated[bool, typer.Option(help="whether the model thinks before it answers")] = True,
    greedy: Annotated[
        bool, typer.Option(help="take the most likely token each time, or sample with temperature 1")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 512,
    seed: Annotated[int, typer.Option(help="random seed of --no-greedy")] = 0,
) -> None:
    import torch

    from tools.exported import Exported, GenerateError

    with errors_in_one_line(DataError, GenerateError):
        if raw and not thinking:
            raise GenerateError("--raw continues a document, which holds no thinking: remove --raw or --no-thinking")
        if seed and greedy:
            raise GenerateError("--seed has no effect on greedy answers: add --no-greedy, or remove --seed")
        exported = Exported.load(hf)
        if raw:
            elements = document_prompt(prompt, images=len(image or ()), videos=len(video or ()))
        else:
            elements = exported.chat_prompt(prompt, images=len(image or ()), videos=len(video or ()), thinking=thinking)
        images, videos = ([path.read_bytes() for path in paths or ()] for paths in (image, video))
        sample = exported.encode(elements, images, videos)
        torch.manual_seed(seed)
        answer = exported.generate(sample, max_new_tokens=max_new_tokens, greedy=greedy)
    print(answer)


if __name__ == "__main__":
    run(app)
