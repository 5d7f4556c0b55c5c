"""How tokens travel to their experts and back, and what each way needs.

    alltoall   megatron-core's dispatcher over torch.distributed, on every machine
    flex       DeepEP (https://github.com/deepseek-ai/DeepEP): its kernels send a token once to each rank that has some
               of its experts. megatron-core calls this dispatcher flex

With `shared_expert_overlap` the shared expert computes on a CUDA stream of its own while tokens travel. That is part of
megatron-core's dispatcher alltoall.
"""

from __future__ import annotations

from importlib.util import find_spec

from model.config import ConfigError, DecoderConfig
from model.parallel import ParallelConfig

DISPATCHERS = ("alltoall", "flex")
DEEP_EP_RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)  # group sizes for which DeepEP has settings


def check_dispatch(
    dispatcher: str, shared_expert_overlap: bool, decoder: DecoderConfig, parallel: ParallelConfig
) -> None:
    """Check that the model and its layout have what the keys ask for.

    Args:
        dispatcher: `moe.dispatcher`, one of DISPATCHERS.
        shared_expert_overlap: `moe.shared_expert_overlap`.
        decoder: The model's decoder.
        parallel: Its layout.

    Raises:
        ConfigError: They do not; the message names the key and the fix.
    """
    set_keys = ["moe.dispatcher=flex"] * (dispatcher == "flex") + ["moe.shared_expert_overlap=true"] * (
        shared_expert_overlap
    )
    if not set_keys:
        return
    if not decoder.is_moe:
        raise ConfigError(f"{set_keys[0]}: this model is dense and has no experts; remove it")
    if len(set_keys) == 2:
        raise ConfigError(
            "moe.shared_expert_overlap=true belongs to moe.dispatcher=alltoall, and the dispatcher is flex; set "
            "shared_expert_overlap=false, or dispatcher=alltoall"
        )
    ranks = parallel.expert_model_parallel_size
    if shared_expert_overlap and ranks * parallel.expert_tensor_parallel_size == 1:
        raise ConfigError(
            "moe.shared_expert_overlap=true: no token leaves its rank, so there is nothing to overlap with; set "
            "parallel.expert_model_parallel_size above 1, or shared_expert_overlap=false"
        )
    if dispatcher == "flex" and ranks not in DEEP_EP_RANKS:
        raise ConfigError(
            f"moe.dispatcher=flex: DeepEP has no settings for parallel.expert_model_parallel_size={ranks}; choose one "
            f"of {', '.join(map(str, DEEP_EP_RANKS))}, or dispatcher=alltoall"
        )
    if dispatcher == "flex" and parallel.expert_tensor_parallel_size > 1:
        raise ConfigError(
            "moe.dispatcher=flex sends tokens to whole experts; set parallel.expert_tensor_parallel_size=1, or "
            "dispatcher=alltoall"
        )


def check_dispatch_kernels(dispatcher: str) -> None:
    """Check that this machine can run a dispatcher.

    Raises:
        ConfigError: It cannot.
    """
    if dispatcher != "flex":
        return
    from model.backend import has_gpu  # it needs torch

    needed = {"a GPU": has_gpu(), "the package deep_ep (DeepEP)": find_spec("deep_ep") is not None}
    if lacking := [what for what, present in needed.items() if not present]:
        raise ConfigError(
            f"moe.dispatcher=flex needs {' and '.join(lacking)}, missing here; install it, or set dispatcher=alltoall"
        )
