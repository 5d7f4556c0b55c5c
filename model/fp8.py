"""FP8 matrix products: which recipe, and which fields of megatron-core's configurations that means.

Linear layers of the decoder (attention, dense MLPs, shared and routed experts) compute with inputs, weights and output
gradients in 8 bits, and scales that the recipe chooses. Never in FP8: embedding, output layer, routers, norms, core
attention, and the adapter's projection and LayerNorm. Weights and optimizer state stay as they are without FP8, unless
`fp8.param_gather` says otherwise.

    recipe       one scale for                                 scale from             GPUs (compute capability)
    tensorwise   a tensor                                      the tensor itself      8.9 and above
    delayed      a tensor                                      its recent maxima      8.9 and above
    blockwise    1 x 128 values (weights: 128 x 128)           the block itself       9.0 and above, CUDA 12.9
    mxfp8        32 values, as a power of two                  the block itself       10.x

`model.fp8_rules` says what each needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.errors import ConfigError

RECIPES = ("none", "tensorwise", "delayed", "blockwise", "mxfp8")
FORMATS = ("auto", "hybrid", "e4m3")
# Formats of `auto`: a scale for a whole tensor needs the range of e5m2 for gradients, a scale for a block does not.
FORMAT_OF_RECIPE = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
AMAX_HISTORY = 1024  # steps whose largest value decides the scale of `delayed`: Transformer Engine's own default
# Recipes whose weights can be kept in FP8. The two copies of an mxfp8 weight are gathered through the gradient buffer,
# which megatron-core 0.16.1 overwrites while a second optimizer (the experts') still needs it. The scales of delayed
# would have to be part of a checkpoint.
GATHERED_RECIPES = ("tensorwise", "blockwise")


@dataclass
class Fp8Config:
    """FP8 matrix products of the decoder's linear layers."""

    # none, tensorwise, delayed, blockwise or mxfp8: how values are scaled to 8 bits; without Transformer Engine the
    # rounding is emulated
    recipe: str = "none"
    # e4m3 (all tensors), hybrid (e4m3, and e5m2 for gradients), or auto: hybrid for tensorwise and delayed, else e4m3
    format: str = "auto"
    first_last_layers_bf16: int = 0  # decoder layers at each end that compute in bf16; 0: none
    param_gather: bool = False  # keep the weights in FP8 only, beside the float32 main weights, and gather them so
    vision: bool = False  # the linear layers of the vision tower and of the adapter's gated MLP, too

    def __post_init__(self) -> None:
        for key, choices in (("recipe", RECIPES), ("format", FORMATS)):
            if getattr(self, key) not in choices:
                raise ConfigError(f"fp8.{key}={getattr(self, key)!r}: choose one of {', '.join(choices)}")
        if self.first_last_layers_bf16 < 0:
            raise ConfigError(f"fp8.first_last_layers_bf16={self.first_last_layers_bf16}: give 0 or more layers")
        if self.recipe == "delayed" and self.first_last_layers_bf16:
            raise ConfigError(
                "fp8.recipe=delayed scales the whole decoder at once; set fp8.first_last_layers_bf16=0, or "
                "fp8.recipe=tensorwise"
            )
        if self.enabled and self.param_gather and self.recipe not in GATHERED_RECIPES:
            raise ConfigError(
                f"fp8.param_gather=true is supported with fp8.recipe={' or '.join(GATHERED_RECIPES)}, not with "
                f"{self.recipe}; set it to false"
            )

    @property
    def enabled(self) -> bool:
        """Whether there is a recipe."""
        return self.recipe != "none"

    @property
    def gathers_fp8(self) -> bool:
        """Whether weights are kept in FP8."""
        return self.enabled and self.param_gather

    @property
    def number_format(self) -> str:
        """The format in effect: hybrid or e4m3; only with a recipe."""
        return FORMAT_OF_RECIPE[self.recipe] if self.format == "auto" else self.format

    def covers_layer(self, number: int, layers: int) -> bool:
        """Return whether decoder layer `number` of `layers`, from 0, computes in FP8."""
        kept = self.first_last_layers_bf16
        return self.enabled and kept <= number < layers - kept

    @property
    def multiple(self) -> int:
        """What the kernels need tokens, and both dimensions of a matrix, to be a multiple of; only with a recipe."""
        return 32 if self.recipe == "mxfp8" else 16

    # --- as megatron-core's fields, with Transformer Engine -----------------------------------------------------------

    @property
    def decoder_fields(self) -> dict[str, Any]:
        """The decoder's fields of TransformerConfig; empty without a recipe."""
        if not self.enabled:
            return {}
        return self._matrix_fields | {
            "first_last_layers_bf16": self.first_last_layers_bf16 > 0,
            "num_layers_at_start_in_bf16": self.first_last_layers_bf16,
            "num_layers_at_end_in_bf16": self.first_last_layers_bf16,
        }

    @property
    def vision_fields(self) -> dict[str, Any]:
        """The fields of TransformerConfig of the tower and the adapter."""
        return self._matrix_fields if self.enabled and self.vision else {}

    @property
    def _matrix_fields(self) -> dict[str, Any]:
        return {
            "fp8": self.number_format,
            "fp8_recipe": self.recipe,
            "fp8_param": self.param_gather,
            "fp8_amax_history_len": AMAX_HISTORY,
            "fp8_amax_compute_algo": "max",
        }

    @property
    def data_parallel_fields(self) -> dict[str, Any]:
        """The fields of DistributedDataParallelConfig."""
        return {"fp8_param_gather": True} if self.gathers_fp8 else {}

    @property
    def optimizer_fields(self) -> dict[str, Any]:
        """The fields of megatron-core's OptimizerConfig, which matter to weights in FP8 alone."""
        return {"fp8_recipe": self.recipe} if self.gathers_fp8 else {}
