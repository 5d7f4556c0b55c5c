"""The GLM-V models, native on megatron-core: configuration, specs, weights, checkpoints."""

from model.cpu import let_megatron_run_without_cuda

let_megatron_run_without_cuda()
