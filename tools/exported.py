"""A Hugging Face folder, loaded with transformers and ready to answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from data_pipeline.domains.prompts import place_media
from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.encoding.encode import encode_sample
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.pixel_budget import PIXELS_PER_TOKEN, PixelBudget
from data_pipeline.sample import Element, Image, Sample, Text, Token, Video
from training.pixel_values import pixel_values

MODEL_TYPES = ("glm4v_moe", "glm4v", "glm46v")


class GenerateError(ValueError):
    """The folder or the call cannot be used. The message says how to fix it."""


@dataclass
class Exported:
    """A Hugging Face folder that is loaded and ready to answer."""

    folder: Path
    model: Any  # transformers' model
    tokenizer: Any  # transformers' tokenizer: renders chats, decodes answers
    glm_tokenizer: GlmTokenizer  # encodes prompts; nothing that a user types becomes a special token
    preprocessor: dict[str, Any]  # of images: content of preprocessor_config.json
    budget: PixelBudget  # how large images and videos may become

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | str = "auto") -> Exported:
        """Load a folder, and move the model to the accelerator if there is one. Raises GenerateError, DataError."""
        _check_architecture(folder)
        image, video = (_read_preprocessor(folder, kind) for kind in ("image", "video"))
        glm_tokenizer = GlmTokenizer(folder)
        model = _load_model(folder, dtype)
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        return cls(
            folder=folder,
            model=model.to(device).eval(),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            glm_tokenizer=glm_tokenizer,
            preprocessor=image,
            budget=PixelBudget(_max_tokens(image), _max_tokens(video)),
        )

    def chat_prompt(self, prompt: str, *, images: int, videos: int, thinking: bool = True) -> list[Element]:
        """Return one user turn in the folder's chat template, up to the point where the assistant begins to write."""
        template = self.tokenizer.get_chat_template()
        if not thinking and "enable_thinking" not in template:
            raise GenerateError(f"{self.folder}: the chat template always thinks; remove --no-thinking")
        typed: list[str] = []
        parts = []
        for element in place_media(prompt, images=images, videos=videos):
            if isinstance(element, Text):
                # A placeholder that no template interprets. _elements puts back the typed text as plain text.
                parts.append({"type": "text", "text": f"\ue000{len(typed)}\ue001"})
                typed.append(element.text)
            else:
                parts.append({"type": "image" if isinstance(element, Image) else "video"})
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        return list(_elements(rendered, typed, self.glm_tokenizer.special))

    def encode(self, elements: Sequence[Element], images: Sequence[bytes], videos: Sequence[bytes]) -> EncodedSample:
        """Decode the files and tokenize. Raises BadSample if a file cannot be used."""
        sample = Sample("prompt", tuple(elements))
        return encode_sample(sample, images, videos, tokenizer=self.glm_tokenizer, budget=self.budget)

    def generate(self, sample: EncodedSample, *, max_new_tokens: int, greedy: bool = True) -> str:
        """Return what the model writes after `sample`, with special tokens such as <think>, without the end token."""
        return self.generate_batch([sample], max_new_tokens=max_new_tokens, greedy=greedy)[0]

    @torch.no_grad()
    def generate_batch(
        self, samples: Sequence[EncodedSample], *, max_new_tokens: int, greedy: bool = True
    ) -> list[str]:
        """Return what the model writes after each of `samples`, which it computes together."""
        inputs = padded_inputs(
            samples, self.model.config.image_token_id, self.preprocessor, pad_id=self.glm_tokenizer.pad_id
        )
        ends = self.model.generation_config.eos_token_id or self.model.config.text_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        length = inputs["input_ids"].size(1)
        rows = self.model.generate(
            **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=not greedy,
            eos_token_id=ends,
            pad_token_id=self.glm_tokenizer.pad_id,
        )[:, length:].tolist()
        return [self.tokenizer.decode(list(takewhile(lambda token: token not in ends, row))) for row in rows]


MEDIA: dict[str, Element] = {
    "<|begin_of_image|><|image|><|end_of_image|>": Image(),
    "<|begin_of_video|><|video|><|end_of_video|>": Video(),
}


