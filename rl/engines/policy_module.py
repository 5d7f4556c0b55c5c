"""The trained model as transformers' module, which has a cache of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AttentionInterface, AutoConfig

from model.config import ARCHITECTURES, GlmvConfig
from model.weights.table import hf_shapes
from rl.engines.kv_cache import RowsOfLayer

ATTENTION = "glmv_rollouts"


def build_module(config: GlmvConfig, dtype: torch.dtype, device: Any) -> Any:
    """Return transformers' model for a configuration, with weights that are still to be filled.

    Its decoder attends as `attend` says. Expert biases are float32 in every dtype.
    """
    content = config.to_hf()
    AttentionInterface.register(ATTENTION, attend)
    architecture: Any = getattr(transformers, ARCHITECTURES[config.variant])
    hf_config = AutoConfig.for_model(
        config.variant, **{key: value for key, value in content.items() if key not in ("architectures", "model_type")}
    )
    with torch.device(device):
        module = architecture._from_config(
            hf_config, dtype=dtype, attn_implementation={"text_config": ATTENTION, "vision_config": "sdpa"}
        )
    return module.eval().requires_grad_(False)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor | RowsOfLayer,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend in the prompts that are read, or with one query per row in the cache.

    Args:
        module: The attention layer; transformers passes it.
        query: [prompts, heads, tokens, head_dim], or [rows, heads, 1, head_dim].
        key: [prompts, groups, tokens, head_dim]; or what the cache holds.
        value: Likewise; nothing for the cache.
        attention_mask: bool [prompts, 1, tokens, tokens]; None: causal.
        scaling: Of the products.

    Returns:
        [rows, tokens, heads, head_dim], and no weights.
    """
    if isinstance(key, RowsOfLayer):
        return key.attend(query, scaling), None
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None,
        scale=scaling,
        enable_gqa=query.size(1) != key.size(1),
    )
    return output.transpose(1, 2), None


def places(module: Any, config: GlmvConfig) -> Mapping[str, Tensor]:
    """Return where each tensor of a Hugging Face folder belongs in the module, by name.

    transformers keeps the routed experts of a layer stacked, and gate above up.
    """
    held: dict[str, Tensor] = dict(module.named_parameters())
    held |= {name: buffer for name, buffer in module.named_buffers() if name.endswith("e_score_correction_bias")}
    for name in [name for name in held if name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))]:
        layer, _, stacked = name.rpartition(".")
        for expert, matrix in enumerate(held.pop(name)):
            parts = matrix.chunk(2) if stacked == "gate_up_proj" else [matrix]
            names = ("gate_proj", "up_proj") if stacked == "gate_up_proj" else (stacked,)
            held |= {f"{layer}.{expert}.{leaf}.weight": part for leaf, part in zip(names, parts, strict=True)}
    found = {name: tuple(place.shape) for name, place in held.items()}
    if found != hf_shapes(config):
        raise AssertionError(
            f"transformers' model has other tensors: {set(found.items()) ^ set(hf_shapes(config).items())}"
        )
    return held
