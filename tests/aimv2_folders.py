"""Folders of AIMv2 and of language models, written by transformers: what an assembly is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo.tokenizer import train_tokenizer
from model.config import GlmvConfig

DECODERS = ("glm4_moe", "glm4")
HUGE = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 12}
TINY = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}


def randomise(model: nn.Module, seed: int, std: float = 0.03, spread: float = 0.5) -> None:
    """Give norms, biases and everything else values that no mistake leaves as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.uniform_(1 - spread, 1 + spread, generator=generator)
            else:
                scale = 0.1 if name.endswith("bias") else 0.5 if "position" in name or "embed_tokens" in name else std
                parameter.normal_(0, scale, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2, generator=generator)


def save_aimv2(folder: Path, sizes: dict[str, int] = TINY, naming: str = "transformers", **config: Any) -> nn.Module:
    """Write a folder of AIMv2 for images of 336 pixels, in one of the two namings, and return the model."""
    torch.manual_seed(0)
    settings = {"image_size": 336, "use_head": False, **sizes, **config}
    model: Any = transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**settings)).eval()
    if sizes is HUGE:  # values near those that training begins with, so that the features are of scale 1
        randomise(model, seed=1, std=0.02, spread=0.1)
    else:
        randomise(model, seed=1)
    model.save_pretrained(folder)
    if naming == "Apple":
        tensors = load_file(folder / "model.safetensors")
        renamed = apples_names(tensors, sizes["num_hidden_layers"])
        assert not tensors
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def apples_names(tensors: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Take all tensors under transformers' names, and return them under those of apple/aimv2-huge-patch14-336."""
    renamed = {
        "preprocessor.patchifier.proj.weight": tensors.pop("embeddings.patch_embed.weight"),
        "preprocessor.patchifier.proj.bias": tensors.pop("embeddings.patch_embed.bias"),
        "preprocessor.patchifier.norm.weight": tensors.pop("embeddings.rms_norm.weight"),
        "preprocessor.pos_embed": tensors.pop("embeddings.position_embedding.weight")[None],
        "trunk.post_trunk_norm.weight": tensors.pop("rms_norm.weight"),
    }
    for n in range(blocks):
        theirs, ours = f"trunk.blocks.{n}.", f"encoder.layers.{n}."
        renamed[theirs + "attn.qkv.weight"] = torch.cat(
            [tensors.pop(f"{ours}attention.{part}_proj.weight") for part in ("q", "k", "v")]
        )
        renamed[theirs + "attn.proj.weight"] = tensors.pop(ours + "attention.out_proj.weight")
        for their_part, our_part in (
            ("norm_1", "rms_norm1"),
            ("norm_2", "rms_norm2"),
            ("mlp.fc1", "ffn.gate_proj"),
            ("mlp.fc3", "ffn.up_proj"),
            ("mlp.fc2", "ffn.down_proj"),
        ):
            renamed[f"{theirs}{their_part}.weight"] = tensors.pop(f"{ours}{our_part}.weight")
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def decoder_config(model_type: str, **changes: int) -> Any:
    """Return a tiny decoder with the rope base and the length of GLM-4.5-Air, or those of GLM-4-9B-0414.

    Args:
        model_type: "glm4_moe", or "glm4".
        changes: Other sizes, by their keys in config.json.
    """
    preset = GlmvConfig.from_preset("tiny_moe" if model_type == "glm4_moe" else "tiny_dense").to_hf()["text_config"]
    skipped = ("model_type", "rope_scaling", "rope_theta", "partial_rotary_factor", "max_position_embeddings")
    sizes = {key: value for key, value in preset.items() if key not in skipped} | changes
    moe = {"max_position_embeddings": 131_072, "rope_theta": 1_000_000.0}
    dense = {"max_position_embeddings": 32_768, "rope_theta": 10_000.0}
    longest = moe if model_type == "glm4_moe" else dense
    config_class = {"glm4_moe": transformers.Glm4MoeConfig, "glm4": transformers.Glm4Config}[model_type]
    return config_class(**sizes, **longest, partial_rotary_factor=0.5, attn_implementation="eager")


def save_decoder(model_type: str, folder: Path, *, mtp: bool = True, **changes: int) -> nn.Module:
    """Write the folder of a language model with a tokenizer, and return the model.

    Args:
        model_type: "glm4_moe", or "glm4".
        folder: The folder.
        mtp: Add a layer that predicts a further token, as GLM-4.5-Air has one (glm4_moe only).
        changes: As in `decoder_config`.
    """
    torch.manual_seed(0)
    config = decoder_config(model_type, **changes)
    classes = {"glm4_moe": transformers.Glm4MoeForCausalLM, "glm4": transformers.Glm4ForCausalLM}
    model: Any = classes[model_type](config).eval()
    randomise(model, seed=2)
    model.save_pretrained(folder)
    if mtp and model_type == "glm4_moe":
        tensors = load_file(folder / "model.safetensors")
        last = config.num_hidden_layers
        copied = {name: t for name, t in tensors.items() if name.startswith(f"model.layers.{last - 1}.")}
        layer = {name.replace(f".{last - 1}.", f".{last}.", 1): tensor.clone() for name, tensor in copied.items()}
        for name, shape in (
            ("embed_tokens.weight", (config.vocab_size, config.hidden_size)),
            ("enorm.weight", (config.hidden_size,)),
            ("hnorm.weight", (config.hidden_size,)),
            ("eh_proj.weight", (config.hidden_size, 2 * config.hidden_size)),
            ("shared_head.norm.weight", (config.hidden_size,)),
            ("shared_head.head.weight", (config.vocab_size, config.hidden_size)),
        ):
            layer[f"model.layers.{last}.{name}"] = torch.full(shape, 7.0)
        save_file({**tensors, **layer}, folder / "model.safetensors", metadata={"format": "pt"})
    train_tokenizer(["What is in this image? A cat on a mat.", "0123456789"] * 8, folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a config.json."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))
