"""The GLM-V models, native on megatron-core: configuration, specs, weights, checkpoints."""

from model.cpu import (
    complete_megatron_without_apex,
    complete_megatron_without_transformer_engine,
    hide_transformer_engine_without_cuda,
    let_megatron_run_without_cuda,
)
from model.installed import refuse_broken_installations
from model.quiet_megatron import quiet_megatron

quiet_megatron()
hide_transformer_engine_without_cuda()
refuse_broken_installations()
let_megatron_run_without_cuda()
complete_megatron_without_transformer_engine()
complete_megatron_without_apex()
