"""The model's greedy answers to a few prompts, computed by the training model in its layout.

There is no cache of keys and values, which megatron-core has for other layouts only: every token of an answer costs one
forward pass of all prompts. Each prompt is a micro-batch. Data-parallel ranks share the prompts; tensor, context,
pipeline and expert ranks work on each together, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from data_pipeline.encoding.batch import Batch, EncodedSample, collate, padded_length
from data_pipeline.encoding.rope_positions import rope_positions
from data_pipeline.encoding.tokenizer import GlmTokenizer
from model.context_slicing import my_context_tokens
from model.fp8_rules import token_multiple
from model.process_groups import same_packs_group
from training.prompts import Prompt
from training.step import TrainStep, forward
from training.validation import evaluation

NONE = -1  # a token that is not known on this rank


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str  # with special tokens such as <think>, without the token that ended it
    tokens: int  # without that token
    ended: bool  # by itself, not by validation.samples_max_tokens


def answer(
    trainer: TrainStep,
    prompts: Sequence[Prompt],
    tokenizer: GlmTokenizer,
    *,
    max_tokens: int,
    segment_multiple: int,
    may_continue: Callable[[], bool] = lambda: True,
) -> list[Answer] | None:
    """Return the greedy answer to every prompt. Collective; the training is not disturbed.

    Args:
        trainer: the model in its layout.
        prompts: the same on every process.
        tokenizer: of the run.
        max_tokens: longest answer.
        segment_multiple: segments are padded to a multiple of this many tokens.
        may_continue: called before every token, on all processes; where it says no, the result is None.
    """
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = [_Writing(prompt.sample, len(prompt.sample)) for prompt in prompts[rank::ranks]]
    per_rank = _micro_batches(math.ceil(len(prompts) / ranks))
    model = trainer.model_chunks[0]
    ends = model.glmv_config.decoder.eos_token_id
    multiple = math.lcm(segment_multiple, token_multiple(model.fp8_kernels, model.parallel))
    with evaluation(trainer):
        for _ in range(max_tokens):
            if not may_continue():
                return None
            packs = _packs(
                [each for each in own if not each.ended], per_rank, multiple, segment_multiple, tokenizer.pad_id
            )
            tokens = _next_tokens(trainer, packs, banned=tokenizer.image_id)
            for each, token in zip([each for each in own if not each.ended], tokens, strict=False):
                each.add(token, ends, tokenizer.image_id)
            if not _any_rank(any(not each.ended for each in own)):
                break
    everyone: list[Any] = [None] * ranks
    found = [each.answer(tokenizer) for each in own]
    dist.all_gather_object(everyone, found, group=parallel_state.get_data_parallel_group())
    return [everyone[number % ranks][number // ranks] for number in range(len(prompts))]


@dataclass
class _Writing:
    """A prompt with the part of its answer that is written."""

    sample: EncodedSample
    prompt_length: int
    ended: bool = False

    def add(self, token: int, ends: Sequence[int], image_id: int) -> None:
        if token in ends:
            self.ended = True
            return
        ids = np.append(self.sample.input_ids, token)
        self.sample = replace(
            self.sample,
            input_ids=ids,
            loss=np.append(self.sample.loss, False),
            position_ids=rope_positions(ids == image_id, self.sample.grids),
        )

    def answer(self, tokenizer: GlmTokenizer) -> Answer:
        ids = self.sample.input_ids[self.prompt_length :].tolist()
        return Answer(decode(ids, tokenizer), len(ids), self.ended)


def decode(ids: Sequence[int], tokenizer: GlmTokenizer) -> str:
    """Return the text of tokens, special ones by their names."""
    parts = []
    for special, run in groupby(ids, key=tokenizer.names.__contains__):
        tokens = list(run)
        parts += [tokenizer.names[token] for token in tokens] if special else [tokenizer.decode(tokens)]
    return "".join(parts)


def _micro_batches(prompts: int) -> int:
    """Return the smallest number of micro-batches that holds the prompts and that the schedule can run."""
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is None:
        return prompts
    return padded_length(prompts, parallel_state.get_pipeline_model_parallel_world_size())


def _packs(writing: Sequence[_Writing], count: int, multiple: int, segment_multiple: int, pad_id: int) -> list[Batch]:
    """Return packs of one prompt each, all of the same length, a multiple; the last ones may be empty."""
    longest = max((len(each.sample) for each in writing), default=1)
    fill = partial(
        collate, seq_length=padded_length(longest, multiple), segment_multiple=segment_multiple, pad_id=pad_id
    )
    return [fill([each.sample]) for each in writing] + [fill([]) for _ in range(count - len(writing))]


def _next_tokens(trainer: TrainStep, packs: Sequence[Batch], banned: int) -> list[int]:
    """Return the most likely token after the first segment of each pack. Collective."""
    found = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, banned=banned),
        data_iterator=[iter(packs) for _ in trainer.model_chunks],
        model=trainer.ddp,
        num_microbatches=len(packs),
        seq_length=len(packs[0].input_ids),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    tokens = torch.stack(found).cpu() if found else torch.full((len(packs),), NONE)
    dist.all_reduce(tokens, op=dist.ReduceOp.MAX, group=same_packs_group())
    return tokens.tolist()


def _forward_step(batches: Iterator[Batch], model: Any, banned: int) -> tuple[Tensor, Any]:
    batch = next(batches)
    return forward(model, batch, with_labels=False), partial(most_likely, batch, banned)


def most_likely(batch: Batch, banned: int, logits: Tensor, non_loss_data: bool) -> Tensor:
    """Return the most likely token after a pack's first segment, the lowest of several.

    Args:
        batch: the pack.
        banned: a token that is never chosen: <|image|>, whose embedding would be missing.
        logits: those of this context rank's tokens, [tokens / CP, vocabulary / TP].
        non_loss_data: megatron-core passes it.

    Returns:
        int64, NONE on a context rank that does not have the segment's last token.
    """
    last = int(batch.segment_lengths[0]) - 1
    here = (my_context_tokens(batch.cu_seqlens) == last).nonzero()
    if not len(here):
        return torch.tensor(NONE, device=logits.device)
    own = logits[int(here[0])].double()
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() * len(own)
    if first <= banned < first + len(own):
        own[banned - first] = -math.inf
    best = own.argmax()
    candidates = torch.empty(2 * tensor_ranks, dtype=own.dtype, device=own.device)
    candidate = torch.stack([own[best], (best + first).double()])
    dist.all_gather_into_tensor(candidates, candidate, group=parallel_state.get_tensor_model_parallel_group())
    values, tokens = candidates.view(-1, 2).T
    return tokens[values.argmax()].long()


def _any_rank(value: bool) -> bool:
    """Return whether `value` holds on any data-parallel rank. Collective."""
    flag = torch.tensor(int(value), device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return bool(flag)
