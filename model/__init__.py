"""The GLM-V models, native on megatron-core: configuration, specs, weights, checkpoints."""
