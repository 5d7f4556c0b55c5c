"""The filter of captions that do not describe their images, by CLIP or by a user's own scorer."""

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
from data_pipeline.curation.filters import Filter, Filtered
from data_pipeline.errors import BadSample, DataError

# (images [n], texts [n]) -> how well each text describes its image [n]; higher is better.
Scorer = Callable[[list[Image.Image], list[str]], Sequence[float]]


@dataclass
class Relevance(Filter):
    """`irrelevant_text`: no image of the sample scores `min` with its text."""

    domains: list[str] = field(default_factory=lambda: ["image_text"])
    scorer: str = "clip"  # clip: the cosine of the two embeddings; or module:function, see Scorer
    weights: str = ""  # folder of a Hugging Face CLIP model, for scorer clip
    min: float = 0.2  # least score
    device: str = "cpu"  # that runs CLIP
    batch_size: int = 32  # images per call of the scorer

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        if self.batch_size < 1:
            raise DataError(f"relevance.batch_size is {self.batch_size}: give 1 or more")
        if self.scorer != "clip":
            load_function(self.scorer, "relevance.scorer")
        elif not (Path(self.weights) / "config.json").is_file():
            raise DataError(f"relevance.weights: {self.weights!r} is not a folder of a Hugging Face CLIP model")

    @cached_property
    def _scorer(self) -> Scorer:
        if self.scorer == "clip":
            return ClipScorer(Path(self.weights), self.device)
        return load_function(self.scorer, "relevance.scorer")

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        return self.judge([sample])[0]

    def judge(self, samples: Sequence[Candidate]) -> list[Filtered | None]:
        """Judge several samples, with `batch_size` images per call of the scorer."""
        verdicts: list[Filtered | None] = [None] * len(samples)
        pairs: list[tuple[int, Image.Image, str]] = []
        for index, sample in enumerate(samples):
            if self.judges(sample) and sample.text:
                try:
                    pairs += [(index, Image.fromarray(pixels), sample.text) for pixels in sample.pixels]
                except BadSample as error:
                    verdicts[index] = Filtered(error.reason, error.detail)
        best: dict[int, float] = {}
        for start in range(0, len(pairs), self.batch_size):
            indices, images, texts = zip(*pairs[start : start + self.batch_size], strict=True)
            for index, score in zip(indices, self._scorer(list(images), list(texts)), strict=True):
                best[index] = max(float(score), best.get(index, float(score)))
        for index, score in best.items():
            if not score >= self.min:
                verdicts[index] = Filtered("irrelevant_text", f"scores {score:.3f}: less than {self.min:g}")
        return verdicts


class ClipScorer:
    """A Scorer: the cosine of CLIP's embeddings of image and text. Texts are truncated to CLIP's context length."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load a CLIP model.

        Args:
            folder: A Hugging Face folder with safetensors weights.
            device: Device that runs it.

        Raises:
            DataError: The folder cannot be read as a CLIP model.
        """
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        options: dict[str, Any] = {"local_files_only": True}
        try:
            self._model = CLIPModel.from_pretrained(folder, use_safetensors=True, **options).to(device).eval()
            self._processor = CLIPImageProcessorPil.from_pretrained(folder, **options)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{folder} cannot be read as a CLIP model: {error}") from error
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], texts: list[str]) -> Sequence[float]:
        """Return one score per pair of image and text."""
        context = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=context, return_tensors="pt")
        pixels = self._processor(images, return_tensors="pt")["pixel_values"]
        output = self._model(pixel_values=pixels.to(self._device), **tokens.to(self._device))
        return (output.image_embeds * output.text_embeds).sum(-1).tolist()


def load_function(name: str, option: str) -> Any:
    """Return what `package.module:name` stands for. Raises DataError with the name of the option."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"{option}: {name!r} cannot be imported ({error}): give package.module:name") from error
