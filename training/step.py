"""One optimizer step: this rank's packs through megatron-core's schedule, then reduce, clip and update.

Losses are divided by a count over the GLOBAL batch that is known before the backward pass: by default the tokens that
carry loss (training.objective). The schedules divide what a micro-batch returns by the number of micro-batches, and DDP
averages over data-parallel ranks. So a micro-batch returns

    sum of its losses / count of the global batch * micro-batches per rank * data-parallel ranks

This gives the same gradient in every layout, however unevenly the ranks' packs are filled. megatron-core's other two
conventions (a token count beside the loss, with or without `calculate_per_token_loss`) do not: the first divides by
each rank's own tokens, the second scales the balance loss with the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from data_pipeline.encoding.batch import Batch
from model.canonical_names import canonical_name
from model.fp8_scales import end_step
from model.fp8_weights import gather_weights
from model.glmv import GlmvModel
from model.lora_dropout import PackNumber
from model.megatron_versions import clear_recorded_losses
from training.bad_steps import BadStep, BadStepDetector
from training.batch_broadcast import broadcast_patches
from training.determinism import compute_twice
from training.expert_load import ExpertLoad
from training.grad_norms import PartNorms
from training.health import HealthConfig
from training.objective import CrossEntropy, Losses, Objective, PackReport
from training.optimizer import build_optimizer, build_scheduler, scaled_learning_rates, set_step
from training.optimizer_config import OptimizerConfig
from training.step_errors import NonFiniteStep, NonFiniteWeights, NoSamples, NothingToLearn, Spike
from training.timers import FORWARD_BACKWARD, StepTimers
from training.update import KeptExpertBiases, apply_update, prepare_update

KeepLosses = Callable[[Batch, Tensor], None]  # takes a pack and the losses of its tokens, [tokens / CP]


@dataclass
class StepReport:
    """What a step did, over the global batch."""

    loss: float  # what the objective minimises: by default the mean cross-entropy of the tokens that carry loss
    grad_norm: float  # before clipping
    lr: float  # of the parts that are not scaled
    tokens: int  # without padding
    padding_fraction: float  # padding per token of the packs
    samples: int
    images: int  # images and frame pairs
    patches: int
    quarantined: int  # samples
    domain_losses: dict[str, float] = field(default_factory=dict)
    scaled_lrs: dict[str, float] = field(default_factory=dict)  # learning rates of the scaled parts
    moe: dict[str, float] = field(default_factory=dict)  # expert load and balance loss; empty for the dense model
    bad: BadStep | None = None  # what is wrong with the step, which was skipped unless bad.updates
    part_norms: dict[str, float] = field(default_factory=dict)  # gradient norms of the trained parts, before clipping
    metrics: dict[str, float] = field(default_factory=dict)  # what else the objective reports


class TrainStep:
    """The model with its optimizer and schedule.

    Args:
        model_chunks: what this rank holds of the model, filled with weights, in training mode.
        optimizer_config: AdamW and its schedule.
        steps: length of the run, over which the learning rate decays.
        seq_length: tokens per pack.
        check_determinism: compute the gradients of every N-th step twice and compare; 0: never.
        health: which steps are bad, and what happens to them.
        objective: what the steps minimise.

    Attributes:
        updates: steps that have updated the weights; Adam's step count.
        bad_steps: judges the steps.
    """

    def __init__(
        self,
        model_chunks: Sequence[GlmvModel],
        optimizer_config: OptimizerConfig,
        steps: int,
        seq_length: int,
        check_determinism: int = 0,
        health: HealthConfig | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.objective = objective or CrossEntropy()
        self.check_determinism = check_determinism
        self.bad_steps = BadStepDetector(health or HealthConfig())
        self.updates = 0
        self.model_chunks = model_chunks
        self.config = model_chunks[0].config
        self.seq_length = seq_length
        fp8, overlap = model_chunks[0].fp8_kernels, has_data_parallel_ranks()
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=optimizer_config.main_grads == "fp32",
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap and optimizer_config.overlap_grad_reduce,
            overlap_param_gather=overlap and optimizer_config.overlap_param_gather,
            **fp8.data_parallel_fields,
        )
        settings.align_param_gather = settings.overlap_param_gather and len(model_chunks) > 1
        # The backward pass begins with the last chunk. Its reduction, in one bucket, overlaps with earlier chunks.
        self.ddp = [
            DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(model_chunks)
        ]
        self.optimizer = build_optimizer(optimizer_config, self.ddp, self.config.params_dtype, fp8)
        self.scheduler = build_scheduler(optimizer_config, self.optimizer, steps)
        self.part_norms = PartNorms(self.ddp, self.optimizer)
        self.expert_load = ExpertLoad(model_chunks)
        self.timers = StepTimers()
        for chunk in model_chunks:
            if chunk.pre_process:
                self.timers.watch_vision(chunk.vision_model, chunk.adapter)
            chunk.config.timers = self.timers
            chunk.config.grad_scale_func = self.optimizer.scale_loss
            chunk.config.finalize_model_grads_func = self._finalize_gradients
            if settings.overlap_grad_reduce:
                # Reduce only after the last micro-batch's backward pass.
                no_sync = [ddp.no_sync for ddp in self.ddp]
                chunk.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            if settings.align_param_gather:
                # The schedule gathers the weights of a virtual stage while the stage before computes.
                chunk.config.param_sync_func = [ddp.start_param_sync for ddp in self.ddp]

    def run(self, step: int, batches: Sequence[Batch]) -> StepReport:
        """Train on the packs of one step. Collective.

        Args:
            step: number of the step, from 1.
            batches: the packs of this rank's data-parallel rank.

        Raises:
            NoSamples, NothingToLearn: no token of the global batch carries loss. Nothing was computed.
            NonFiniteStep, Spike: the step is bad, and the policy is to stop. Nothing was updated.
            NonDeterministicStep: the step was computed twice, and its gradients differ.
        """
        ranks = parallel_state.get_data_parallel_world_size()
        packs = len(batches) * ranks
        count, loss_tokens, tokens, samples, images, patches, quarantined = self._totals(batches)
        if not tokens:
            raise NoSamples(f"step {step}: no sample of the global batch could be read; see quarantine.jsonl")
        if not loss_tokens:
            raise NothingToLearn(
                f"step {step}: none of the {tokens} tokens of the global batch carries loss; look at their sources, "
                "and at data.too_long: truncate may have cut off the answers"
            )
        self._set_mean_tokens(tokens / packs)
        lr = set_step(self.scheduler, step)
        biases = KeptExpertBiases(self.model_chunks)
        numbers = [PackNumber(step, parallel_state.get_data_parallel_rank() + n * ranks) for n in range(len(batches))]
        compute = partial(self._forward_backward, batches, loss_scale=packs / count, numbers=numbers)
        twice = self.check_determinism and step % self.check_determinism == 0
        losses = compute_twice(self.model_chunks, compute, step) if twice else compute()
        part_norms = self.part_norms.compute()
        with self.timers.count("optimizer"):
            grad_norm, bad = self._update_unless_bad(step, losses.loss, biases)
        return StepReport(
            loss=losses.loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens=tokens,
            padding_fraction=1 - tokens / (packs * self.seq_length),
            samples=samples,
            images=images,
            patches=patches,
            quarantined=quarantined,
            domain_losses=losses.by_domain,
            scaled_lrs=scaled_learning_rates(self.scheduler),
            moe=self.expert_load.report(len(batches)) if self.model_chunks[0].glmv_config.decoder.is_moe else {},
            bad=bad,
            part_norms=part_norms,
            metrics=losses.metrics,
        )

    def measure(
        self,
        batches: Sequence[Batch],
        keep_losses: KeepLosses | None = None,
        numbers: Sequence[PackNumber] = (),
        *,
        moves_scales: bool = False,
    ) -> tuple[float, float]:
        """Return the mean loss and the gradient norm of packs, and leave the weights as they are. Collective.

        Args:
            batches: the packs of this rank's data-parallel rank. Some token of the global batch carries loss.
            keep_losses: called with each pack and its losses, on the last pipeline stage.
            numbers: which packs of the run they are, which decides what `lora.dropout` drops. Empty: nothing.
            moves_scales: whether the scales of fp8.recipe=delayed, emulated, follow these packs.
        """
        biases = KeptExpertBiases(self.model_chunks)
        count, _, tokens, *_ = self._totals(batches)
        packs = len(batches) * parallel_state.get_data_parallel_world_size()
        self._set_mean_tokens(tokens / packs)
        loss = self._forward_backward(batches, packs / count, keep_losses, numbers).loss
        biases.restore()
        end_step(self.model_chunks, updated=moves_scales)
        clear_recorded_losses()
        return loss, prepare_update(self.optimizer)

    def _set_mean_tokens(self, tokens_per_pack: float) -> None:
        for chunk in self.model_chunks:
            for router in chunk.routers():
                router.mean_tokens_per_pack = tokens_per_pack

    def _update_unless_bad(self, step: int, loss: float, biases: KeptExpertBiases) -> tuple[float, BadStep | None]:
        """Update the weights, or put the expert biases back; return the gradient norm and what is wrong. Collective.

        Raises:
            NonFiniteStep, Spike: the policy is to stop.
        """
        grad_norm = math.nan
        if math.isfinite(loss):
            grad_norm = prepare_update(self.optimizer)
        else:
            self._check_weights(step, loss)
        # The ranks' norms may differ in the last bit. All judge those of rank 0.
        judged = torch.tensor([loss, grad_norm], dtype=torch.float64, device=torch.cuda.current_device())
        dist.broadcast(judged, src=0)
        bad = self.bad_steps.judge(*judged.tolist())
        end_step(self.model_chunks, updated=bad is None or bad.updates)
        if bad is None or bad.updates:
            apply_update(self.optimizer, grad_norm)
            self.updates += 1
            return grad_norm, bad
        biases.restore()
        if bad.action == "stop":
            raise (Spike if bad.is_finite else NonFiniteStep)(f"step {step}: {bad.reason}")
        return grad_norm, bad

    def _forward_backward(
        self,
        batches: Sequence[Batch],
        loss_scale: float,
        keep_losses: KeepLosses | None = None,
        numbers: Sequence[PackNumber] = (),
    ) -> Losses:
        """Return the loss. The reduced gradients are in DDP's buffers."""
        return self.objective.reduce(self.run_schedule(batches, loss_scale, keep_losses, numbers))

    def run_schedule(
        self,
        batches: Sequence[Batch],
        loss_scale: float,
        keep_losses: KeepLosses | None = None,
        numbers: Sequence[PackNumber] = (),
    ) -> list[PackReport]:
        """Run forward and backward passes and reduce the gradients. Collective.

        Args:
            batches: the packs of this rank's data-parallel rank.
            loss_scale: factor of the losses in the backward pass.
            keep_losses: as for `measure`.
            numbers: numbers of the packs.

        Returns:
            What `Objective.reduce` takes.
        """
        for ddp in self.ddp:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.timers.count(FORWARD_BACKWARD):
            return get_forward_backward_func()(
                forward_step_func=partial(
                    forward_step, loss_scale=loss_scale, keep_losses=keep_losses, objective=self.objective
                ),
                data_iterator=[
                    zip_longest(broadcast_patches(batches) if chunk.pre_process else batches, numbers)
                    for chunk in self.model_chunks
                ],
                model=self.ddp,
                num_microbatches=len(batches),
                seq_length=self.seq_length,
                micro_batch_size=1,
                forward_only=False,
            )

    def synchronize_weights(self) -> None:
        """Finish gathering the updated weights. Call it before they are saved or compared.

        With `optimizer.overlap_param_gather` the next forward pass would do it; until then the modules hold the weights
        from before the step.
        """
        if self.ddp[0].ddp_config.overlap_param_gather:
            for ddp in self.ddp:
                gather_weights(ddp)
                ddp.enable_forward_pre_hook()

    def _check_weights(self, step: int, loss: float) -> None:
        """Raise NonFiniteWeights if a weight that computed a non-finite loss is not finite itself. Collective."""
        own = [
            canonical_name(chunk, name)
            for chunk in self.model_chunks
            for name, weight in chunk.named_parameters()
            if not weight.isfinite().all()
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        if names := list(dict.fromkeys(name for names in everyone for name in names)):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise NonFiniteWeights(
                f"step {step}: the loss is {loss} because weights are not finite: {names[0]}{more}. Check what the "
                "run started from: model.init_from, or its newest checkpoint"
            )

    def _totals(self, batches: Sequence[Batch]) -> list[int]:
        """Sum counts over the global batch, before anything is computed."""
        counts = [
            [
                self.objective.count(b),
                b.num_loss_tokens,
                b.num_tokens,
                b.num_samples,
                b.num_images,
                b.num_patches,
                len(b.quarantined),
            ]
            for b in batches
        ]
        totals = torch.tensor(counts, device=torch.cuda.current_device()).sum(0)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        return totals.tolist()

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Keep the experts' token counts, which megatron-core uses for the expert bias and then clears."""
        self.expert_load.take()
        with self.timers.count("communication"):
            finalize_model_grads(*args, **kwargs)


def has_data_parallel_ranks() -> bool:
    """Return whether other ranks have the same weights: otherwise there is no communication to overlap."""
    sizes = (
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        parallel_state.get_expert_data_parallel_world_size(),
    )
    return max(sizes) > 1


# --- one micro-batch --------------------------------------------------------------------------------------------------


def forward_step(
    batches: Iterator[tuple[Batch, PackNumber | None]],
    model: Any,
    loss_scale: float,
    keep_losses: KeepLosses | None = None,
    objective: Objective | None = None,
) -> tuple[Tensor, Any]:
    """Compute one micro-batch for megatron-core's schedules: the losses per token, and the function that sums them."""
    batch, number = next(batches)
    losses = forward(model, batch, number)
    return losses, partial(scaled_loss, objective or CrossEntropy(), batch, loss_scale, keep_losses=keep_losses)


def forward(model: Any, batch: Batch, number: PackNumber | None = None, *, with_labels: bool = True) -> Tensor:
    """Return the loss of every token of a pack that this context rank has, float32 [tokens / CP].

    Without labels, return the tokens' logits. On a pipeline stage that is not the last, return the input of the next
    stage.
    """
    names = (
        "input_ids",
        "position_ids",
        "cu_seqlens",
        "segment_lengths",
        "patches",
        "grid_thw",
        "frames_per_image",
        "routed_experts",
    )
    inputs = {name: getattr(batch, name) for name in names}
    return model(**inputs, labels=batch.labels if with_labels else None, pack=number)


def scaled_loss(
    objective: Objective, batch: Batch, loss_scale: float, losses: Tensor, keep_losses: KeepLosses | None = None
) -> tuple[Tensor, PackReport]:
    """Return the scaled loss of a pack for the backward pass, and what is reported of it."""
    if keep_losses is not None:
        keep_losses(batch, losses.detach())
    loss, report = objective.sum(batch, losses)
    return loss * loss_scale, report
