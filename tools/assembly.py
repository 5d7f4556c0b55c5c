"""The initial model of pretraining: a vision tower and a language model that exist, and an adapter that is new."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from common.files import write_json
from data_pipeline.config import DataConfig
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import DataError
from model.config import ARCHITECTURES, GlmvConfig
from model.hf_config import CONFIG_FILE
from model.weights.formats.aimv2 import Tower, open_aimv2
from model.weights.formats.decoders import Decoder, open_decoder
from model.weights.formats.views import Joined, chosen
from model.weights.load import RandomWeights, check_names_and_shapes, hf_shapes
from model.weights.source import WeightSource
from streaming.checksums import check_algorithm
from streaming.hf_job import HfJob
from streaming.limits import plan_limits
from streaming.run import convert
from tools.conversion import DEFAULTS, ConversionOptions, identity_of
from tools.hf_output import (
    KEPT_IN_FLOAT32,
    ConvertError,
    dtype_of,
    refuse_full,
)
from training.hf_files import CONFIG_NAMES, write_hf_files

REPORT = "assembly.json"
NEW_PARTS = ("model.visual.downsample.", "model.visual.merger.")
PUBLISHED = {"glm4v_moe": ("GLM-4.5V", 10_000, 65_536), "glm4v": ("GLM-4.1V", 10_000, 65_536)}


@dataclass(frozen=True)
class Part:
    """What one part of the model is made of."""

    name: str
    source: WeightSource
    origin: str
    read_as: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        return len(self.source.names())

    @property
    def values(self) -> int:
        return sum(prod(self.source.shape(name)) for name in self.source.names())


@dataclass(frozen=True)
class Assembly:
    """A model that is not written yet."""

    config: GlmvConfig
    parts: tuple[Part, ...]
    source: WeightSource
    dtype: torch.dtype
    dropped: tuple[str, ...]  # tensors of the decoder's folder
    notes: tuple[str, ...]  # choices, in words
    tokenizer: Path
    folders: tuple[Path, ...]  # that weights are read from
    seed: int

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is written."""
        return torch.float32 if name.endswith(KEPT_IN_FLOAT32) else self.dtype

    def table(self) -> Iterable[tuple[str, str, str, str]]:
        """Yield for every part: its name, its numbers of tensors and values, and where it is from."""
        for part in self.parts:
            yield part.name, f"{part.tensors:,}", f"{part.values:,}", part.origin

    def lines(self) -> Iterable[str]:
        """Yield a line about each choice, and about each format that was recognised."""
        yield from self.notes
        yield from (f"{part.name} read as: {line}" for part in self.parts for line in part.read_as)
        yield f"weights in {CONFIG_NAMES[self.dtype]}"

    def report(self) -> dict[str, Any]:
        """Return what is written to assembly.json."""
        return {
            "parts": [
                {
                    "part": part.name,
                    "tensors": part.tensors,
                    "values": part.values,
                    "from": part.origin,
                    "read_as": list(part.read_as),
                }
                for part in self.parts
            ],
            "dropped": list(self.dropped),
            "choices": list(self.notes),
            "seed": self.seed,
            "dtype": CONFIG_NAMES[self.dtype],
            "rope_theta": self.config.decoder.rope_theta,
            "max_position_embeddings": self.config.decoder.max_position_embeddings,
            "tokens": self.config.token_ids,
            "tokenizer": str(self.tokenizer),
        }

    def write_files(self, folder: Path) -> None:
        """Write everything but the weights into an existing folder."""
        write_hf_files(folder, self.config, DataConfig(tokenizer=str(self.tokenizer)), inherited={})
        content = json.loads((folder / CONFIG_FILE).read_text())
        write_json(folder / CONFIG_FILE, {**content, "dtype": CONFIG_NAMES[self.dtype]})
        write_json(folder / REPORT, self.report())


