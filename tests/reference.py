"""transformers' model as the independent reference, and samples to compare on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from data_pipeline.encoding.batch import Batch, EncodedSample, collate
from data_pipeline.encoding.rope_positions import rope_positions
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.hf_config import VARIANTS
from model.image_constants import PIXEL_MEAN, PIXEL_STD
from model.weights.table import sizes, weights
from tests.model_tensors import hf_tensors

PRESETS = {"glm4v_moe": "tiny_moe", "glm4v": "tiny_dense"}
HF_CONFIGS = {
    "glm4v_moe": transformers.Glm4vMoeConfig,
    "glm4v": transformers.Glm4vConfig,
    "glm46v": transformers.Glm46VConfig,
}


def small_config(hf_type: str) -> GlmvConfig:
    """Return the tiny preset with two vision blocks and, with experts, a routed scaling factor other than 1.

    A glm46v has the rope base and the length of GLM-4.6V-Flash.
    """
    config = GlmvConfig.from_preset(PRESETS[VARIANTS[hf_type]])
    changes: dict[str, dict[str, Any]] = {
        "glm4v_moe": {"routed_scaling_factor": 1.7},
        "glm46v": {"rope_theta": 500_000.0, "max_position_embeddings": 131_072},
    }
    return replace(
        config,
        vision=replace(config.vision, depth=2),
        decoder=replace(config.decoder, **changes.get(hf_type, {})),
        hf_type=hf_type,
    )


def transformers_model(config: GlmvConfig, seed: int = 2) -> nn.Module:
    """Build a random float32 model of transformers.

    Norms, biases and expert biases are not trivial, and weights are large enough that attention and routing are not
    flat.
    """
    content = config.to_hf()
    architecture = content.pop("architectures")[0]
    hf_config = HF_CONFIGS[config.hf_type](**content)
    hf_config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, architecture)(hf_config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
            elif "embed_tokens" in name:
                parameter.normal_(0, 0.5, generator=generator)
            else:
                parameter.normal_(0, 0.03, generator=generator)
        model.lm_head.weight.normal_(0, 0.07, generator=generator)  # logits of scale 1
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2, generator=generator)
    return model


def save_transformers_model(config: GlmvConfig, folder: Path, seed: int = 2) -> nn.Module:
    """Write a Hugging Face folder of `transformers_model` and return the model."""
    model: Any = transformers_model(config, seed)
    model.save_pretrained(folder)
    return model


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Text of `count` tokens."""

    count: int


@dataclass(frozen=True)
class Image:
    """An image of h x w patches."""

    h: int
    w: int


@dataclass(frozen=True)
class Video:
    """A video of t frame pairs of h x w patches."""

    t: int
    h: int
    w: int


Element = Text | Image | Video


@dataclass(frozen=True)
class TestSample:
    """One sample as the data pipeline encodes it, and as transformers takes it."""

    __test__ = False

    encoded: EncodedSample
    pixel_values: Tensor  # float32 [patches, 1176]
    mm_token_type_ids: Tensor  # int64 [tokens]: 0 text, 1 image, 2 video
    image_grid_thw: Tensor  # [still images, 3]
    video_grid_thw: Tensor  # [videos, 3]


