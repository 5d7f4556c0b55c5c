"""One training step of one rank on paper: what it holds, the most memory it needs, and what it sends.

The modules, DDP, the distributed optimizer and the pipeline schedule are the real ones. The schedule runs as many packs
as are in flight at once, and one more; a step of more packs repeats the last.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from data_pipeline.encoding.batch import Batch
from model.backend import Backend
from model.config import GlmvConfig
from model.glmv import build_model_chunks
from model.lora import add_adapters
from model.parallel import ParallelConfig
from model.parts import freeze
from planning.balanced import balanced_routing
from planning.chunk_trace import Schedule, hidden_states, run_pack
from planning.kernels import fused_kernels
from planning.memory import MemoryTrace
from planning.on_paper import DEVICE, on_paper
from planning.packs import PackShape, as_batch, packs_per_rank
from training.config import RunConfig
from training.dtypes import DTYPES
from training.optimizer_config import OptimizerConfig
from training.step import TrainStep
from training.update import apply_update
from training.validation import evaluation, forward_packs

GROUPS = ("tensor", "context", "expert", "pipeline", "images", "data", "expert data")
PER_STEP = ("data", "expert data")  # groups whose traffic does not grow with the packs of a rank


@dataclass
class RankTrace:
    """What a step of a rank needs; sizes in bytes."""

    rank: int
    pipeline_rank: int
    parameters: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0  # and what an earlier step left behind
    activations: int = 0  # most that lives beside weights, gradients and optimizer in forward and backward passes
    update: int = 0  # likewise in the optimizer's update
    log_probs: int = 0  # likewise in passes without gradients
    traffic: dict[str, int] = field(default_factory=dict)  # sent per step, by group
    packs: int = 0  # that were run
    kept: tuple[int, ...] = ()  # by one pack for its backward pass, in each model chunk; of a quick trace
    seconds: float = 0.0  # of processor time that the trace took

    @property
    def static(self) -> int:
        """Bytes that live from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Most that ever lives."""
        return self.static + max(self.activations, self.update, self.log_probs)


@dataclass(frozen=True)
class Traced:
    """What all ranks of a layout have in common.

    Attributes:
        config: The run.
        model: What it trains.
        processes: Number of ranks.
        stages: Units of each pipeline stage; None without pipeline parallelism.
        shape: Every pack of the step.
        backend: Provider of the modules.
        imbalance: Tokens that a rank receives for its experts, over an even share.
        one_memory: The run computes on CPUs, so that host and device share one memory.
        log_probs: Between updates it computes the log-probabilities of its packs.
    """

    config: RunConfig
    model: GlmvConfig
    processes: int
    stages: Sequence[Sequence[str]] | None
    shape: PackShape
    backend: Backend
    imbalance: float = 1.0
    one_memory: bool = False
    log_probs: bool = False

    @property
    def packs_per_rank(self) -> int:
        """Packs of a step on each data-parallel rank."""
        return packs_per_rank(self.config, self.processes)

    def packs_to_run(self, pipeline_rank: int) -> int:
        """Return how many packs show the largest number in flight."""
        parallel = self.config.parallel
        stages = parallel.pipeline_model_parallel_size
        needed = 2 * stages if parallel.virtual_pipeline_model_parallel_size > 1 else stages - pipeline_rank + 1
        return min(self.packs_per_rank, needed)


def trace_rank(traced: Traced, rank: int, *, quick: bool = False) -> RankTrace:
    """Build a rank of a layout on paper and let it take a step.

    Args:
        traced: The layout and the packs.
        rank: Number of the rank.
        quick: Run one pack in every chunk alone, and count what the schedule's packs in flight keep.
    """
    config, started = traced.config, time.process_time()
    decoder = traced.model.decoder
    selected = decoder.num_experts_per_tok / decoder.n_routed_experts if decoder.is_moe else 1.0
    trace = MemoryTrace(selected, with_host=traced.one_memory)
    with (
        on_paper(config.parallel, rank, traced.processes),
        balanced_routing(traced.imbalance),
        fused_kernels(not traced.one_memory),
        trace,
    ):
        trainer = build(traced)
        weights = [p for chunk in trainer.model_chunks for p in chunk.parameters()]
        result = RankTrace(
            rank,
            parallel_state.get_pipeline_model_parallel_rank(),
            parameters=sum(p.numel() for p in weights),
            weights=sum(p.nbytes for p in weights),
            gradients=sum(buffer.grad_data.nbytes for ddp in trainer.ddp for buffer in _buffers(ddp)),
        )
        _update(trainer)
        static = (_by_chunks if quick else _by_schedule)(traced, trace, trainer, result)
        trace.reset_peak()
        _update(trainer)
        result.update = trace.peak - static
        result.optimizer = static - result.weights - result.gradients
        result.traffic = _by_group(trace.traffic, result.packs, traced.packs_per_rank)
        if traced.log_probs:
            result.log_probs = _log_probs(traced, trace, trainer)
    result.seconds = time.process_time() - started
    return result


def _by_schedule(traced: Traced, trace: MemoryTrace, trainer: TrainStep, result: RankTrace) -> int:
    """Run the schedule. Fill in packs and activations, and return the bytes that live between steps."""
    result.packs = traced.packs_to_run(result.pipeline_rank)
    batches = [_batch(traced) for _ in range(result.packs)]
    # What an earlier step leaves behind is still there when the next begins.
    few = min(traced.config.parallel.pipeline_model_parallel_size, result.packs)
    trainer.run_schedule(batches[:few], loss_scale=1.0)
    before = _begin_step(trace, trainer)
    trainer.run_schedule(batches, loss_scale=1.0)
    result.activations = trace.peak - before
    return before


def _by_chunks(traced: Traced, trace: MemoryTrace, trainer: TrainStep, result: RankTrace) -> int:
    """Run one pack in every chunk alone. Fill in what the schedule needs with all packs; return as `_by_schedule`."""
    batch, result.packs = _batch(traced), 1
    run_pack(trace, trainer, batch)
    before = _begin_step(trace, trainer)
    for chunk in trainer.model_chunks:
        chunk.set_input_tensor([None])  # that of the step before lives until the first pack comes
    freed = before - trace.live
    chunks = run_pack(trace, trainer, batch)
    result.kept = tuple(chunk.kept for chunk in chunks)
    stages = traced.config.parallel.pipeline_model_parallel_size
    schedule = Schedule(stages, result.pipeline_rank, len(chunks), traced.packs_per_rank)
    peak = schedule.peak(chunks, batch.patches.nbytes if trainer.model_chunks[0].pre_process else 0)
    result.activations = peak - freed + schedule.in_transfer * hidden_states(trainer).nbytes
    return before


def _log_probs(traced: Traced, trace: MemoryTrace, trainer: TrainStep) -> int:
    """Return the most bytes that live beside weights, gradients and optimizer in passes without gradients.

    A pass keeps nothing, so that few packs show it.
    """
    packs = max(2, traced.config.parallel.micro_batch_multiple)
    trace.reset_peak()
    before = trace.live
    with warnings.catch_warnings(), evaluation(trainer):
        warnings.simplefilter("ignore")  # the weights of the update before were not used: they are gathered twice
        forward_packs(trainer, [_batch(traced) for _ in range(packs)], _losses)
    return trace.peak - before


def _losses(batch: Batch, losses: Tensor, non_loss_data: bool) -> Tensor:
    return losses


def _begin_step(trace: MemoryTrace, trainer: TrainStep) -> int:
    """End the step before, and return the bytes that live."""
    _update(trainer)
    _clear_gradients(trainer)
    trace.traffic.clear()
    trace.reset_peak()
    return trace.live


def build(traced: Traced) -> TrainStep:
    """Build a rank's model with its optimizer, as `training.setup.build_trainer` does, without values."""
    config, train = traced.config, traced.config.train
    with torch.device(DEVICE):
        chunks = build_model_chunks(
            traced.model,
            config.parallel,
            pipeline_layout=traced.stages,
            dtype=DTYPES[train.precision],
            balance_loss_coeff=config.moe_in_effect.balance_loss_coeff,
            expert_bias_update_rate=config.moe_in_effect.expert_bias_update_rate,
            recompute=config.recompute,
            backend=traced.backend,
        )
        for chunk in chunks:
            chunk.train()
            if config.lora.rank:
                add_adapters(chunk, config.lora)
            freeze(chunk, config.freeze)
    return TrainStep(chunks, on_device(config.optimizer), max(train.steps, 2), train.seq_length)


