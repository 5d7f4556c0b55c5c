"""The GPUs of servers that a run starts: how many each needs, and which ones of the run's first machine it gets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from model.config import ConfigError

# Options of vLLM whose product is the number of a server's GPUs.
SIZES = (
    ("--tensor-parallel-size", "-tp"),
    ("--pipeline-parallel-size", "-pp"),
    ("--prefill-context-parallel-size", "-pcp"),
    ("--data-parallel-size", "-dp"),
)
# Options that make a server one for rollouts, at an address that is known.
SERVED = (
    *("--model", "--host", "--port", "--worker-extension-cls"),
    *("--logprobs-mode", "--generation-config", "--override-generation-config"),
)
MEMORY = "--gpu-memory-utilization"


def gpus_per_server(options: Sequence[str]) -> int:
    """Return how many GPUs a server with these options of vLLM needs.

    Raises:
        ConfigError: a size is no positive number.
    """
    product = 1
    for names in SIZES:
        size = last_value(options, names) or "1"
        if not (size.isdecimal() and int(size)):
            raise ConfigError(f"rollout.start_options: {names[0]} {size} is no size: give a positive number")
        product *= int(size)
    return product


def last_value(options: Sequence[str], names: Sequence[str]) -> str:
    """Return the value of an option, of which the last one counts; empty: it is not there."""
    pairs = list(pairwise([*_words(options), ""]))
    return next((value for name, value in reversed(pairs) if name.replace("_", "-") in names), "")


def _words(options: Sequence[str]) -> list[str]:
    return [word for option in options for word in option.split("=", 1)]


def check_options(options: Sequence[str], own: Sequence[str], where: str) -> None:
    """Check that options of vLLM are none of those that its starter sets itself, of which the last one would count.

    Args:
        options: of vLLM, given by the user.
        own: the names of those that the starter sets.
        where: the name of the user's options, for the message.

    Raises:
        ConfigError: one is.
    """
    if given := [word for word in _words(options) if word.replace("_", "-") in own]:
        raise ConfigError(f"{where} has {given[0]}, which is set already, as the rollouts need it: remove it")


def check_division(gpus: Sequence[int], servers: int, options: Sequence[str], *, shared: bool) -> None:
    """Check that GPUs can be divided over servers. Knows nothing of the machine.

    Args:
        gpus: of all servers, by number; empty: there are none.
        servers: how many there are.
        options: of vLLM.
        shared: whether training uses these GPUs too.

    Raises:
        ConfigError: they cannot.
    """
    each = gpus_per_server(options)
    if shared and not gpus:
        raise ConfigError("rollout.start_gpus_shared=true has no effect without rollout.start_gpus: remove it")
    if shared and not last_value(options, (MEMORY,)):
        raise ConfigError(
            f"rollout.start_gpus_shared=true needs {MEMORY} in rollout.start_options: by default vLLM takes 92% of a "
            "GPU's memory"
        )
    if len(set(gpus)) < len(gpus) or any(gpu < 0 for gpu in gpus):
        raise ConfigError(f"rollout.start_gpus={shown(gpus)}: give each GPU once, by its number from 0")
    if gpus and len(gpus) != servers * each:
        raise ConfigError(
            f"rollout.start_gpus={shown(gpus)} has {len(gpus)} GPUs, and rollout.start={servers} servers with {each} "
            f"each (--tensor-parallel-size in rollout.start_options) need {servers * each}"
        )


def gpus_of_server(gpus: Sequence[int], servers: int, number: int) -> Sequence[int]:
    """Return the GPUs of a server; none where `gpus` are none."""
    each = len(gpus) // servers
    return gpus[number * each : (number + 1) * each]


def check_machine(
    gpus: Sequence[int], needed: int, *, shared: bool, count: int | None, visible: str | None, processes: int
) -> None:
    """Check the GPUs of servers against those of training on the same machine.

    Args:
        gpus: of the servers.
        needed: how many they need.
        shared: whether training may use them too.
        count: GPUs that this process sees; None: the machine has none.
        visible: CUDA_VISIBLE_DEVICES; None or empty: all.
        processes: of training on this machine, which take one GPU each, in order.

    Raises:
        ConfigError: servers would run elsewhere than the configuration says.
    """
    if count is None:
        if gpus:
            raise ConfigError(f"rollout.start_gpus={shown(gpus)}, but this run sees no GPU: remove it")
        return
    names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
    if not all(name.isdecimal() for name in names):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible} cannot be compared with rollout.start_gpus: set it to numbers of GPUs"
        )
    training = [int(name) for name in names[:processes]]
    if not gpus:
        raise ConfigError(
            f"rollout.start needs rollout.start_gpus, the numbers of {needed} GPUs of this machine: its training "
            f"processes use {shown(training)}"
        )
    if not visible and (missing := [gpu for gpu in gpus if gpu >= count]):
        raise ConfigError(f"rollout.start_gpus names {shown(missing)}, and this machine has {count} GPUs, from 0")
    both = [gpu for gpu in gpus if gpu in training]
    if both and not shared:
        raise ConfigError(
            f"rollout.start_gpus={shown(gpus)}: training uses {shown(both)} too; start fewer training processes "
            f"(torchrun --nproc_per_node), name other GPUs, or set rollout.start_gpus_shared=true and {MEMORY} in "
            "rollout.start_options"
        )
    if shared and not both:
        raise ConfigError(
            f"rollout.start_gpus_shared=true has no effect: training uses {shown(training)}, and none of them is in "
            f"rollout.start_gpus={shown(gpus)}; remove it"
        )


def shown(gpus: Sequence[int]) -> str:
    """Return numbers of GPUs as a user writes them."""
    return f"[{','.join(map(str, gpus))}]"
