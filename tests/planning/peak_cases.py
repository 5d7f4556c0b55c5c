"""Peaks of memory: of a step on paper, and of the same step with values, as torch's allocator saw it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import model.moe
from model.backend import select_backend
from model.glmv import build_model_chunks
from model.moe import normalized_topk_routing
from model.process_groups import initialize_model_parallel
from model.weights.load import RandomWeights, load_weights
from planning.balanced import balanced_map
from planning.packs import PackShape, as_batch
from planning.rank_trace import RankTrace, Traced, trace_rank
from tests.model.layout_cases import layout_of
from tests.reference import small_config
from training.config import RunConfig
from training.step import TrainStep

# Two samples with images, and one text: tokens, patches. No padding, which the torch backend dispatches to no expert.
SHAPE = PackShape((704, 576, 256), ((1024,), (768, 400), ()))
SEQ_LENGTH = 1536
MARK = 12_345_677  # bytes; no tensor has this size
STEPS = 4  # that are measured, until one of them has freed all that it allocated


def traced(variant: str, layout: str, recompute: dict[str, str], packs: int = 2) -> Traced:
    parallel, stages = layout_of(layout)
    config = RunConfig()
    config.parallel, config.recompute = parallel, type(config.recompute)(**recompute)
    config.train.seq_length, config.train.precision, config.train.steps = SEQ_LENGTH, "fp32", 4
    config.data.segment_multiple = 8
    # gloo copies the gradients that it reduces; after the backward pass that does not matter.
    config.optimizer.overlap_grad_reduce = config.optimizer.overlap_param_gather = False
    processes = parallel.model_parallel_size if parallel.expert_model_parallel_size == 1 else 2
    config.train.global_batch_size = packs * parallel.data_parallel_size(processes)
    backend = select_backend("torch", torch.float32)
    return Traced(config, small_config(variant), processes, stages, SHAPE, backend, one_memory=True)


def on_paper(rank: int = 0, **case: Any) -> RankTrace:
    return trace_rank(traced(**case), rank)


def measured(**case: Any) -> dict[str, int]:
    """Take steps with values, and return what one after the first adds to the memory in use, at most."""
    plan = traced(**case)
    config = plan.config
    initialize_model_parallel(config.parallel, seed=1)
    chunks = build_model_chunks(
        plan.model,
        config.parallel,
        pipeline_layout=plan.stages,
        balance_loss_coeff=config.moe.balance_loss_coeff,
        expert_bias_update_rate=config.moe.expert_bias_update_rate,
        recompute=config.recompute,
        backend=plan.backend,
    )
    load_weights(chunks, RandomWeights(plan.model, 1))
    trainer = TrainStep([chunk.train() for chunk in chunks], config.optimizer, 4, SEQ_LENGTH)
    batches = [
        as_batch(SHAPE, SEQ_LENGTH, 8, plan.model.image_token_id, "cpu").with_tensors(torch.clone)
        for _ in range(plan.packs_per_rank)
    ]
    for batch in batches:
        batch.patches.zero_()
    true_routing, model.moe.normalized_topk_routing = normalized_topk_routing, _balanced
    try:
        with _gloo_frees_first(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            for step in range(STEPS + 1):
                torch.empty(MARK, dtype=torch.uint8)
                trainer.run(step + 1, batches)
    finally:
        model.moe.normalized_topk_routing = true_routing
    return {"peak": _peak(profiled), "parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters())}


@contextmanager
def _gloo_frees_first() -> Iterator[None]:
    """Let gloo's threads drop what they have sent before this thread does: the profiler does not see what they free."""
    true_wait = dist.Work.wait

    def wait(work: dist.Work, *args: Any, **options: Any) -> Any:
        done = true_wait(work, *args, **options)
        time.sleep(0.003)
        return done

    with mock.patch.object(dist.Work, "wait", wait):
        yield


def _balanced(logits: Any, topk: int, **options: Any) -> Any:
    """Route by the router's scores, after a preference that spreads the tokens evenly over the experts."""
    tokens, experts = logits.shape
    preferred = balanced_map(tokens, experts, topk).float()
    return normalized_topk_routing(logits + 10 * preferred, topk, **options)


def _peak(profiled: Any) -> int:
    """Return the most memory in use in a step, beyond what was in use before it.

    The step is the first in which the profiler saw everything freed that was allocated.
    """
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    begins = [place for place, size in enumerate(sizes) if size == MARK]
    for begin, end in zip(begins[1:], [*begins[2:], len(sizes)], strict=True):
        in_use = list(accumulate(sizes[begin + 2 : end]))
        if in_use[-1] == 0:
            return max(in_use)
    raise AssertionError("in no step everything was freed")
