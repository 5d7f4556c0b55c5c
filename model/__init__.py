"""The GLM-V models, native on megatron-core: configuration, specs, weights, checkpoints."""

from model.megatron_import import prepare_megatron_when_imported
from model.quiet_megatron import quiet_megatron

quiet_megatron()
prepare_megatron_when_imported()
