"""Streams of their own: the shared expert, and copies of packs. Results do not change, and the host does not wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.glmv import GlmvModel
from tests.model.layout_cases import packs_of_step
from tests.reference import forward_inputs
from training.batch_broadcast import copied_ahead

MOE = pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
DENSE = pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)


def losses_and_gradients(model: GlmvModel) -> tuple[Tensor, Tensor]:
    """Return the losses of four packs, and the gradients of all parameters in one vector, on the CPU."""
    batches = packs_of_step(model.glmv_config.variant, 1)
    model.train()
    losses = [model(**forward_inputs(batch), labels=batch.labels) for batch in batches]
    masks = [batch.loss_mask.to(losses[0].device) for batch in batches]
    sum((loss * mask).sum() for loss, mask in zip(losses, masks, strict=True)).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(losses).detach().cpu(), torch.cat(gradients).cpu()


@MOE
def test_overlapped_shared_expert_computes_the_same(build: Callable[..., GlmvModel]) -> None:
    alone, overlapped = (losses_and_gradients(build(shared_expert_overlap=overlap)) for overlap in (False, True))
    for found, expected in zip(overlapped, alone, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@DENSE
def test_forward_pass_does_not_wait_for_the_device(build: Callable[..., GlmvModel]) -> None:
    """Experts do wait: their number of tokens decides the sizes of what is sent."""
    model = build()
    batches = packs_of_step("glm4v", 1)
    model(**forward_inputs(batches[0]), labels=batches[0].labels)  # creates what is kept
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            model(**forward_inputs(batch), labels=batch.labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copies_ahead_arrive_while_the_device_computes() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randint(0, 256, (n, 588), dtype=torch.uint8, generator=generator) for n in (0, 5000, 20000, 300)]
    busy = torch.randn(4096, 4096, device="cuda")
    for copied, tensor in zip(copied_ahead(tensors), tensors, strict=True):
        assert copied.is_cuda
        busy = busy @ busy / 64
        doubled = copied.int() * 2  # on the stream that computes
        del copied
        assert torch.equal(doubled.cpu(), tensor.int() * 2)
