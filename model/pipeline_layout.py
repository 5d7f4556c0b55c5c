"""Solves the pipeline layout: which decoder layers each pipeline rank holds, so that the slowest rank is fastest.

The units of the pipeline are, in order: the token embedding with vision tower and adapter; the decoder layers; the
output layer with the loss. With P ranks and V virtual stages per rank there are P*V stages, and rank s % P has stage s:

    P = 2, V = 2      stage 0  rank 0   embedding, decoder
                      stage 1  rank 1   decoder, decoder
                      stage 2  rank 0   decoder
                      stage 3  rank 1   decoder, loss

In the steady state every rank works on its stages in turn and waits for the slowest rank. The time to fill and drain
the pipeline grows with the slowest stage. So layouts are compared by (1) the cost of the most expensive rank, (2)
having no empty stage, (3) the cost of the most expensive stage. Ties are broken by giving layers to the rank with the
least load, and of equal ranks to the later one, because early ranks keep the activations of more micro-batches.

The solution is exact, because a GLM has few dense layers followed by many equal layers. For each placement of the dense
layers (there are few), "no rank above M, no stage above K" is a count of the equal layers that fit under both limits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from model.config import ConfigError, GlmvConfig
from model.flops import FORWARD_AND_BACKWARD, head_cost, layer_cost, vision_cost

EMBEDDING, DECODER, LOSS = "embedding", "decoder", "loss"


@dataclass(frozen=True)
class UnitCosts:
    """Cost of each unit of the pipeline for a micro-batch, in FLOPs or any other measure.

    Only few layers should come before the last run of equal costs: the time to solve doubles with each of them.
    """

    first: int  # embedding, vision tower and adapter, which cannot be separated
    layers: tuple[int, ...]  # the decoder layers, in order
    last: int  # output layer and loss

    @property
    def unequal_layers(self) -> int:
        """Number of layers before the last run of equal costs."""
        return max((n for n, cost in enumerate(self.layers, start=1) if cost != self.layers[-1]), default=0)


@dataclass(frozen=True)
class PipelineLayout:
    """The units of each pipeline stage, and their cost."""

    stages: list[list[str]]  # units of each stage, as in TransformerConfig.pipeline_model_parallel_layout
    stage_costs: list[int]  # cost of each stage, in the measure of UnitCosts
    pipeline_size: int  # number of ranks

    @classmethod
    def of(cls, costs: UnitCosts, decoder_layers: Sequence[int], pipeline_size: int) -> PipelineLayout:
        """Build a layout from the number of decoder layers of each stage.

        >>> PipelineLayout.of(UnitCosts(5, (2, 3, 3), 4), [0, 2, 1, 0], pipeline_size=2).stages
        [['embedding'], ['decoder', 'decoder'], ['decoder'], ['loss']]
        """
        assert sum(decoder_layers) == len(costs.layers)
        stages = [[DECODER] * count for count in decoder_layers]
        stages[0].insert(0, EMBEDDING)
        stages[-1].append(LOSS)
        layer_costs = iter(costs.layers)
        stage_costs = [sum(islice(layer_costs, count)) for count in decoder_layers]
        stage_costs[0] += costs.first
        stage_costs[-1] += costs.last
        return cls(stages, stage_costs, pipeline_size)

    @cached_property
    def rank_costs(self) -> list[int]:
        """Cost of each rank, all its stages together."""
        return [sum(self.stage_costs[rank :: self.pipeline_size]) for rank in range(self.pipeline_size)]

    @property
    def imbalance(self) -> float:
        """The most expensive rank over the mean: the duration of a step relative to an even spread, bubble excluded."""
        return max(self.rank_costs) * self.pipeline_size / sum(self.rank_costs)

    def table(self) -> str:
        """Return a text table with one line per rank: its stages, its share of the cost, its cost over the mean."""
        virtual_size = len(self.stages) // self.pipeline_size
        header = ["rank", *(f"stage {n}" if virtual_size > 1 else "holds" for n in range(virtual_size))]
        rows = [[*header, "share", "of mean"]]
        total = sum(self.rank_costs)
        for rank, cost in enumerate(self.rank_costs):
            held = [_describe(stage) for stage in self.stages[rank :: self.pipeline_size]]
            rows.append([str(rank), *held, f"{cost / total:.1%}", f"{cost / total * self.pipeline_size:.3f}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"predicted imbalance {self.imbalance:.3f}"])


def _describe(stage: Sequence[str]) -> str:
    """Describe the units of a stage.

    >>> _describe(["embedding", "decoder", "decoder"])
    'embedding + 2'
    """
    layers = stage.count(DECODER)
    units = [EMBEDDING] * (EMBEDDING in stage) + [str(layers)] * (layers > 0) + [LOSS] * (LOSS in stage)
    return " + ".join(units) or "-"


# --- costs of a model -------------------------------------------------------------------------------------------------


def unit_costs(config: GlmvConfig, segment_lengths: Sequence[int], image_patches: Sequence[int]) -> UnitCosts:
    """Return the FLOPs of each unit for a micro-batch, forward and backward.

    Args:
        config: The model.
        segment_lengths: Tokens of each segment of the expected pack.
        image_patches: Patches of each of its images and frame pairs.
    """
    decoder, train = config.decoder, FORWARD_AND_BACKWARD
    return UnitCosts(
        first=train * vision_cost(config.vision).of(*image_patches),
        layers=tuple(train * layer_cost(decoder, n).of(*segment_lengths) for n in range(decoder.num_hidden_layers)),
        last=train * head_cost(decoder).of(*segment_lengths),
    )


def layout_for(
    config: GlmvConfig,
    pipeline_size: int,
    virtual_size: int,
    *,
    segment_lengths: Sequence[int],
    image_patches: Sequence[int],
) -> PipelineLayout:
    """Return the best layout of a model.

    Args:
        config: The model.
        pipeline_size: Number of pipeline ranks.
        virtual_size: Stages per rank.
        segment_lengths: As for `unit_costs`.
        image_patches: As for `unit_costs`.

    Raises:
        ConfigError: There are more ranks than units, or too many virtual stages: ranks would have several empty ones.
    """
    layers = config.decoder.num_hidden_layers
    if pipeline_size * (virtual_size - 1) > layers + 2:
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size={virtual_size} leaves ranks with several empty stages: "
            f"{pipeline_size} x {virtual_size} stages for {layers} decoder layers; make it smaller"
        )
    return solve_layout(unit_costs(config, segment_lengths, image_patches), pipeline_size, virtual_size)


# --- the solution -----------------------------------------------------------------------------------------------------


def solve_layout(costs: UnitCosts, pipeline_size: int, virtual_size: int = 1) -> PipelineLayout:
    """Return the best layout, as the module defines it, in which every rank has work.

    Every rank has a unit on its first stage, or the loss on its last. Later stages may be empty if there are not enough
    layers, or if that makes the most expensive rank cheaper: the rank with the vision tower may need no layers. An
    empty stage passes its input on.

    Raises:
        ConfigError: There are more ranks than units.
    """
    stages, layers = pipeline_size * virtual_size, len(costs.layers)
    if pipeline_size > layers + 2:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size={pipeline_size} leaves ranks without work: the model has {layers} "
            f"decoder layers, an embedding and an output layer; set it to at most {layers + 2}"
        )
    if stages == 1:
        return PipelineLayout.of(costs, [layers], 1)
    all_occupied = [stages - 1] if stages <= layers + 2 else []
    solved = [_solve(costs, pipeline_size, stages, occupied) for occupied in (*all_occupied, pipeline_size - 1)]
    return min(solved, key=lambda layout: max(layout.rank_costs))


def _solve(costs: UnitCosts, pipeline_size: int, stages: int, occupied: int) -> PipelineLayout:
    """Return the best layout in which the stages 1 to occupied - 1 have layers."""
    no_limit = costs.first + sum(costs.layers) + costs.last
    heads = _heads(costs.unequal_layers, stages, occupied)
    placements = [_Placement.of(costs, head, pipeline_size, stages, occupied) for head in heads]
    placements = [placement for placement in placements if placement.fits(no_limit, no_limit)]
    rank_limit = min(placement.least_rank_limit(stage_limit=no_limit) for placement in placements)
    placements = [placement for placement in placements if placement.fits(rank_limit, no_limit)]
    stage_limit = min(placement.least_stage_limit(rank_limit) for placement in placements)
    best = next(placement for placement in placements if placement.fits(rank_limit, stage_limit))
    return PipelineLayout.of(costs, best.fill(rank_limit, stage_limit), pipeline_size)


def _heads(layers: int, stages: int, occupied: int, stage: int = 0) -> Iterator[list[int]]:
    """Yield the ways to place the first `layers` layers, as counts per stage from `stage` to the last that has one.

    The stages 1 to occupied - 1 cannot be empty.

    >>> list(_heads(2, stages=4, occupied=3))
    [[2], [1, 1], [0, 2], [0, 1, 1]]
    """
    yield [layers]
    if stage + 1 < stages:
        for here in range(layers - 1, int(0 < stage < occupied) - 1, -1):
            yield from ([here, *later] for later in _heads(layers - here, stages, occupied, stage + 1))


@dataclass(frozen=True)
class _Placement:
    """A placement of the unequal layers, with the number of equal layers that each stage can and must take."""

    equal: int  # number of equal layers, which are still to be placed
    cost: int  # cost of one equal layer
    pipeline_size: int  # number of ranks
    head: list[int]  # unequal layers of each stage
    bases: list[int]  # cost of each stage without equal layers
    least: list[int]  # equal layers that each stage must take
    first_open: int  # first stage that can take equal layers

    @classmethod
    def of(cls, costs: UnitCosts, head: list[int], pipeline_size: int, stages: int, occupied: int) -> _Placement:
        head, first_open = head + [0] * (stages - len(head)), len(head) - 1
        layer_costs = iter(costs.layers)
        bases = [sum(islice(layer_costs, count)) for count in head]
        bases[0] += costs.first
        bases[-1] += costs.last
        least = [int(first_open < stage < occupied) for stage in range(stages)]
        equal = len(costs.layers) - costs.unequal_layers
        return cls(equal, costs.layers[-1], pipeline_size, head, bases, least, first_open)

    def rank_sums(self, values: Sequence[int]) -> list[int]:
        """Return the sum of `values` over the stages of each rank."""
        return [sum(values[rank :: self.pipeline_size]) for rank in range(self.pipeline_size)]

    def stage_capacity(self, stage_limit: int) -> list[int]:
        """Return how many equal layers each stage can take; negative if the stage is above the limit already."""
        return [
            (stage_limit - base) // self.cost if stage >= self.first_open else min(stage_limit - base, 0)
            for stage, base in enumerate(self.bases)
        ]

    def rank_capacity(self, rank_limit: int) -> list[int]:
        """Return how many equal layers each rank can take; negative if the rank is above the limit already."""
        return [(rank_limit - base) // self.cost for base in self.rank_sums(self.bases)]

    def fits(self, rank_limit: int, stage_limit: int) -> bool:
        """Return whether the layers can be placed with no rank and no stage above its limit."""
        capacity, rank_capacity = self.stage_capacity(stage_limit), self.rank_capacity(rank_limit)
        if any(most < least for most, least in zip(capacity, self.least, strict=True)):
            return False
        if any(most < least for most, least in zip(rank_capacity, self.rank_sums(self.least), strict=True)):
            return False
        most = sum(map(min, self.rank_sums(capacity), rank_capacity))
        return sum(self.least) <= self.equal <= most

    def least_rank_limit(self, stage_limit: int) -> int:
        return self._least_limit(self.rank_sums(self.bases), lambda limit: self.fits(limit, stage_limit))

    def least_stage_limit(self, rank_limit: int) -> int:
        return self._least_limit(self.bases, lambda limit: self.fits(rank_limit, limit))

    def _least_limit(self, bases: Sequence[int], fits: Callable[[int], bool]) -> int:
        """Return the smallest possible cost of a rank or stage that fits as a limit."""
        limits = sorted({base + count * self.cost for base in bases for count in range(self.equal + 1)})
        return limits[bisect_left(limits, True, key=fits)]

    def fill(self, rank_limit: int, stage_limit: int) -> list[int]:
        """Return the decoder layers of each stage.

        Equal layers go one by one to the rank with the least load that has capacity left, of equal ranks the latest,
        and there to the cheapest stage.
        """
        counts = list(self.least)
        capacity, rank_capacity = self.stage_capacity(stage_limit), self.rank_capacity(rank_limit)
        while sum(counts) < self.equal:
            costs = [base + self.cost * count for base, count in zip(self.bases, counts, strict=True)]
            rank_costs, rank_counts = self.rank_sums(costs), self.rank_sums(counts)
            _, stage = min(
                ((rank_costs[stage % self.pipeline_size], -(stage % self.pipeline_size), costs[stage]), stage)
                for stage in range(len(counts))
                if counts[stage] < capacity[stage]
                and rank_counts[stage % self.pipeline_size] < rank_capacity[stage % self.pipeline_size]
            )
            counts[stage] += 1
        return [head + count for head, count in zip(self.head, counts, strict=True)]
