"""Run the packs of one step again, each alone, from the weights before it: which of them made the step bad?

The packs come from the run's configuration and from the data counters of its newest checkpoint before the step. Nothing
is written into the run's folder. All data-parallel ranks compute the same packs, so any layout gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data_pipeline.encoding.batch import Batch
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import DataError
from data_pipeline.loading.loader import PackedLoader
from model.checkpoint import TRAIN_STATE, find_checkpoint, is_checkpoint, load_checkpoint, read_train_state
from model.config import ConfigError
from model.context_slicing import my_context_tokens
from model.fp8_scales import load_scales
from model.lora_dropout import PackNumber
from model.weights.remote import title
from training.batch_broadcast import broadcast_batches
from training.config import RunConfig, load_config
from training.distributed import process_group
from training.lora_base import base_fingerprint, check_same_adapters, check_same_base
from training.ranks import world_size
from training.setup import Prepared, build_loader, build_trainer, lay_out_pipeline
from training.start_point import RUN_CONFIG, StartPoint, find_weights, resolve_model, step_folders
from training.step import TrainStep
from training.validator import PreparedValidation

# One process has the whole model, whatever the run's layout was.
ONE_PROCESS = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.context_parallel_size=1",
    "parallel.expert_model_parallel_size=1",
    "parallel.expert_tensor_parallel_size=1",
    "parallel.sequence_parallel=false",
    "parallel.vision=images",
)
ALWAYS = (
    "data.num_workers=0",
    "parallel.virtual_pipeline_model_parallel_size=1",  # there is one micro-batch at a time
)


@dataclass(frozen=True)
class SampleLoss:
    """The loss of one sample of a pack."""

    source: str
    shard: str
    key: str
    domain: str
    tokens: int
    loss_tokens: int
    loss: float | None  # mean over its tokens that carry loss; None where none does
    max_loss: float | None  # of one token
    max_token: int | None  # that token's place in the sample
    max_text: str  # that token


@dataclass(frozen=True)
class PackLoss:
    """One pack of the step, alone."""

    pack: int  # number in the step, from 0
    tokens: int
    loss_tokens: int
    loss: float | None
    grad_norm: float | None  # of the pack as if it were the whole step; None where no token carries loss
    samples: list[SampleLoss]


@dataclass(frozen=True)
class Replay:
    """A step that was replayed."""

    step: int
    weights: str  # which weights were used
    steps_between: int | None  # steps that the weights have not seen; None where they were given
    loss: float | None  # mean over the loss tokens of all packs that were replayed
    packs: list[PackLoss]


@dataclass(frozen=True)
class Prelude:
    """What a replay starts from."""

    prepared: Prepared
    weights: Path | None
    adapters: Path | None  # a checkpoint of adapters over these weights
    description: str
    steps_between: int | None


def prepare_replay(run: Path, step: int, checkpoint: Path | None = None, overrides: Sequence[str] = ()) -> Prelude:
    """Find weights and data of a step, and check all that can be checked in one process. Writes nothing.

    Args:
        run: the run's folder.
        step: number of the step, from 1.
        checkpoint: other weights: a step folder, a run's folder or a Hugging Face folder.
        overrides: dotted.key=value, such as another layout.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: the run or the weights cannot be used.
    """
    if not (run / RUN_CONFIG).is_file():
        raise ConfigError(f"{run} is no run: it has no {RUN_CONFIG}; give the train.output_dir of a run")
    layout = ONE_PROCESS if world_size() == 1 else ()
    config = load_config(RunConfig, run / RUN_CONFIG, [*ALWAYS, *layout, *overrides])
    before = [folder for folder in step_folders(run) if int(folder.name.removeprefix("step_")) < step]
    own = before[-1] if before else None
    chosen = _find(checkpoint) if checkpoint else own
    weights, adapters = _weights_and_adapters(config, chosen)
    model = resolve_model(config.model, StartPoint(weights=chosen or weights))
    config.parallel.check(model, world_size(), config.train.seq_length, config.data.segment_multiple)
    loader = build_loader(config, model)
    done = _move_to(loader, step, own, config.checkpoint.allow_changes)
    no_validation = PreparedValidation(None, [])
    prepared = Prepared(config, model, loader, lay_out_pipeline(config, model, loader), no_validation)
    origin = chosen or weights
    description = f"the weights of {title(origin)}" if origin else f"random weights of seed {config.train.seed}"
    return Prelude(prepared, weights, adapters, description, None if checkpoint else step - 1 - done)


def _find(path: Path) -> Path | None:
    return find_checkpoint(path) if is_checkpoint(path) else find_weights(str(path))


def _weights_and_adapters(config: RunConfig, chosen: Path | None) -> tuple[Path | None, Path | None]:
    """Return what to fill the model with, and the checkpoint of adapters to load after that, if it is one.

    Raises:
        ConfigError: the adapters are of another base model, or the run has others.
    """
    if chosen is None:
        return find_weights(config.model.init_from), None
    if config.lora.rank and is_checkpoint(chosen) and (before := read_train_state(chosen)).base:
        weights = find_weights(config.model.init_from)
        check_same_adapters(before, config, chosen)
        check_same_base(before, config, base_fingerprint(weights, config.train.seed), chosen)
        return weights, chosen
    return chosen, None


def _move_to(loader: PackedLoader, step: int, checkpoint: Path | None, allow_changes: bool) -> int:
    """Move the loader to the beginning of `step`, and return the step of the checkpoint."""
    done = 0
    if checkpoint is not None:
        state = read_train_state(checkpoint)
        loader.load_state_dict(state.data, allow_changes=allow_changes)
        done = state.step
    loader.skip(step - 1 - done)
    return done


def replay(prelude: Prelude, step: int, only: Collection[int] = ()) -> tuple[Replay, list[Batch]]:
    """Run the packs of a step one by one, without an update. Collective.

    Args:
        prelude: of `prepare_replay`.
        step: number of the step.
        only: numbers of the packs to run; all of them where it is empty.

    Returns:
        What every pack gave, and the packs that were run; complete on the main process alone.

    Raises:
        DataError: the data ends before the step, or has fewer packs than `only` asks for.
    """
    prepared = prelude.prepared
    with process_group():
        trainer = build_trainer(prepared, StartPoint(weights=prelude.weights))
        if prelude.adapters is not None:
            load_checkpoint(prelude.adapters, trainer.model_chunks, verify=prepared.config.checkpoint.verify)
        if prelude.weights is not None and (prelude.weights / TRAIN_STATE).is_file():
            load_scales(trainer.model_chunks, read_train_state(prelude.weights).fp8)
        batches = broadcast_batches(prepared.loader.next_step)
        if not batches:
            raise DataError(f"the data ends before step {step}")
        if too_high := [number for number in only if not 0 <= number < len(batches)]:
            raise DataError(f"--pack {too_high[0]}: step {step} has the packs 0 to {len(batches) - 1}")
        chosen = [number for number in range(len(batches)) if not only or number in only]
        packs = [
            _run_pack(trainer, PackNumber(step, number), batches[number], prepared.loader.tokenizer)
            for number in chosen
        ]
    prepared.loader.close()
    counted = [(pack.loss, pack.loss_tokens) for pack in packs if pack.loss is not None]
    total = sum(tokens for _, tokens in counted)
    loss = sum(loss * tokens for loss, tokens in counted) / total if total else None
    return Replay(step, prelude.description, prelude.steps_between, loss, packs), [batches[n] for n in chosen]


def _run_pack(trainer: TrainStep, number: PackNumber, batch: Batch, tokenizer: GlmTokenizer) -> PackLoss:
    grad_norm, losses = None, torch.zeros(batch.input_ids.numel())
    if batch.num_loss_tokens:
        kept: list[Tensor] = []
        _, grad_norm = trainer.measure([batch], lambda _, losses: kept.append(losses), [number])
        losses = _whole_losses(batch, kept)
    mask = batch.loss_mask > 0
    loss = losses[mask].double().mean().item() if batch.num_loss_tokens else None
    samples = list(_sample_losses(batch, losses, tokenizer))
    return PackLoss(number.pack, batch.num_tokens, batch.num_loss_tokens, loss, grad_norm, samples)


def _whole_losses(batch: Batch, kept: Sequence[Tensor]) -> Tensor:
    """Return the losses of all tokens, float32 [tokens] on the CPU, from those of the context ranks. Collective."""
    losses = torch.zeros(batch.input_ids.numel(), device=torch.cuda.current_device())
    if kept:  # on the last pipeline stage
        losses[my_context_tokens(batch.cu_seqlens).to(losses.device)] = kept[0].float()
        dist.all_reduce(losses, group=parallel_state.get_context_parallel_group())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(losses, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return losses.cpu()


def _sample_losses(batch: Batch, losses: Tensor, tokenizer: GlmTokenizer) -> Iterator[SampleLoss]:
    for number, (start, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        if not batch.sample_ids[number]:
            continue
        places = start + batch.loss_mask[start:end].nonzero().flatten()
        shard, _, key = batch.sample_ids[number].partition("/")
        loss = max_loss = max_token = None
        text = ""
        if len(places):
            own = losses[places]
            worst = int(own.argmax())  # a value that is not a number counts as the largest
            token = int(batch.labels[places[worst]])
            loss, max_loss = own.double().mean().item(), own[worst].item()
            max_token = int(places[worst]) - start + 1  # the loss stands at the token before
            text = tokenizer.names.get(token) or tokenizer.decode([token])
        yield SampleLoss(
            source=batch.segment_sources[number],
            shard=shard,
            key=key,
            domain=batch.segment_domains[number],
            tokens=int(batch.segment_lengths[number]),
            loss_tokens=len(places),
            loss=loss,
            max_loss=max_loss,
            max_token=max_token,
            max_text=text,
        )
