"""The GLM-V models, native on megatron-core: configuration, specs, weights, checkpoints."""

import warnings

from model.cpu import (
    complete_megatron_without_transformer_engine,
    hide_transformer_engine_without_cuda,
    let_megatron_run_without_cuda,
)
from model.installed import refuse_broken_installations

# megatron-core 0.16.1 uses names that torch 2.13 deprecates, and asks sharded parameters for `.grad`.
warnings.filterwarnings("ignore", category=FutureWarning, module="(torch.distributed|megatron.core.dist_checkpointing)")
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
# Whole experts on each tensor-parallel rank are what we ask for.
warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`, but tensor model parallel size")

hide_transformer_engine_without_cuda()
refuse_broken_installations()
let_megatron_run_without_cuda()
complete_megatron_without_transformer_engine()
