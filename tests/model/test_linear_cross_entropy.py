"""Output layer and loss by parts of the vocabulary, against torch's cross-entropy in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from model.linear_cross_entropy import LOGITS_AT_ONCE, LinearCrossEntropy
from tests.processes import Processes

pytestmark = pytest.mark.fast
TOKENS, VOCABULARY, HIDDEN = 48, 302, 16


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight, labels (with the first and the last id) and the gradient of the losses."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=rng).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=rng)
    labels[:2] = torch.tensor([0, VOCABULARY - 1])
    return hidden, weight, labels, torch.rand(TOKENS, generator=rng)


def exact() -> tuple[Tensor, Tensor, Tensor]:
    """Return losses and gradients in float64."""
    hidden, weight, labels, gradient = (x.detach().double() if x.is_floating_point() else x for x in inputs())
    return losses_and_gradients(
        lambda h, w: F.cross_entropy(h @ w.T, labels, reduction="none"), hidden, weight, gradient
    )


def losses_and_gradients(loss: Any, hidden: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    losses = loss(hidden, weight)
    return (losses.detach(), *torch.autograd.grad(losses, (hidden, weight), gradient.to(losses.dtype)))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("logits_at_once", [LOGITS_AT_ONCE, TOKENS * 151, TOKENS * 100, TOKENS * 7, 1])
def test_any_parts_give_torchs_losses_and_gradients(single_process: None, logits_at_once: int) -> None:
    hidden, weight, labels, gradient = inputs()

    def in_parts(h: Tensor, w: Tensor) -> Tensor:
        return LinearCrossEntropy.apply(h, w, labels, dist.group.WORLD, logits_at_once)

    for ours, theirs in zip(losses_and_gradients(in_parts, hidden, weight, gradient), exact(), strict=True):
        assert distance(ours, theirs) <= 1e-6


@pytest.mark.parametrize("logits_at_once", [LOGITS_AT_ONCE, TOKENS * 20])
@pytest.mark.parametrize("size", [2])
def test_split_vocabulary(logits_at_once: int, size: int) -> None:
    with Processes(size) as processes:
        answers = processes.run(of_rank, logits_at_once=logits_at_once)
    losses, hidden_gradient, weight_gradient = exact()
    for own_losses, _, _ in answers:
        assert distance(own_losses, losses) <= 1e-6
    assert distance(sum(own for _, own, _ in answers), hidden_gradient) <= 1e-6
    assert distance(torch.cat([own for _, _, own in answers]), weight_gradient) <= 1e-6


def of_rank(logits_at_once: int) -> tuple[Tensor, ...]:
    hidden, weight, labels, gradient = inputs()
    own = weight.chunk(dist.get_world_size())[dist.get_rank()]
    return losses_and_gradients(
        lambda h, w: LinearCrossEntropy.apply(h, w, labels, dist.group.WORLD, logits_at_once), hidden, own, gradient
    )


def test_bfloat16_is_as_near_to_float64_as_one_product_is(single_process: None) -> None:
    hidden, weight, labels, gradient = inputs(torch.bfloat16)

    def in_parts(h: Tensor, w: Tensor) -> Tensor:
        return LinearCrossEntropy.apply(h, w, labels, dist.group.WORLD, TOKENS * 20)

    def at_once(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.T).float(), labels, reduction="none")

    truth = losses_and_gradients(
        lambda h, w: F.cross_entropy(h @ w.T, labels, reduction="none"), hidden.double(), weight.double(), gradient
    )
    ours = losses_and_gradients(in_parts, hidden, weight, gradient)
    theirs = losses_and_gradients(at_once, hidden, weight, gradient)
    for own, other, true in zip(ours, theirs, truth, strict=True):
        assert distance(own, true) <= 1.1 * distance(other, true)


def test_frozen_weight_has_no_gradient(single_process: None) -> None:
    hidden, weight, labels, gradient = inputs()
    LinearCrossEntropy.apply(hidden, weight.detach(), labels, dist.group.WORLD, 1).backward(gradient)
    assert distance(hidden.grad, exact()[1]) <= 1e-6  # type: ignore[arg-type]


# --- memory -----------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Count the bytes of the storages that operations create, and the most that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (ref := StorageWeakRef(tensor.untyped_storage())) not in given:
                self.sizes[ref] = tensor.untyped_storage().nbytes()
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        self.most = max(self.most, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_less_than_an_eighth_at_the_models_vocabulary(single_process: None, dtype: torch.dtype) -> None:
    peaks = [peak_of(loss, dtype) for loss in (_in_parts, _megatrons)]
    assert 8 * peaks[0] <= peaks[1]


def peak_of(loss: Any, dtype: torch.dtype) -> int:
    """Return the bytes that 8,192 tokens need beside the hidden states, the weight and their gradients."""
    with FakeTensorMode():
        hidden: Any = torch.empty(8192, 4096, dtype=dtype, requires_grad=True)
        weight: Any = torch.empty(151_552, 4096, dtype=dtype, requires_grad=True)
        labels = torch.empty(8192, dtype=torch.int64)
        with Peak() as peak:
            loss(hidden, weight, labels).sum().backward()
    return peak.most - sum(x.grad.untyped_storage().nbytes() for x in (hidden, weight))


def _in_parts(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return LinearCrossEntropy.apply(hidden, weight, labels, dist.group.WORLD, LOGITS_AT_ONCE)


def _megatrons(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_cross_entropy(hidden @ weight.T, labels)
