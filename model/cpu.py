"""Patches that let megatron-core run without CUDA and without Transformer Engine. They do nothing where those exist.

megatron-core 0.16.1 assumes a GPU throughout. On a machine without one, everything is synchronous and there is one
memory. So "the current device" can be the CPU, streams and events can do nothing, and the CPU's random generator can
stand in for the device's. The modules that train on a cluster then train under gloo on a laptop.

Each function below says what breaks without it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from model.quiet_megatron import quiet_megatron_without_cuda

CPU = torch.device("cpu")
_prepared: set[str] = set()


def hide_transformer_engine_without_cuda() -> None:
    """Hide Transformer Engine from megatron-core on a machine without CUDA.

    megatron-core uses its fused Adam and gradient norm wherever it can import them, and both run on GPUs only. That
    would break a login node, or a run with hidden GPUs.
    """
    if not torch.cuda.is_available() and "transformer_engine" not in sys.modules:
        modules: dict[str, Any] = sys.modules
        modules["transformer_engine"] = None  # an import fails as if it were not installed


def prepare_torch_without_cuda() -> None:
    """Patch torch, once, if this machine has no CUDA device; before megatron-core is imported."""
    if not _is_first_call("torch"):
        return
    # megatron-core compiles small functions with torch.compile when it is imported: 20 s for a run of 2 s.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    quiet_megatron_without_cuda()
    _answer_device_queries()
    _make_streams_inert()
    _create_and_keep_tensors_on_the_cpu()
    _keep_tensors_until_sent()


def let_megatron_run_without_cuda() -> None:
    """Patch megatron-core, once, if this machine has no CUDA device; after it is imported."""
    if not _is_first_call("megatron"):
        return
    _use_the_cpu_generator()
    _keep_split_sizes_on_the_host()
    _pad_uneven_gathers()
    _skip_collectives_of_one_rank()


def _is_first_call(patched: str) -> bool:
    if patched in _prepared or torch.cuda.is_available():
        return False
    _prepared.add(patched)
    return True


# --- torch.cuda -------------------------------------------------------------------------------------------------------


def _answer_device_queries() -> None:
    """Answer queries about the device; without this every allocation raises in `torch.cuda.current_device()`."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *_: None
    cuda.synchronize = lambda *_: None
    cuda.empty_cache = lambda: None
    for query in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, query, lambda *_: 0)


class _InertEvent:
    """Stands in for a CUDA event or a communication: everything that it could wait for has already happened."""

    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _InertStream:
    """Stands in for a CUDA stream: work on the CPU is done when the call returns."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: _InertEvent | None = None) -> _InertEvent:
        return event or _InertEvent()

    def __enter__(self) -> _InertStream:
        return self

    def __exit__(self, *_: Any) -> None: ...


def _make_streams_inert() -> None:
    """Replace streams, events and nvtx ranges, which do not exist; DDP, MoE dispatcher and schedules use them."""
    cuda: Any = torch.cuda
    stream = _InertStream()
    cuda.Stream, cuda.Event = _InertStream, _InertEvent
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None


def _use_the_cpu_generator() -> None:
    """Use the CPU's random states where megatron-core's tracker asks for those of CUDA's generator."""
    import megatron.core.tensor_parallel.random as random_states

    cuda: Any = torch.cuda
    states: Any = random_states
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    states._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    states._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


# --- torch tensors ----------------------------------------------------------------------------------------------------

CONSTRUCTORS = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
)


