"""A sample as the chat template writes it, for comparison with transformers."""

from __future__ import annotations

from data_pipeline.sample import Image, Sample, Text, Token

IMAGE_TEXT = "<|begin_of_image|><|image|><|end_of_image|>"
VIDEO_TEXT = "<|begin_of_video|><|video|><|end_of_video|>"


def as_text(sample: Sample) -> str:
    """Return the sample as text, with one <|image|> or <|video|> per image or video."""
    text = ""
    for element in sample.elements:
        match element:
            case Text():
                text += element.text
            case Token():
                text += element.name
            case Image():
                text += IMAGE_TEXT
            case _:
                text += VIDEO_TEXT
    return text
