"""Model FLOPs utilisation: the useful FLOPs of a step over what the devices could compute in its time.

FLOPs come from `model.flops` by the real segments and images of the packs: no padding, no recomputation. A frozen part
has no gradients of weights, and none of its inputs where nothing below it is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch

from data_pipeline.encoding.batch import Batch
from model.config import GlmvConfig
from model.flops import SegmentCost, adapter_cost, decoder_cost, tower_cost

# TFLOP/s of dense bfloat16 matrix products, from NVIDIA's data sheets (which give the double, with sparsity). The first
# name that the device's name contains counts.
PEAKS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "GH200": 989.4,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 311.9,
    "A800": 311.9,
    "L40S": 362.1,
    "L40": 181.0,
    "A40": 149.7,
    "L20": 119.5,
    "RTX 4090": 165.2,
}


FP8_SPEED = 2  # of matrix products in FP8 over bf16, in the data sheets of every device above that has both


def device_peak(override: float, precision: str, *, fp8: bool = False) -> float:
    """Return the TFLOP/s that this rank's device can reach, 0 where it is not known.

    Args:
        override: the value of `metrics.peak_tflops`; 0: look the device up.
        precision: that of the run; peaks of bf16 alone are known.
        fp8: whether kernels of FP8 compute the run. The peak is then that of FP8, although some products stay in bf16.
    """
    if override or precision != "bf16" or not torch.accelerator.is_available():
        return override
    return peak_of(torch.cuda.get_device_name()) * (FP8_SPEED if fp8 else 1)


def peak_of(device: str) -> float:
    """Return the bf16 TFLOP/s of a device by its name, 0 if it is unknown.

    >>> peak_of("NVIDIA H100 80GB HBM3"), peak_of("NVIDIA H100 PCIe"), peak_of("Quadro")
    (989.4, 756.5, 0.0)
    """
    words = f" {device.replace('-', ' ')} "
    return next((peak for name, peak in PEAKS.items() if f" {name} " in words), 0.0)


def _passes(forward: SegmentCost, *, weights: bool, inputs: bool) -> SegmentCost:
    """Return the cost of a part's passes from that of its forward pass.

    The gradients of weights and of inputs take one pass each. Attention has no weights, but two products.

    Args:
        forward: the cost of the forward pass.
        weights: whether the part's weights have gradients.
        inputs: whether gradients go through the part.
    """
    return SegmentCost(forward.linear * (1 + weights + inputs), forward.squared * (1 + 2 * inputs))


class StepFlops:
    """Counts the FLOPs of packs. Those of adapters themselves are too few to count.

    Args:
        model: the model.
        frozen: parts that are not trained.
        adapted: parts with adapters, whose own weights are frozen; None without LoRA. With LoRA all weights are frozen.
    """

    def __init__(self, model: GlmvConfig, frozen: Collection[str], adapted: Collection[str] | None = None) -> None:
        forward = {
            "vision": tower_cost(model.vision),
            "adapter": adapter_cost(model.vision),
            "decoder": decoder_cost(model.decoder),
        }
        learns_below, costs = False, dict[str, SegmentCost]()
        for part, cost in forward.items():  # in the order of the forward pass
            weights = adapted is None and part not in frozen
            learns_below |= weights or part in (adapted or ())
            costs[part] = _passes(cost, weights=weights, inputs=learns_below)
        self._image, self._segment = costs["vision"] + costs["adapter"], costs["decoder"]

    def of(self, batches: Sequence[Batch]) -> int:
        """Return the useful FLOPs of the forward and backward passes of these packs."""
        return sum(self._of(batch) for batch in batches)

    def _of(self, batch: Batch) -> int:
        patches: Iterable[int] = batch.grid_thw.prod(dim=1).tolist()
        return self._segment.of(*batch.segment_lengths.tolist()) + self._image.of(*patches)
