"""What else would fit: the same layout on fewer or more GPUs, the same GPUs with other settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.config import ConfigError
from planning.limits import GIB
from planning.plan import Plan, different_stages, make_plan, static_bytes, traced_of
from planning.step_time import GPUS_PER_NODE
from training.config import RunConfig

MOST_PROCESSES = 4096  # up to here a number of GPUs that fits is looked for


@dataclass(frozen=True)
class Smallest:
    """The smallest number of GPUs on which a run fits, whole nodes, and why no fewer."""

    processes: int | None  # None: it fits on none
    reason: str


def smallest_world(plan: Plan) -> Smallest:
    """Return the smallest number of GPUs on which this layout fits."""
    refused: int | None = None
    for processes in range(GPUS_PER_NODE, MOST_PROCESSES + 1, GPUS_PER_NODE):
        try:
            plan.workload.config.check_layout(plan.workload.model, processes)
        except ConfigError:
            continue
        if _may_fit(plan, processes) and _on(plan, processes).fits:
            why = _needs(plan, refused) if refused else "no smaller number of whole nodes fits the layout and the batch"
            return Smallest(processes, why)
        refused = processes
    if not refused:
        return Smallest(None, "the layout and the batch allow no number of whole nodes")
    return Smallest(
        None, f"{_needs(plan, refused)}: weights, gradients and activations do not become fewer with more GPUs"
    )


def _may_fit(plan: Plan, processes: int) -> bool:
    """Return whether a number of GPUs suffices for what is known of it without building a rank.

    More GPUs share the optimizer state. What its update needs beside the state is shared, too, and not known.
    """
    static = static_bytes(plan.workload, processes, plan.layout)
    return all(
        plan.limits.fits(static[stage.trace.pipeline_rank].total + stage.trace.activations) for stage in plan.stages
    )


def _on(plan: Plan, processes: int) -> Plan:
    """Return the plan on another number of GPUs."""
    if processes == plan.processes:
        return plan
    return make_plan(plan.workload, processes, plan.limits, stages=different_stages(plan.layout, plan.workload.model))


def _needs(plan: Plan, processes: int) -> str:
    made = _on(plan, processes)
    return (
        f"on {processes} pipeline rank {made.worst.trace.pipeline_rank} needs "
        f"{plan.limits.needed(made.worst.tensors) / GIB:.1f} GiB, of {plan.limits.gpu_memory:g}"
    )


def what_would_fit(plan: Plan) -> Iterator[str]:
    """Yield the single changes with which a plan that does not fit would."""
    if plan.workload.rollouts is not None and plan.workload.rollouts.engine is not None:
        servers = replace(plan.workload.rollouts, engine=None)
        planned = [replace(stage, rollouts=servers) for stage in plan.stages]
        without = replace(plan, workload=replace(plan.workload, rollouts=servers), stages=planned)
        if without.fits:
            yield f"rollout.engine=vllm, with servers: {plan.limits.needed(without.worst.tensors) / GIB:.1f} GiB"
    for keys in _changes(plan):
        config = _changed(plan.workload.config, keys)
        workload = replace(plan.workload, config=config)
        try:
            _, layout = traced_of(workload, plan.processes, plan.limits)
            stages = different_stages(layout, workload.model)
            tried = make_plan(workload, plan.processes, plan.limits, stages=stages, until_too_big=True)
        except ConfigError:
            continue
        if tried.fits:
            shown = " ".join(f"{name}={str(value).lower()}" for name, value in keys.items())
            yield f"{shown}: {plan.limits.needed(tried.worst.tensors) / GIB:.1f} GiB"


def _changes(plan: Plan) -> Iterator[dict[str, object]]:
    config = plan.workload.config
    parallel, recompute = config.parallel, config.recompute
    if recompute.decoder == "none":
        yield {"recompute.decoder": "selective"}
    if recompute.decoder != "full":
        yield {"recompute.decoder": "full"}
    if recompute.vision != "full":
        yield {"recompute.vision": "full"}
    if config.optimizer.main_grads == "fp32" and config.train.precision == "bf16":
        yield {"optimizer.main_grads": "bf16"}
    for name in ("tensor", "expert", "pipeline"):
        key = f"{name}_model_parallel_size"
        more: dict[str, object] = {f"parallel.{key}": 2 * getattr(parallel, key)}
        yield more | ({"parallel.sequence_parallel": True} if name == "tensor" else {})
    context = 2 * parallel.context_parallel_size
    multiple = config.data.segment_multiple
    longer: dict[str, object] = {"data.segment_multiple": 2 * context} if multiple % (2 * context) else {}
    yield {"parallel.context_parallel_size": context} | longer


def _changed(config: RunConfig, keys: dict[str, object]) -> RunConfig:
    changed = copy.deepcopy(config)
    for name, value in keys.items():
        section, key = name.split(".")
        setattr(getattr(changed, section), key, value)
    return changed
