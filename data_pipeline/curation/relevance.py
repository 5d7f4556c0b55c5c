"""The filter of pictures and captions that have nothing to do with each other, by any scorer; CLIP comes with it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Drop, Filter
from data_pipeline.errors import BadSample, DataError

# (pictures [n], texts [n]) -> how well each picture goes with its text [n]; higher is better.
Scorer = Callable[[list[Image.Image], list[str]], Sequence[float]]


@dataclass
class Relevance(Filter):
    """`irrelevant_text`: no picture of the sample scores `min` with its text.

    scorer: `clip`, with the folder of a Hugging Face CLIP model as `weights`, scores by the cosine of the two
    embeddings; `module:function` is one's own, see Scorer.
    """

    domains: list[str] = field(default_factory=lambda: ["image_text"])
    scorer: str = "clip"
    weights: str = ""
    min: float = 0.2
    device: str = "cpu"
    batch_size: int = 32

    def check(self) -> None:
        if self.scorer != "clip":
            load_function(self.scorer, "relevance.scorer")
        elif not (Path(self.weights) / "config.json").is_file():
            raise DataError(f"relevance.weights: {self.weights!r} is no folder of a Hugging Face CLIP model")

    @cached_property
    def _scorer(self) -> Scorer:
        if self.scorer == "clip":
            return ClipScorer(Path(self.weights), self.device)
        return load_function(self.scorer, "relevance.scorer")

    def __call__(self, sample: Candidate) -> Drop | None:
        return self.judge([sample])[0]

    def judge(self, samples: Sequence[Candidate]) -> list[Drop | None]:
        verdicts: list[Drop | None] = [None] * len(samples)
        pairs: list[tuple[int, Image.Image, str]] = []
        for index, sample in enumerate(samples):
            if self.judges(sample) and sample.text:
                try:
                    pairs += [(index, Image.fromarray(picture), sample.text) for picture in sample.pictures]
                except BadSample as error:
                    verdicts[index] = Drop(error.reason, error.detail)
        best: dict[int, float] = {}
        for start in range(0, len(pairs), self.batch_size):
            indices, pictures, texts = zip(*pairs[start : start + self.batch_size], strict=True)
            for index, score in zip(indices, self._scorer(list(pictures), list(texts)), strict=True):
                best[index] = max(float(score), best.get(index, float(score)))
        for index, score in best.items():
            if not score >= self.min:
                verdicts[index] = Drop("irrelevant_text", f"scores {score:.3f}: less than {self.min:g}")
        return verdicts


class ClipScorer:
    """Cosines of CLIP's embeddings, from a folder that transformers can read (safetensors). Texts are cut where CLIP's
    context ends. Raises DataError if the folder holds no such model."""

    def __init__(self, folder: Path, device: str):
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        options: dict[str, Any] = {"local_files_only": True}
        try:
            self._model = CLIPModel.from_pretrained(folder, use_safetensors=True, **options).to(device).eval()
            self._images = CLIPImageProcessorPil.from_pretrained(folder, **options)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{folder} cannot be read as a CLIP model: {error}") from error
        self._device = device

    @torch.inference_mode()
    def __call__(self, pictures: list[Image.Image], texts: list[str]) -> Sequence[float]:
        context = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=context, return_tensors="pt")
        pixels = self._images(pictures, return_tensors="pt")["pixel_values"]
        output = self._model(pixel_values=pixels.to(self._device), **tokens.to(self._device))
        return (output.image_embeds * output.text_embeds).sum(-1).tolist()


def load_function(name: str, option: str) -> Any:
    """`package.module:thing` -> the thing. Raises DataError."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"{option}: {name!r} cannot be imported ({error}): give package.module:name") from error