def _elements(rendered: str, typed: Sequence[str], special: dict[str, int]) -> Iterator[Element]:
    """Turn a rendered chat into elements: placeholders become the typed text, special tokens become tokens."""
    pieces = "|".join(re.escape(piece) for piece in (*MEDIA, *special))
    for piece in filter(None, re.split(f"({pieces}|\ue000[0-9]+\ue001)", rendered)):
        if piece in MEDIA:
            yield MEDIA[piece]
        elif piece in special:
            yield Token(piece)
        elif piece.startswith("\ue000"):
            yield Text(typed[int(piece[1:-1])])
        else:
            yield Text(piece)


# --- arguments of the forward of transformers -------------------------------------------------------------------------


def transformers_inputs(sample: EncodedSample, image_token_id: int, preprocessor: dict[str, Any]) -> dict[str, Tensor]:
    """Return the arguments of `Glm4v(Moe)ForConditionalGeneration` for a batch of one sample.

    transformers computes the 3-D positions itself. Frame pairs of videos are given as images: transformers' tower and
    positions treat both in the same way, and its forward refuses a sample with images and videos. `preprocessor` gives
    image_mean and image_std.
    """
    input_ids = torch.from_numpy(sample.input_ids)[None]
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if sample.grids:
        inputs["pixel_values"] = pixel_values(sample, preprocessor["image_mean"], preprocessor["image_std"])
        inputs["image_grid_thw"] = torch.tensor([(1, *grid) for grid in sample.grids])
        inputs["mm_token_type_ids"] = (input_ids == image_token_id).long()
    return inputs


def padded_inputs(
    samples: Sequence[EncodedSample], image_token_id: int, preprocessor: dict[str, Any], pad_id: int
) -> dict[str, Tensor]:
    """Return `transformers_inputs` of several samples, padded on the left to the longest."""
    each = [transformers_inputs(sample, image_token_id, preprocessor) for sample in samples]
    if any(sample.grids for sample in samples):
        for inputs in each:
            inputs.setdefault("mm_token_type_ids", torch.zeros_like(inputs["input_ids"]))
    longest = max(len(sample) for sample in samples)
    joined = {}
    for name in dict.fromkeys(name for inputs in each for name in inputs):
        tensors = [inputs[name] for inputs in each if name in inputs]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            filling = pad_id if name == "input_ids" else 0
            tensors = [F.pad(tensor, (longest - tensor.size(1), 0), value=filling) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


# --- files ------------------------------------------------------------------------------------------------------------


def _check_architecture(folder: Path) -> None:
    found = _read_json(folder / "config.json").get("model_type")
    if found not in MODEL_TYPES:
        known = f"{', '.join(MODEL_TYPES[:-1])} and {MODEL_TYPES[-1]}"
        raise GenerateError(f"{folder} is a model of type {found!r}; this command runs {known}")


def _load_model(folder: Path, dtype: torch.dtype | str) -> Any:
    """Load the model. transformers initialises missing weights at random, with a warning; here that is an error."""
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise GenerateError(f"{folder}: transformers does not load the weights: {str(error).splitlines()[0]}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[kind]:
            raise GenerateError(f"{folder}: the weights do not fit config.json, {kind}: {sorted(report[kind])[:4]}")
    return model


def _max_tokens(preprocessor: dict[str, Any]) -> int:
    return int(preprocessor["size"]["longest_edge"]) // PIXELS_PER_TOKEN


def _read_preprocessor(folder: Path, kind: str) -> dict[str, Any]:
    """Return the preprocessor of images or videos from its own file or, as transformers 5 saves it, inside another."""
    path = folder / ("preprocessor_config.json" if kind == "image" else "video_preprocessor_config.json")
    whole = folder / "processor_config.json"
    if not path.is_file() and whole.is_file() and f"{kind}_processor" in (content := _read_json(whole)):
        path, content = whole, content[f"{kind}_processor"]
    else:
        content = _read_json(path)
    try:
        _max_tokens(content)
        torch.tensor([content["image_mean"], content["image_std"]]).view(2, 3)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise GenerateError(
            f"{path}: size.longest_edge, image_mean or image_std is missing or wrong ({error}); take the file from the "
            "published model"
        ) from None
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError:
        raise GenerateError(
            f"{path} is missing; --hf must be a complete folder, as tools.convert export writes it"
        ) from None
    except ValueError as error:
        raise GenerateError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise GenerateError(f"{path} is not a JSON object")
    return content
