"""The workload of a run of reinforcement learning, for tools.plan: packs of an update, and the memory of its engine.

How long responses are is known only when they are drawn. Here those of a group are spread evenly up to the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from common.urls import shown
from model.config import GlmvConfig
from model.image_constants import MERGE_SIZE
from model.rank_sizes import parameters_by_rank
from model.weights.table import hf_shapes
from planning.limits import GIB
from planning.packs import ASSUMED_SAMPLE, PackShape, pack_full_of_images, segments_of
from planning.plan import Workload, model_of_preset
from planning.rollouts import EmbeddedEngineMemory, Rollouts
from rl.config import RlConfig
from rl.engines.build import GB
from rl.engines.embedded import token_bytes
from rl.expected import Sizes, expected_packs, expected_rollouts
from rl.setup import longest_prompt, longest_response, prepare
from training.dry_run import one_stage
from training.dtypes import DTYPES

GROWTH = 1.5  # columns for keys and values that the embedded engine may have, over those that are filled
OF_DRAWING = 24  # bytes per row and token of the vocabulary: three times in float64


def read_rl_workload(config: RlConfig, processes: int, skip_files: bool) -> Workload:
    """Return what an update of a run is expected to take, and the memory of its engine.

    Args:
        config: The run.
        processes: Number of GPUs.
        skip_files: Do not open prompts, tokenizer and `model.init_from`.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: As for a real run.
    """
    wanted = -(-config.rl.prompts // config.rl.updates)
    if skip_files:
        length = min(ASSUMED_SAMPLE, longest_prompt(config))  # half of it an image
        model = model_of_preset(config)
        prompts: Sequence[Sizes] = [(length, (MERGE_SIZE**2 * (length // 2),))]
        said = "assumed: as many image tokens as a pack can hold"
    else:
        prepared = prepare(config, processes)
        model, prompts = prepared.model, prepared.loader.table.spread(wanted)
        prepared.loader.close()
        said = f"the fullest that an update of {len(prompts):,} of the run's prompts is expected to take"
    rollouts = expected_rollouts(config, prompts)
    packs = expected_packs(config, model, rollouts)
    if skip_files:
        budgets = (config.data.image_max_tokens, config.data.segment_multiple)
        fullest = pack_full_of_images(config.train.seq_length, *budgets)
    else:
        fullest = max(map(segments_of, packs), key=lambda shape: sum(shape.patches))
    typical = PackShape(tuple(length for length, _ in rollouts), tuple(tuple(patches) for _, patches in rollouts))
    planned = replace(config, train=replace(config.train, global_batch_size=len(packs)))
    return Workload(planned, model, fullest, typical, said, rollouts_of(config, model, rollouts))


def rollouts_of(config: RlConfig, model: GlmvConfig, rollouts: Sequence[Sizes]) -> Rollouts:
    """Return what a run does around its updates."""
    itemsize = DTYPES[config.train.precision].itemsize
    largest = max(map(prod, hf_shapes(model).values())) * itemsize
    engine = engine_of(config, model) if config.rollout.engine == "embedded" else None
    drawn = f"{config.rl.prompts * config.rl.group:,} per step"
    if config.expansion.enabled:
        drawn += f", and up to {config.expansion.max_ratio:g} times as many (expansion)"
    mean = sum(length for length, _ in rollouts) / len(rollouts)
    lengths = f"{mean:,.0f} tokens each, if responses are spread evenly up to {longest_response(config):,}"
    return Rollouts(
        updates=config.rl.updates,
        publishing=largest * (1 + 1 / config.parallel.tensor_model_parallel_size),
        engine=engine,
        facts=(("rollouts", f"{drawn}; with the prompt {lengths}"), ("engine", _describe(config, engine))),
        unknown=tuple(_unknown(config)),
    )


def engine_of(config: RlConfig, model: GlmvConfig) -> EmbeddedEngineMemory:
    """Return what the embedded engine needs on a lead."""
    dtype = DTYPES[config.train.precision]
    [held] = parameters_by_rank(model, type(config.parallel)(), one_stage(model))
    of_token = token_bytes(model, dtype)
    # A group is not divided, even if it takes more than the limit.
    group = (longest_prompt(config) + config.rl.group * longest_response(config)) * of_token
    cache = max(config.rollout.embedded_cache_gb * GB, group)
    rows = min(config.rollout.embedded_rows, max(config.rl.group, int(cache / of_token) // longest_response(config)))
    return EmbeddedEngineMemory(
        weights=sum(held.values()) * dtype.itemsize,
        drawing=GROWTH * cache + rows * model.decoder.vocab_size * (OF_DRAWING + dtype.itemsize),
    )


def _describe(config: RlConfig, engine: EmbeddedEngineMemory | None) -> str:
    if engine is None:
        servers = list(map(shown, config.rollout.addresses))
        if config.rollout.start:
            place = "a Ray cluster" if config.rollout.ray else "the machine of the first process"
            servers.append(f"{config.rollout.start} on {place}")
        return f"{config.rollout.engine}, servers: {', '.join(servers)}"
    return (
        f"embedded: on the lead of each data-parallel rank {engine.weights / GIB:.1f} GiB for the whole model, and up "
        f"to {engine.drawing / GIB:.1f} GiB while nothing is trained"
    )


def _unknown(config: RlConfig) -> Iterator[str]:
    yield "lengths of responses: assumed as above; shorter ones let more images into a pack"
    yield "time: updates alone; rollouts, rewards, log-probabilities and the publication of weights take their own"
    if config.rollout.engine != "embedded":
        yield "servers: what they need is not planned" + (
            ", though they take memory of the first process's machine"
            if config.rollout.start and not config.rollout.ray
            else ""
        )
        return
    yield (
        "rollout.engine=embedded: what transformers' model needs while it reads prompts, 16,384 tokens at a time, is "
        "not counted; the lead is taken to be the fullest rank of the first stage"
    )
