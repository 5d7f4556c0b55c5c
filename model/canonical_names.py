"""Names of parameters in the whole model, the same in every layout and with every backend."""

from __future__ import annotations

import re
from typing import Any

from megatron.core import parallel_state
from torch import nn

from model.decoder import FUSED_NORMS

DECODER_LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)")
LOCAL_EXPERT = re.compile(r"(.*\.mlp\.experts)\.local_experts\.(\d+)\.")
GROUPED_EXPERT = re.compile(r"(\.mlp\.experts)\.(linear_fc[12])\.weight(\d+)$")
GROUPED_ADAPTER = re.compile(r"(\.mlp\.experts)\.(linear_fc[12])\.lora\.(\d+)\.")


def canonical_name(model: nn.Module, name: str) -> str:
    """Return the name of a local parameter in the whole model.

    Layers and experts are counted over all ranks, and names are those of the torch backend, whatever the backend.
    """
    canonical = GROUPED_EXPERT.sub(r"\1.local_experts.\3.\2.weight", name)
    canonical = GROUPED_ADAPTER.sub(r"\1.local_experts.\3.\2.lora.", canonical)
    for fused, alone in FUSED_NORMS.items():
        canonical = canonical.replace(fused, alone)
    if expert := LOCAL_EXPERT.match(canonical):
        experts: Any = model.get_submodule(expert[1])
        first = parallel_state.get_expert_model_parallel_rank() * experts.num_local_experts
        canonical = f"{expert[1]}.local_experts.{first + int(expert[2])}.{canonical[expert.end() :]}"
    if layer := DECODER_LAYER.match(name):
        module: Any = model.get_submodule(layer[0])
        canonical = f"{layer[1]}{module.layer_number - 1}{canonical[layer.end() :]}"  # layer_number is from 1
    return canonical