def on_device(optimizer: OptimizerConfig) -> OptimizerConfig:
    """Return the optimizer with float32 moments on the device, the only kind that torch's own optimizer has."""
    return replace(optimizer, exp_avg_dtype="fp32", exp_avg_sq_dtype="fp32", offload_fraction=0.0)


def _buffers(ddp: Any) -> list[Any]:
    return [*ddp.buffers, *ddp.expert_parallel_buffers]


def _clear_gradients(trainer: TrainStep) -> None:
    for ddp in trainer.ddp:
        ddp.zero_grad_buffer()
    trainer.optimizer.zero_grad()


def _batch(traced: Traced) -> Batch:
    """Return a pack of the step; its pixels are in main memory."""
    return as_batch(
        traced.shape,
        traced.config.train.seq_length,
        traced.config.data.segment_multiple,
        traced.model.image_token_id,
        DEVICE if traced.one_memory else "cpu",
    )


def _update(trainer: TrainStep) -> None:
    trainer.optimizer.prepare_grads()
    apply_update(trainer.optimizer, 1.0)


# --- traffic ----------------------------------------------------------------------------------------------------------


def _by_group(sent: Counter[Any], packs: int, packs_per_rank: int) -> dict[str, int]:
    """Sum traffic by the kind of group, for a step of `packs_per_rank` packs, of which `packs` were run."""
    kinds = _group_ranks()
    by_group: Counter[str] = Counter()
    for (operation, ranks), size in sent.items():
        if len(ranks) == 1:
            continue
        kind = next(kind for kind, (operations, members) in kinds.items() if operation in operations and members(ranks))
        by_group[kind] += size if kind in PER_STEP else size * packs_per_rank // packs
    return {kind: by_group[kind] for kind in GROUPS if by_group[kind]}


def _group_ranks() -> dict[str, Any]:
    """Return how to recognise each kind of group: its operations, and whether it has these ranks."""

    def exactly(group: Any) -> Any:
        wanted = tuple(torch.distributed.get_process_group_ranks(group))
        return lambda ranks: ranks == wanted

    state, anything = parallel_state, ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send")
    return {
        "expert": (("all_to_all",), exactly(state.get_expert_model_parallel_group())),
        "pipeline": (("send",), exactly(state.get_pipeline_model_parallel_group())),
        "context": (("send", "all_gather", "reduce_scatter"), exactly(state.get_context_parallel_group())),
        "tensor": (anything, exactly(state.get_tensor_model_parallel_group())),
        "images": (("all_to_all", "broadcast", "all_reduce"), exactly(state.get_tensor_and_context_parallel_group())),
        "data": (anything, exactly(state.get_data_parallel_group(with_context_parallel=True))),
        "expert data": (anything, exactly(state.get_expert_data_parallel_group())),
        "other": (anything, lambda ranks: True),
    }


def representative_ranks(parallel: ParallelConfig, processes: int) -> list[int]:
    """Return one rank of every pipeline stage."""
    stages = parallel.pipeline_model_parallel_size
    return [stage * processes // stages for stage in range(stages)]