def plan_assembly(
    vision: Path,
    decoder: Path,
    *,
    tokenizer: Path | None = None,
    rope_theta: float = 0.0,
    max_positions: int = 0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Assembly:
    """Look at both folders and decide what the model will be. Only headers are read.

    Args:
        vision: Folder of AIMv2-Huge.
        decoder: Folder of GLM-4.5-Air or GLM-4-9B-0414.
        tokenizer: Folder of the tokenizer; None: that of the decoder.
        rope_theta: Rope base; 0 keeps the decoder's.
        max_positions: Longest sequence; 0 keeps the decoder's.
        seed: Of the new tensors.
        dtype: Of the weights; None: that of the decoder's.

    Raises:
        ConfigError: A folder is of another model.
        WeightsError: Weights are missing, damaged or in another format.
        ConvertError: The tokenizer has no tokens for images and videos.
    """
    language = open_decoder(decoder)
    tower = open_aimv2(vision, language.text_config.get("hidden_size", 0))
    words = _tokenizer(tokenizer or decoder, decoder)
    config = _config(language, tower, words, str(decoder / CONFIG_FILE))
    changes: dict[str, Any] = {"rope_theta": float(rope_theta)} if rope_theta else {}
    changes |= {"max_position_embeddings": max_positions} if max_positions else {}
    config = replace(config, decoder=replace(config.decoder, **changes))
    new = RandomWeights(config, seed)
    adapter = chosen(new, [name for name in new.names() if name.startswith(NEW_PARTS)])
    parts = (
        Part("vision tower", tower.source, f"{vision} (AIMv2-Huge, {tower.naming} names)"),
        Part("adapter", adapter, f"random, seed {seed}"),
        Part("decoder", language.source, str(decoder), language.read_as),
    )
    source = Joined(part.source for part in parts)
    check_names_and_shapes(source, hf_shapes(config))
    return Assembly(
        config=config,
        parts=parts,
        source=chosen(source, hf_shapes(config)),
        dtype=dtype or dtype_of(language.source),
        dropped=language.dropped,
        notes=tuple(_choices(config, bool(rope_theta), bool(max_positions), language)),
        tokenizer=words.folder,
        folders=(vision, decoder),
        seed=seed,
    )


def write_assembly(
    assembly: Assembly,
    out: Path,
    max_shard_bytes: int = 5 * 10**9,
    options: ConversionOptions = DEFAULTS,
) -> None:
    """Write the model as a Hugging Face folder, under a temporary name until it is complete.

    Raises:
        ConvertError: `out` is not empty.
        ConfigError: an option cannot work.
        ConversionError: `out` cannot be written, or a process was killed.
    """
    refuse_full(out)
    check_algorithm(options.checksum)
    limits = plan_limits(options.max_memory, options.processes)
    job = HfJob(
        assembly.source,
        dtype_of=assembly.dtype_of,
        max_shard_bytes=max_shard_bytes,
        block_bytes=limits.block_bytes,
        checksum=options.checksum,
        identity={"assembly": assembly.report(), "read": [identity_of(folder) for folder in assembly.folders]},
        hf_files=assembly.write_files,
    )
    convert(job, out, limits, "assembling")


def _tokenizer(folder: Path, decoder: Path) -> GlmTokenizer:
    try:
        return GlmTokenizer(folder)
    except DataError as error:
        fix = "" if folder != decoder else "; give the folder of a GLM-4.5V or GLM-4.1V tokenizer with --tokenizer"
        raise ConvertError(f"{error}{fix}") from None


def _config(language: Decoder, tower: Tower, words: GlmTokenizer, source: str) -> GlmvConfig:
    """Return the model's configuration. The adapter's MLP is as wide as that of the decoder's dense layers."""
    ids = {
        "image_token_id": words.special["<|image|>"],
        "video_token_id": words.special["<|video|>"],
        "image_start_token_id": words.special["<|begin_of_image|>"],
        "image_end_token_id": words.special["<|end_of_image|>"],
        "video_start_token_id": words.special["<|begin_of_video|>"],
        "video_end_token_id": words.special["<|end_of_video|>"],
    }
    text = language.text_config
    content = {
        "architectures": [ARCHITECTURES[language.variant]],
        "model_type": language.variant,
        **ids,
        "text_config": text,
        "vision_config": {**tower.sizes, "intermediate_size": text.get("intermediate_size")},
    }
    config = GlmvConfig.from_hf_dict(content, source)
    if words.vocab_size > config.decoder.vocab_size:
        raise ConvertError(
            f"{words.folder} has {words.vocab_size:,} tokens, more than the rows of the decoder's embedding, "
            f"{config.decoder.vocab_size:,}: it belongs to another model"
        )
    return config


def _choices(config: GlmvConfig, base_is_given: bool, length_is_given: bool, language: Decoder) -> Iterable[str]:
    name, base, length = PUBLISHED[config.variant]
    how = "as given" if base_is_given else "the decoder's; --rope-theta changes it"
    yield f"rope base {config.decoder.rope_theta:,.0f} ({how}; {name} has {base:,})"
    how = "as given" if length_is_given else "the decoder's; --max-positions changes it"
    yield f"positions up to {config.decoder.max_position_embeddings:,} ({how}; {name} has {length:,})"
    if language.dropped:
        layers = sorted({tensor.split(".")[2] for tensor in language.dropped})
        tensors = f"{len(language.dropped):,} tensors of model.layers.{', '.join(layers)}"
        yield f"dropped: {tensors}, which predict further tokens (MTP); a GLM-V model has none"
