"""The MLP adapter, which maps the vision tower's output to the decoder's embedding space."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from model.config import VisionConfig
from model.decoder import glm_transformer_fields, mlp_submodules


def adapter_transformer_config(vision: VisionConfig, *, dtype: torch.dtype, **fields: Any) -> TransformerConfig:
    """Return megatron-core's configuration of the adapter's gated MLP.

    Args:
        vision: Sizes of the tower and the adapter.
        dtype: Dtype of the parameters.
        fields: The parallel layout and the backend's switches, as `TransformerConfig` names them.
    """
    return TransformerConfig(
        num_layers=1,
        num_attention_heads=vision.out_hidden_size,  # no attention here, but required; a multiple of the TP size
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        **glm_transformer_fields(vision.rms_norm_eps, dtype),
        **fields,
    )


class PatchMerger(MegatronModule):
    """Projection, LayerNorm, GELU and gated MLP. All are `out_hidden_size` wide; the MLP is `intermediate_size` inside.

    Source: transformers `Glm4vVisionPatchMerger`. The LayerNorm's eps is torch's default, 1e-5; the GELU is exact.

    Args:
        config: From `adapter_transformer_config`.
        backend: Provider of the leaf modules.
        pg_collection: Process groups over which the MLP is sharded.
    """

    def __init__(
        self,
        config: TransformerConfig,
        backend: BackendSpecProvider,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        width, dtype, device = config.hidden_size, config.params_dtype, torch.cuda.current_device()
        self.proj = nn.Linear(width, width, bias=False, dtype=dtype, device=device)
        self.norm = nn.LayerNorm(width, dtype=dtype, device=device)
        with get_fp8_context(config, is_init=True):  # megatron-core enters it in its TransformerBlock alone
            self.mlp = MLP(
                config,
                mlp_submodules(backend, backend.column_parallel_linear()),
                ffn_hidden_size=config.ffn_hidden_size,
                tp_group=pg_collection.tp,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [image tokens, out_hidden_size] to the same shape."""
        x = F.gelu(self.norm(self.proj(x)))
        with get_fp8_context(self.config):
            return self.mlp(x.unsqueeze(1))[0].squeeze(1)
