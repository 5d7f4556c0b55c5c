"""The pipeline layout, solved: which decoder layers each pipeline rank holds, so that the slowest rank is as fast as
can be.

What is laid out, in order: the token embedding with the vision tower and the adapter; the decoder layers; the output
layer with the loss. With P ranks and V virtual stages on each there are P*V stages, and stage s lies on rank s % P:

    P = 2, V = 2      stage 0  rank 0   embedding, decoder
                      stage 1  rank 1   decoder, decoder
                      stage 2  rank 0   decoder
                      stage 3  rank 1   decoder, loss

In the steady state of a pipeline every rank works on its stages in turn and waits for the slowest rank; the time to
fill and drain it grows with the slowest stage. So a layout is judged by (1) the cost of the costliest rank, then by (2)
having no empty stage, then by (3) the cost of the costliest stage; of what is left, layers go where the rank is idlest,
and of equal ranks to the later one, since early ranks keep the activations of more micro-batches.

The solution is exact, because a GLM has few dense layers and then many alike. For a placement of the dense layers
(there are few), "no rank above M, no stage above K" is a count: how many more layers fit under both limits?
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from model.config import ConfigError, GlmvConfig
from model.flops import FORWARD_AND_BACKWARD, head_cost, layer_cost, vision_cost

EMBEDDING, DECODER, LOSS = "embedding", "decoder", "loss"


@dataclass(frozen=True)
class UnitCosts:
    """What each unit of the pipeline costs for a micro-batch, in FLOPs or any other unit.

    Attributes:
        first: embedding, vision tower and adapter, which cannot be parted.
        layers: the decoder layers in order. Those before the last run of equal costs should be few: the time to solve
            doubles with each.
        last: output layer and loss.
    """

    first: int
    layers: tuple[int, ...]
    last: int

    @property
    def unlike(self) -> int:
        """How many layers stand before the last run of equal costs."""
        return max((n for n, cost in enumerate(self.layers, start=1) if cost != self.layers[-1]), default=0)


@dataclass(frozen=True)
class PipelineLayout:
    """A layout and what it costs.

    Attributes:
        stages: one list of "embedding", "decoder", "loss" for each stage, in order: the form of megatron-core's
            `TransformerConfig.pipeline_model_parallel_layout`.
        stage_costs: in the unit of `UnitCosts`.
        pipeline_size: number of ranks.
    """

    stages: list[list[str]]
    stage_costs: list[int]
    pipeline_size: int

    @classmethod
    def of(cls, costs: UnitCosts, decoder_layers: Sequence[int], pipeline_size: int) -> PipelineLayout:
        """From the number of decoder layers of each stage.

        >>> PipelineLayout.of(UnitCosts(5, (2, 3, 3), 4), [0, 2, 1, 0], pipeline_size=2).stages
        [['embedding'], ['decoder', 'decoder'], ['decoder'], ['loss']]
        """
        assert sum(decoder_layers) == len(costs.layers)
        stages = [[DECODER] * count for count in decoder_layers]
        stages[0].insert(0, EMBEDDING)
        stages[-1].append(LOSS)
        of_stage = iter(costs.layers)
        stage_costs = [sum(next(of_stage) for _ in range(count)) for count in decoder_layers]
        stage_costs[0] += costs.first
        stage_costs[-1] += costs.last
        return cls(stages, stage_costs, pipeline_size)

    @cached_property
    def rank_costs(self) -> list[int]:
        return [sum(self.stage_costs[rank :: self.pipeline_size]) for rank in range(self.pipeline_size)]

    @property
    def imbalance(self) -> float:
        """The costliest rank over the mean: how much longer a step takes than with work spread evenly, bubble aside."""
        return max(self.rank_costs) * self.pipeline_size / sum(self.rank_costs)

    def table(self) -> str:
        """A line a rank: what each of its stages holds, its share of the work, and its cost over the mean."""
        virtual_size = len(self.stages) // self.pipeline_size
        header = ["rank", *(f"stage {n}" if virtual_size > 1 else "holds" for n in range(virtual_size))]
        rows = [[*header, "share", "of mean"]]
        total = sum(self.rank_costs)
        for rank, cost in enumerate(self.rank_costs):
            holds = [_describe(stage) for stage in self.stages[rank :: self.pipeline_size]]
            rows.append([str(rank), *holds, f"{cost / total:.1%}", f"{cost / total * self.pipeline_size:.3f}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"predicted imbalance {self.imbalance:.3f}"])


def _describe(stage: Sequence[str]) -> str:
    """
    >>> _describe(["embedding", "decoder", "decoder"])
    'embedding + 2'
    """
    layers = stage.count(DECODER)
    parts = [EMBEDDING] * (EMBEDDING in stage) + [str(layers)] * (layers > 0) + [LOSS] * (LOSS in stage)
    return " + ".join(parts) or "-"


# --- costs of a model -------------------------------------------------------------------------------------------------


def unit_costs(config: GlmvConfig, segment_lengths: Sequence[int], image_patches: Sequence[int]) -> UnitCosts:
    """FLOPs of a micro-batch, forward and backward.

    Args:
        config: what the model is.
        segment_lengths: tokens of each sample of the expected pack.
        image_patches: patches of each of its pictures and frame pairs.
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
    """The layout of a model for the pack that is expected (see `unit_costs`).

    Raises:
        ConfigError: there are more ranks than units, or so many virtual stages that ranks have several empty ones.
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
    """The best layout (see the module) among those in which every rank has something to do on its first stage, or the
    loss on its last.

    Later stages may be empty, where layers do not suffice for all or where the costliest rank is cheaper for it: a rank
    with the vision tower may be better off without layers. They pass on what they are given.

    Raises:
        ConfigError: there are more ranks than units.
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
    """The best layout in which the stages 1 to occupied - 1 have layers."""
    anything = costs.first + sum(costs.layers) + costs.last
    heads = _heads(costs.unlike, stages, occupied)
    placements = [_Placement.of(costs, head, pipeline_size, stages, occupied) for head in heads]
    placements = [placement for placement in placements if placement.fits(anything, anything)]
    rank_limit = min(placement.least_rank_limit(stage_limit=anything) for placement in placements)
    placements = [placement for placement in placements if placement.fits(rank_limit, anything)]
    stage_limit = min(placement.least_stage_limit(rank_limit) for placement in placements)
    best = next(placement for placement in placements if placement.fits(rank_limit, stage_limit))
    return PipelineLayout.of(costs, best.fill(rank_limit, stage_limit), pipeline_size)


