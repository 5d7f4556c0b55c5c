"""transformers' model as the independent truth, and samples to compare on."""

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
from model.hf_weights import export_tensors
from model.vision import PIXEL_MEAN, PIXEL_STD
from model.weight_table import sizes, weights

PRESETS = {"glm4v_moe": "tiny_moe", "glm4v": "tiny_dense"}
HF_CONFIGS = {"glm4v_moe": transformers.Glm4vMoeConfig, "glm4v": transformers.Glm4vConfig}


def small_config(variant: str) -> GlmvConfig:
    """The tiny preset with two vision blocks and a routed scaling factor other than 1."""
    config = GlmvConfig.from_preset(PRESETS[variant])
    factor = 1.7 if variant == "glm4v_moe" else 1.0
    return replace(
        config,
        vision=replace(config.vision, depth=2),
        decoder=replace(config.decoder, routed_scaling_factor=factor),
    )


def transformers_model(config: GlmvConfig, seed: int = 2) -> nn.Module:
    """A random float32 model of transformers with norms, biases and expert biases that are not trivial, and weights
    large enough that attention and routing are not flat."""
    content = config.to_hf()
    architecture = content.pop("architectures")[0]
    hf_config = HF_CONFIGS[config.variant](**content)
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
    model: Any = transformers_model(config, seed)
    model.save_pretrained(folder)
    return model


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """So many tokens of text."""

    count: int


@dataclass(frozen=True)
class Picture:
    """A picture of h x w patches."""

    h: int
    w: int


@dataclass(frozen=True)
class Clip:
    """A clip of t frame pairs of h x w patches."""

    t: int
    h: int
    w: int


Part = Words | Picture | Clip


@dataclass(frozen=True)
class TestSample:
    """One sample in both worlds: as the data pipeline encodes it, and as transformers takes it."""

    __test__ = False

    encoded: EncodedSample
    pixel_values: Tensor  # float32 [patches, 1176]
    mm_token_type_ids: Tensor  # int64 [tokens]: 0 text, 1 picture, 2 clip
    image_grid_thw: Tensor  # [pictures, 3]
    video_grid_thw: Tensor  # [clips, 3]


def make_sample(config: GlmvConfig, parts: Sequence[Part], seed: int, domain: str = "interleaved") -> TestSample:
    """Random tokens and patches in the published form: pictures between begin and end tokens, clips as frame pairs each
    followed by its timestamp."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    types: list[int] = []
    slices, grids, frames_per_image = [], [], []
    pictures, clips = [], []

    def text(*tokens: int) -> None:
        ids.extend(tokens)
        types.extend([0] * len(tokens))

    def embedding(h: int, w: int, kind: int, frame_count: int) -> None:
        text(config.image_start_token_id)
        ids.extend([config.image_token_id] * (h * w // 4))
        types.extend([kind] * (h * w // 4))
        text(config.image_end_token_id)
        slices.append(rng.integers(0, 256, (h * w * frame_count, 588), dtype=np.uint8))
        grids.append((h, w))
        frames_per_image.append(frame_count)

    for part in parts:
        match part:
            case Words(count):
                text(*rng.integers(40, config.decoder.vocab_size, count).tolist())
            case Picture(h, w):
                embedding(h, w, kind=1, frame_count=1)
                pictures.append((1, h, w))
            case Clip(t, h, w):
                text(config.video_start_token_id)
                for pair in range(t):
                    embedding(h, w, kind=2, frame_count=2)
                    text(40 + pair)  # the timestamp
                text(config.video_end_token_id)
                clips.append((t, h, w))

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
        image_grid_thw=torch.tensor(pictures, dtype=torch.long).view(-1, 3),
        video_grid_thw=torch.tensor(clips, dtype=torch.long).view(-1, 3),
    )


def as_pixel_values(patches: Tensor, grids: Sequence[tuple[int, int]], frames_per_image: Sequence[int]) -> Tensor:
    """Slices to transformers' pixel_values, one image at a time: a picture's frame twice, a pair's two."""
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
    """position_ids [3, 1, tokens] by transformers' own rule."""
    positions, _ = model.model.get_rope_index(  # type: ignore[union-attr, operator]
        torch.from_numpy(sample.encoded.input_ids)[None],
        mm_token_type_ids=sample.mm_token_type_ids[None],
        image_grid_thw=sample.image_grid_thw,
        video_grid_thw=sample.video_grid_thw,
    )
    return positions


def transformers_logits(model: nn.Module, sample: TestSample) -> Tensor:
    """[tokens, vocabulary].

    transformers refuses a sample with both pictures and clips, since both use the image token. Its tower treats frame
    pairs as pictures, so all go in as pictures, with the positions that its rule gives to the mixture.
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
    """Mean over the tokens that carry loss of all samples, each run alone."""
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
    """transformers' gradients under our names: as on disk, then through the weight table."""
    on_disk = dict(as_on_disk((name, parameter.grad) for name, parameter in reference.named_parameters()))
    config = small_config(reference.config.model_type)  # type: ignore[union-attr, arg-type]
    return {
        weight.name: weight.transform.to_megatron([on_disk[part] for part in weight.hf], sizes(config))
        for weight in weights(config)
        if not weight.name.endswith("expert_bias")
    }


def parameter_distance(model: GlmvModel, reference: nn.Module) -> float:
    """Norm of the difference of all parameters, relative to the norm of all."""
    ours = dict(export_tensors(model))
    difference = size = 0.0
    for name, parameter in as_on_disk(reference.named_parameters()):
        difference += (ours[name] - parameter).double().square().sum().item()
        size += parameter.double().square().sum().item()
    return (difference / size) ** 0.5


def as_on_disk(tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    """transformers' parameters, or their gradients, as a Hugging Face folder names them: its fused experts apart."""
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
    return collate([s.encoded for s in samples], seq_length=seq_length, segment_multiple=segment_multiple, pad_id=0)


def forward_inputs(batch: Batch) -> dict[str, Tensor]:
    """The arguments of GlmvModel.forward, without labels: it then returns logits."""
    names = ("input_ids", "position_ids", "cu_seqlens", "segment_lengths", "patches", "grid_thw", "frames_per_image")
    return {name: getattr(batch, name) for name in names}
