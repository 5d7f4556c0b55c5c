"""Validation: the loss on held-out packs, the same at every layout, which leaves no trace in the training.

The packs are planned from the beginning with a seed of their own each time, so that every validation, of every run with
the same lengths, sees the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.domains import DOMAINS
from data_pipeline.encoding.batch import Batch
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import PackedLoader
from data_pipeline.loading.overlap import shared_samples, shared_shards
from data_pipeline.loading.source import Source
from data_pipeline.plan.pack_cost import PackCost
from model.context_slicing import my_context_tokens
from model.fp8_weights import gather_weights
from training.batch_broadcast import broadcast_patches, read_step
from training.domain_losses import domain_masks
from training.step import TrainStep, forward
from training.step_errors import NothingToLearn
from training.validation_config import ValidationConfig

SEED = 0  # of the order of held-out samples


# --- held-out packs ---------------------------------------------------------------------------------------------------


def build_held_out_loader(
    config: ValidationConfig,
    data: DataConfig,
    *,
    seq_length: int,
    global_batch_size: int,
    cost: PackCost,
    data_parallel_rank: int,
    data_parallel_size: int,
    micro_batch_multiple: int = 1,
) -> PackedLoader:
    """Open the held-out sources. Without `steps`, the steps are as small as hold all samples, the same at any layout.

    Args:
        config: names them.
        data: the other keys of the data: tokenizer, pixel budgets, workers.
        seq_length: tokens per pack.
        global_batch_size: packs per step.
        cost: by which packs are balanced.
        data_parallel_rank: of this process.
        data_parallel_size: of the run.
        micro_batch_multiple: of which a rank's packs of a step are a multiple (the pipeline schedule).

    Raises:
        DataError: a source cannot be used.
    """
    once = [source if config.steps or source.epochs else replace(source, epochs=1.0) for source in config.sources]
    data = replace(data, sources=once, seed=SEED)
    try:
        return PackedLoader(
            data,
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            cost=cost,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            small_steps=0 if config.steps else micro_batch_multiple,
        )
    except DataError as error:
        raise DataError(f"validation.sources: {error}") from None


def check_overlap(held_out: Sequence[Source], training: Sequence[Source], *, allowed: bool) -> None:
    """Refuse held-out shards that are also training shards.

    Raises:
        DataError: there is one, and `allowed` is false.
    """
    shared = shared_shards(held_out, training)
    if shared and not allowed:
        shard, more = shared[0], f", and {len(shared) - 1} more are too" if len(shared) > 1 else ""
        raise DataError(
            f"validation.sources: shard {shard.name} is also a training shard ({shard.other_name} of source "
            f"{shard.other_source!r}){more}: remove it from one of the two, or set validation.allow_overlap=true"
        )


def check_loss_tokens(
    config: ValidationConfig, data: DataConfig, *, seq_length: int, global_batch_size: int, cost: PackCost
) -> None:
    """Read held-out packs in this process until one has a token that carries loss: usually one pack.

    Args:
        config: names the sources.
        data: the other keys of the data.
        seq_length: tokens per pack.
        global_batch_size: packs per step.
        cost: by which packs are balanced.

    Raises:
        DataError: none has, or a shard is lost.
    """
    loader = build_held_out_loader(
        config,
        replace(data, num_workers=0),
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        cost=cost,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    samples, unused = 0, Counter[str]()
    for pack in islice(loader.read_packs(), config.steps * global_batch_size or None):
        if isinstance(pack, DataError):
            raise DataError(f"validation.sources: {pack}") from pack
        if pack.num_loss_tokens:
            return
        samples += pack.num_samples
        unused += Counter(record["reason"] for record in pack.quarantined)
    reasons = ", ".join(f"{count} {reason}" for reason, count in unused.most_common(3)) or "none"
    raise DataError(
        f"validation.sources: no token of {samples} samples carries loss (samples that cannot be used: {reasons}): "
        "choose other shards, or look at data.too_long"
    )


def describe_held_out(held_out: Sequence[Source], training: Sequence[Source]) -> Iterator[str]:
    """Yield lines for the start of the log: what is held out, and what of it is also training data."""
    if not held_out:
        return
    samples, shards = (sum(map(len, x)) for x in (held_out, [source.shards for source in held_out]))
    yield f"validation: {samples:,} samples in {shards:,} shards are held out"
    if shared := len(shared_shards(held_out, training)):
        yield f"validation: {shared:,} of these shards are also training shards"
    if same := shared_samples(held_out, training):
        yield f"validation: {same:,} of these samples have a record, image or video that is also in the training data"


# --- a model that does not learn --------------------------------------------------------------------------------------


@contextmanager
def evaluation(trainer: TrainStep) -> Iterator[None]:
    """Evaluate inside, and leave the trainer exactly as it was. Collective.

    Weights are gathered first: with `optimizer.overlap_param_gather` they would be those from before the last step.
    Nothing is counted for the expert bias or the balance loss, which need gradients (model.moe).
    """
    overlapped = trainer.ddp[0].ddp_config.overlap_param_gather
    modes = [(module, module.training) for ddp in trainer.ddp for module in ddp.modules()]
    tracker = tensor_parallel.get_cuda_rng_tracker()
    random_states = (torch.get_rng_state(), torch.cuda.get_rng_state(), tracker.get_states())
    for ddp in trainer.ddp:
        if overlapped:
            gather_weights(ddp)
        ddp.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        trainer.timers.forget()
        torch.set_rng_state(random_states[0])
        torch.cuda.set_rng_state(random_states[1])
        tracker.set_states(random_states[2])
        if overlapped:
            for ddp in trainer.ddp:
                ddp.enable_forward_pre_hook()


@dataclass
class HeldOutLoss:
    """What a validation found, over all ranks."""

    loss: float  # mean cross-entropy of the tokens that carry loss
    domain_losses: dict[str, float]
    tokens: int  # that carry loss
    samples: int
    unused: int  # samples that could not be read or are too long


def held_out_loss(
    trainer: TrainStep, loader: PackedLoader, steps: int = 0, may_continue: Callable[[], bool] = lambda: True
) -> HeldOutLoss | None:
    """Compute the loss on the first packs of a loader. Collective; the training is not disturbed.

    Args:
        trainer: the model in its layout.
        loader: it is read from its first step on; on processes that are no lead it stays unused.
        steps: how many steps of packs to read; 0: all.
        may_continue: called for every step of packs, on all processes; where it says no, the result is None.

    Raises:
        NothingToLearn: no token carries loss.
    """
    device = torch.cuda.current_device()
    sums = torch.zeros(len(DOMAINS), 2, dtype=torch.float64, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # samples, and those that could not be used
    loader.rewind()
    try:
        with evaluation(trainer):
            for _ in range(steps) if steps else count():
                batches = read_step(loader)
                if not may_continue():
                    return None
                if not batches:
                    break
                for report in forward_packs(trainer, batches, sum_by_domain):
                    sums += report
                counts += torch.tensor(
                    [sum(b.num_samples for b in batches), sum(len(b.quarantined) for b in batches)], device=device
                )
    finally:
        loader.close()
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())  # only the last stage has losses
    totals, tokens = sums.T.tolist()
    samples, unused = counts.tolist()
    if not sum(tokens):
        raise NothingToLearn(
            f"none of the {samples} samples of validation.sources has a token that carries loss, and {unused} could "
            "not be used: check validation.sources and data.too_long"
        )
    by_domain = {d: total / n for d, total, n in zip(DOMAINS, totals, tokens, strict=True) if n}
    return HeldOutLoss(sum(totals) / sum(tokens), by_domain, int(sum(tokens)), samples, unused)


def forward_packs(
    trainer: TrainStep, batches: Sequence[Batch], collect: Callable[[Batch, Tensor, bool], Tensor]
) -> list[Tensor]:
    """Compute the losses of packs, without gradients; call it within `evaluation`. Collective.

    Args:
        trainer: the model in its layout.
        batches: the packs of this rank's data-parallel rank.
        collect: takes a pack, its losses of this context rank (float32 [tokens / CP]), and a flag of megatron-core's.

    Returns:
        What `collect` returned for each pack; nothing except on the last pipeline stage.
    """
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, collect),
        data_iterator=[
            broadcast_patches(batches) if chunk.pre_process else iter(batches) for chunk in trainer.model_chunks
        ],
        model=trainer.ddp,
        num_microbatches=len(batches),
        seq_length=trainer.seq_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _forward_step(
    collect: Callable[[Batch, Tensor, bool], Tensor], batches: Iterator[Batch], model: Any
) -> tuple[Tensor, Any]:
    batch = next(batches)
    return forward(model, batch), partial(collect, batch)


def sum_by_domain(batch: Batch, losses: Tensor, non_loss_data: bool) -> Tensor:
    """Sum losses [tokens / CP] by domain.

    Sums are in float64, so that they do not depend on the layout.

    Args:
        batch: the pack.
        losses: those of this context rank's tokens.
        non_loss_data: megatron-core passes it.

    Returns:
        float64 [domains, 2]: sum and number of the losses.
    """
    tokens = my_context_tokens(batch.cu_seqlens)
    of_domain = (domain_masks(batch) * batch.loss_mask)[:, tokens].to(losses.device, torch.float64)
    return torch.stack([of_domain @ losses.double(), of_domain.sum(1)], dim=1)
