"""Pipeline layouts of both models, and Megatron-Bridge's hand-written ones for GLM-4.5V beside them.

    python -m benchmarks.pipeline_layouts

Nothing is timed: all layouts are judged by the cost model of `model.flops`, by the costliest rank over the mean.
"""

from __future__ import annotations

from collections.abc import Iterator

from model.config import GlmvConfig
from model.pipeline_layout import PipelineLayout, UnitCosts, solve_layout, unit_costs

# NVIDIA-NeMo/Megatron-Bridge at 067f987, src/megatron/bridge/recipes/glm_vl/h100/glm_45v.py,
# `_get_glm_45v_pipeline_layout`: decoder layers of each rank, for full fine-tuning and for LoRA. It has none with
# virtual stages, and raises ValueError for them.
MEGATRON_BRIDGE: dict[str, dict[int, list[int]]] = {
    "full": {4: [11, 12, 12, 11], 8: [1, 7, 7, 7, 7, 7, 7, 3], 16: [1, *[3] * 14, 3]},
    "LoRA": {4: [11, 12, 12, 11], 8: [5, 6, 6, 6, 6, 6, 6, 5], 16: [2, *[3] * 14, 2]},
}

# Packs of 8,192 tokens in samples of 2,048, by how many of those tokens are pictures' (1,024 a picture).
SEGMENTS = (2048,) * 4
PACKS = {"text alone": 0, "half pictures": 4, "7/8 pictures": 7}
PICTURE_PATCHES = 4096

SIZES = [(pipeline, virtual) for pipeline in (4, 8, 16) for virtual in (1, 2, 4)]


def expected_costs(config: GlmvConfig, pictures: int) -> UnitCosts:
    return unit_costs(config, SEGMENTS, [PICTURE_PATCHES] * pictures)


def bridge_layouts(costs: UnitCosts, pipeline: int) -> Iterator[tuple[str, PipelineLayout]]:
    """Megatron-Bridge's layouts for so many ranks, under our costs."""
    for name, tables in MEGATRON_BRIDGE.items():
        yield name, PipelineLayout.of(costs, tables[pipeline], pipeline)


def main() -> None:
    for preset in ("glm45v", "glm41v_9b"):
        config = GlmvConfig.from_preset(preset)
        print_summary(config, preset)
        for pipeline, virtual in SIZES:
            for pack, pictures in PACKS.items():
                print(f"\n{preset}, PP {pipeline}, VPP {virtual}, {pack}")
                print(solve_layout(expected_costs(config, pictures), pipeline, virtual).table())


def print_summary(config: GlmvConfig, preset: str) -> None:
    """A line for each size; with each pack the costliest rank over the mean, and how much slower a step is with
    Megatron-Bridge's layouts."""
    print(f"\n{preset}: costliest rank over the mean (a step with Megatron-Bridge's table, full / LoRA)")
    print((f"{'PP':>3} {'VPP':>4}" + "".join(f"   {pack:<23}" for pack in PACKS)).rstrip())
    for pipeline, virtual in SIZES:
        line = f"{pipeline:>3} {virtual:>4}"
        for pictures in PACKS.values():
            costs = expected_costs(config, pictures)
            solved = solve_layout(costs, pipeline, virtual)
            cell = f"{solved.imbalance:.3f}"
            if preset == "glm45v" and virtual == 1:
                tables = [max(table.rank_costs) for _, table in bridge_layouts(costs, pipeline)]
                cell += f" ({' / '.join(f'{cost / max(solved.rank_costs) - 1:+.1%}' for cost in tables)})"
            line += f"   {cell:<23}"
        print(line.rstrip())


if __name__ == "__main__":
    main()