def _on_cpu(constructor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(constructor)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return constructor(*args, **kwargs)

    return wrapped


def _create_and_keep_tensors_on_the_cpu() -> None:
    """Create tensors on the CPU where megatron-core asks for CUDA.

    The optimizer, the gradient norm and the schedules hard-code `device="cuda"` and `.cuda()`.
    The mixed-precision optimizer also compares `tensor.type()` with "torch.cuda.FloatTensor" and rejects CPU
    parameters.
    """
    _device_constructors()  # caches torch's own constructors, which `with torch.device("meta")` looks up
    for name in CONSTRUCTORS:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.pin_memory = lambda self, *_, **__: self
    tensor.record_stream = lambda self, *_: None
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_, **__: self

    true_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return true_type(self, *args, **kwargs)
        return true_type(self).replace("torch.", "torch.cuda.", 1)

    tensor.type = type_as_on_cuda


# --- megatron-core ----------------------------------------------------------------------------------------------------


def _keep_split_sizes_on_the_host() -> None:
    """Convert split sizes to numpy, which the all-to-all dispatcher does only if they are on a device."""
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    true_move = token_dispatcher.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return true_move(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _pad_uneven_gathers() -> None:
    """Pad uneven gathers and scatters, because gloo supports equal parts only.

    Under expert tensor parallelism, the all-to-all dispatcher gathers as many rows per rank as were routed there.
    """
    import megatron.core.tensor_parallel.mappings as mappings

    true_gather, true_reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None:
            return true_gather(input_, group, None, use_global_buffer)
        most = max(output_split_sizes)
        padded = torch.cat([input_, input_.new_zeros(most - len(input_), *input_.shape[1:])])
        parts = true_gather(padded, group).split(most)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None:
            return true_reduce_scatter(input_, group, None, use_global_buffer)
        parts = input_.new_zeros(len(input_split_sizes), max(input_split_sizes), *input_.shape[1:])
        for part, own in zip(parts, input_.split(input_split_sizes), strict=True):
            part[: len(own)] = own
        return true_reduce_scatter(parts.flatten(0, 1), group)[: input_split_sizes[group.rank()]]

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = reduce_scatter


def _keep_tensors_until_sent() -> None:
    """Keep tensors until gloo has sent them.

    A pipeline stage frees its output while it is still being sent. On a GPU the allocator keeps the memory until the
    transfer is done; gloo would silently send other data.
    """
    true_isend = torch.distributed.isend
    in_flight: list[tuple[Any, torch.Tensor]] = []

    @functools.wraps(true_isend)
    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        in_flight[:] = [(work, kept) for work, kept in in_flight if not work.is_completed()]
        work = true_isend(tensor, *args, **kwargs)
        in_flight.append((work, tensor.detach()))
        return work

    for module in (torch.distributed, torch.distributed.distributed_c10d):  # batched operations compare the two
        module.isend = isend  # type: ignore[attr-defined]


def _skip_collectives_of_one_rank() -> None:
    """Skip reductions and gathers of a group of one rank, which gloo copies twice, and hands to another thread.

    Only those in place: DDP passes views of the result itself.
    """
    import megatron.core.distributed.param_and_grad_buffer as buffers

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def wrapped(output: torch.Tensor, *args: Any, **options: Any) -> Any:
            in_place = all(arg.data_ptr() == output.data_ptr() for arg in args if torch.is_tensor(arg))
            if in_place and torch.distributed.get_world_size(options.get("group")) == 1:
                return _InertEvent() if options.get("async_op") else None
            return collective(output, *args, **options)

        return wrapped

    for module, name in (
        (buffers, "dist_reduce_scatter_func"),
        (buffers, "dist_all_gather_func"),
        (torch.distributed, "all_reduce"),
        (torch.distributed, "broadcast"),
    ):
        setattr(module, name, unless_alone(getattr(module, name)))


def complete_megatron_without_transformer_engine() -> None:
    """Define names that megatron-core 0.16.1 uses everywhere but defines only if Transformer Engine is installed.

    Without them the router's matrix product and selective recompute raise NameError, with or without a GPU.
    """
    import megatron.core.tensor_parallel.random as random_states
    import megatron.core.transformer.moe.moe_utils as moe_utils

    class NoFp8:
        @staticmethod
        def is_fp8_enabled() -> bool:
            return False

    names: tuple[tuple[Any, str, Any], ...] = (
        (moe_utils, "te_general_gemm", None),
        (random_states, "FP8GlobalStateManager", NoFp8),
        (random_states, "activation_recompute_forward", lambda **_: contextlib.nullcontext()),
        (random_states, "fp8_autocast", lambda **_: contextlib.nullcontext()),
    )
    for module, name, stand_in in names:
        if not hasattr(module, name):
            setattr(module, name, stand_in)


def complete_megatron_without_apex() -> None:
    """Add the gradients of weights to DDP's buffers with torch's products, where NVIDIA apex's kernel is missing.

    Without this, `gradient_accumulation_fusion` (model.linear) raises NameError.
    """
    import megatron.core.tensor_parallel.layers as layers

    class TorchProducts:
        @staticmethod
        def wgrad_gemm_accum_fp32(x: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
            main_grad.addmm_(grad.t(), x)

        wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32

    if not hasattr(layers, "fused_weight_gradient_mlp_cuda"):
        layers.fused_weight_gradient_mlp_cuda = TorchProducts