def _heads(layers: int, stages: int, occupied: int, stage: int = 0) -> Iterator[list[int]]:
    """How `layers` layers can begin a pipeline: numbers of them from `stage` to the last stage that has one. The stages
    1 to occupied - 1 cannot be passed over.

    >>> list(_heads(2, stages=4, occupied=3))
    [[2], [1, 1], [0, 2], [0, 1, 1]]
    """
    yield [layers]
    if stage + 1 < stages:
        for here in range(layers - 1, int(0 < stage < occupied) - 1, -1):
            yield from ([here, *later] for later in _heads(layers - here, stages, occupied, stage + 1))


@dataclass(frozen=True)
class _Placement:
    """A placement of all but the layers that are alike, and how many of those each stage may and must take."""

    alike: int  # number of layers to place
    cost: int  # of each
    pipeline_size: int
    head: list[int]  # layers that each stage has already
    bases: list[int]  # cost of what each stage has already
    least: list[int]  # alike layers that each stage must take
    first_open: int  # earlier stages can take none

    @classmethod
    def of(cls, costs: UnitCosts, head: list[int], pipeline_size: int, stages: int, occupied: int) -> _Placement:
        head, first_open = head + [0] * (stages - len(head)), len(head) - 1
        of_layer = iter(costs.layers)
        bases = [sum(next(of_layer) for _ in range(count)) for count in head]
        bases[0] += costs.first
        bases[-1] += costs.last
        least = [int(first_open < stage < occupied) for stage in range(stages)]
        return cls(len(costs.layers) - costs.unlike, costs.layers[-1], pipeline_size, head, bases, least, first_open)

    def of_rank(self, values: Sequence[int]) -> list[int]:
        """Sums over the stages of each rank."""
        return [sum(values[rank :: self.pipeline_size]) for rank in range(self.pipeline_size)]

    def room(self, stage_limit: int) -> list[int]:
        """Alike layers that each stage can take."""
        return [(stage_limit - base) // self.cost if stage >= self.first_open else min(stage_limit - base, 0)
                for stage, base in enumerate(self.bases)]  # fmt: skip

    def rank_room(self, rank_limit: int) -> list[int]:
        return [(rank_limit - base) // self.cost for base in self.of_rank(self.bases)]

    def fits(self, rank_limit: int, stage_limit: int) -> bool:
        """Whether the layers can lie so that no rank and no stage costs more."""
        room, rank_room = self.room(stage_limit), self.rank_room(rank_limit)
        if any(has < least for has, least in zip(room, self.least, strict=True)):
            return False
        if any(has < least for has, least in zip(rank_room, self.of_rank(self.least), strict=True)):
            return False
        most = sum(map(min, self.of_rank(room), rank_room))
        return sum(self.least) <= self.alike <= most

    def least_rank_limit(self, stage_limit: int) -> int:
        return self._least_limit(self.of_rank(self.bases), lambda limit: self.fits(limit, stage_limit))

    def least_stage_limit(self, rank_limit: int) -> int:
        return self._least_limit(self.bases, lambda limit: self.fits(rank_limit, limit))

    def _least_limit(self, bases: Sequence[int], fits: Callable[[int], bool]) -> int:
        """The least cost that a rank or stage can have and that fits as a limit."""
        limits = sorted({base + count * self.cost for base in bases for count in range(self.alike + 1)})
        return limits[bisect_left(limits, True, key=fits)]

    def fill(self, rank_limit: int, stage_limit: int) -> list[int]:
        """Decoder layers of each stage: layer by layer to the idlest rank that has room, of equal ones the latest, and
        there to the cheapest stage."""
        counts, room, rank_room = list(self.least), self.room(stage_limit), self.rank_room(rank_limit)
        while sum(counts) < self.alike:
            costs = [base + self.cost * count for base, count in zip(self.bases, counts, strict=True)]
            rank_costs, rank_counts = self.of_rank(costs), self.of_rank(counts)
            _, stage = min(
                ((rank_costs[stage % self.pipeline_size], -(stage % self.pipeline_size), costs[stage]), stage)
                for stage in range(len(counts))
                if counts[stage] < room[stage]
                and rank_counts[stage % self.pipeline_size] < rank_room[stage % self.pipeline_size]
            )
            counts[stage] += 1
        return [head + count for head, count in zip(self.head, counts, strict=True)]