def make_sample(config: GlmvConfig, elements: Sequence[Element], seed: int, domain: str = "interleaved") -> TestSample:
    """Make a sample of random tokens and patches in the published format.

    Images are between begin and end tokens. Videos are frame pairs, each followed by its timestamp.
    """
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    types: list[int] = []
    slices, grids, frames_per_image = [], [], []
    images, videos = [], []

    def text(*tokens: int) -> None:
        ids.extend(tokens)
        types.extend([0] * len(tokens))

    def image(h: int, w: int, kind: int, frame_count: int) -> None:
        text(config.image_start_token_id)
        ids.extend([config.image_token_id] * (h * w // 4))
        types.extend([kind] * (h * w // 4))
        text(config.image_end_token_id)
        slices.append(rng.integers(0, 256, (h * w * frame_count, 588), dtype=np.uint8))
        grids.append((h, w))
        frames_per_image.append(frame_count)

    for element in elements:
        match element:
            case Text(count):
                text(*rng.integers(40, config.decoder.vocab_size, count).tolist())
            case Image(h, w):
                image(h, w, kind=1, frame_count=1)
                images.append((1, h, w))
            case Video(t, h, w):
                text(config.video_start_token_id)
                for pair in range(t):
                    image(h, w, kind=2, frame_count=2)
                    text(40 + pair)  # the timestamp
                text(config.video_end_token_id)
                videos.append((t, h, w))

    input_ids = np.array(ids)
    is_image = input_ids == config.image_token_id
    patches = torch.from_numpy(np.concatenate([*slices, np.empty((0, 588), np.uint8)]))
    encoded = EncodedSample(
        sample_id=f"test.tar/{seed}",
        domain=domain,
        input_ids=input_ids,
        loss=(rng.random(len(ids)) < 0.8) & ~is_image,
        position_ids=rope_positions(is_image, tuple(grids)),
        patches=patches,
        grids=tuple(grids),
        frames_per_image=tuple(frames_per_image),
    )
    return TestSample(
        encoded=encoded,
        pixel_values=as_pixel_values(patches, grids, frames_per_image),
        mm_token_type_ids=torch.tensor(types),
        image_grid_thw=torch.tensor(images, dtype=torch.long).view(-1, 3),
        video_grid_thw=torch.tensor(videos, dtype=torch.long).view(-1, 3),
    )


def as_pixel_values(patches: Tensor, grids: Sequence[tuple[int, int]], frames_per_image: Sequence[int]) -> Tensor:
    """Convert slices to transformers' pixel_values; a still image is both frames of its patches."""
    mean, std = (torch.tensor(v).view(3, 1) * 255 for v in (PIXEL_MEAN, PIXEL_STD))
    rows = []
    at = 0
    for (h, w), count in zip(grids, frames_per_image, strict=True):
        image = patches[at : at + h * w * count].view(h * w, count, 196, 3).transpose(2, 3).float()
        at += h * w * count
        both = torch.stack([image[:, 0], image[:, -1]], dim=2)  # [patches, 3, 2, 196]
        rows.append(((both.flatten(2).view(h * w, 3, 392) - mean) / std).flatten(1))
    return torch.cat(rows) if rows else torch.empty(0, 1176)


def transformers_positions(model: nn.Module, sample: TestSample) -> Tensor:
    """Return position_ids [3, 1, tokens] as transformers computes them."""
    positions, _ = model.model.get_rope_index(  # type: ignore[union-attr, operator]
        torch.from_numpy(sample.encoded.input_ids)[None],
        mm_token_type_ids=sample.mm_token_type_ids[None],
        image_grid_thw=sample.image_grid_thw,
        video_grid_thw=sample.video_grid_thw,
    )
    return positions


def transformers_logits(model: nn.Module, sample: TestSample) -> Tensor:
    """Return transformers' logits, [tokens, vocabulary].

    transformers rejects a sample with both images and videos, because both use the image token. Its tower treats frame
    pairs as images, so all are passed as images, with the positions that transformers computes for the whole sample.
    """
    images = {}
    if sample.encoded.grids:
        rows = torch.tensor([(1, h, w) for h, w in sample.encoded.grids])
        images = {"pixel_values": sample.pixel_values, "image_grid_thw": rows}
    return model(
        input_ids=torch.from_numpy(sample.encoded.input_ids)[None],
        position_ids=transformers_positions(model, sample),
        **images,
    ).logits[0]


def transformers_loss(model: nn.Module, samples: Iterable[TestSample]) -> Tensor:
    """Return the mean loss over the tokens with loss of all samples, each of which is run alone."""
    total = torch.zeros(())
    count = 0.0
    for sample in samples:
        logits = transformers_logits(model, sample)[:-1]
        labels = torch.from_numpy(sample.encoded.input_ids)[1:]
        mask = torch.from_numpy(sample.encoded.loss)[1:].float()
        total = total + (F.cross_entropy(logits, labels, reduction="none") * mask).sum()
        count += mask.sum().item()
    return total / count


def reference_gradients(reference: nn.Module) -> dict[str, Tensor]:
    """Return transformers' gradients under the names of this implementation, converted by the weight table."""
    on_disk = dict(published_tensors((name, parameter.grad) for name, parameter in reference.named_parameters()))
    config = small_config(reference.config.model_type)  # type: ignore[union-attr, arg-type]
    return {
        weight.name: weight.transform.to_megatron([on_disk[name] for name in weight.hf], sizes(config))
        for weight in weights(config)
        if not weight.name.endswith("expert_bias")
    }


def parameter_distance(model: GlmvModel, reference: nn.Module) -> float:
    """Return the norm of the difference of all parameters, relative to the norm of all parameters."""
    found = dict(hf_tensors(model))
    difference = size = 0.0
    for name, parameter in published_tensors(reference.named_parameters()):
        difference += (found[name] - parameter).double().square().sum().item()
        size += parameter.double().square().sum().item()
    return (difference / size) ** 0.5


def published_tensors(tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    """Yield transformers' parameters or gradients under their names on disk, with its fused experts split."""
    for name, tensor in tensors:
        assert tensor is not None, name
        if name.endswith("experts.gate_up_proj"):
            for expert, gate_up in enumerate(tensor):
                prefix = name.replace("gate_up_proj", f"{expert}.")
                gate, up = gate_up.chunk(2)
                yield f"{prefix}gate_proj.weight", gate
                yield f"{prefix}up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), down
        else:
            yield name, tensor


def pack(samples: Sequence[TestSample], seq_length: int, segment_multiple: int = 8) -> Batch:
    """Collate samples into one pack."""
    return collate([s.encoded for s in samples], seq_length=seq_length, segment_multiple=segment_multiple, pad_id=0)


def forward_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the arguments of GlmvModel.forward without labels, so that it returns logits."""
    names = ("input_ids", "position_ids", "cu_seqlens", "segment_lengths", "patches", "grid_thw", "frames_per_image")
    return {name: getattr(batch, name) for name in names}
