"""Pipeline layouts of both models, compared with Megatron-Bridge's hand-written layouts for GLM-4.5V.

    python -m benchmarks.pipeline_layouts

Nothing is timed: every layout is rated by the cost model of `model.flops`, costliest rank over mean. The limit is 1.
"""

from __future__ import annotations

from collections.abc import Iterator

from model.config import GlmvConfig
from model.pipeline_layout import PipelineLayout, UnitCosts, solve_layout, unit_costs

# NVIDIA-NeMo/Megatron-Bridge at 067f987, src/megatron/bridge/recipes/glm_vl/h100/glm_45v.py,
# `_get_glm_45v_pipeline_layout`: decoder layers of each rank, for full fine-tuning and for LoRA. It raises ValueError
# for virtual stages.
MEGATRON_BRIDGE: dict[str, dict[int, list[int]]] = {
    "full": {4: [11, 12, 12, 11], 8: [1, 7, 7, 7, 7, 7, 7, 3], 16: [1, *[3] * 14, 3]},
    "LoRA": {4: [11, 12, 12, 11], 8: [5, 6, 6, 6, 6, 6, 6, 5], 16: [2, *[3] * 14, 2]},
}

# Packs of 8,192 tokens in samples of 2,048, and how many images of 1,024 tokens they contain.
SEGMENTS = (2048,) * 4
PACKS = {"text only": 0, "half images": 4, "7/8 images": 7}
IMAGE_PATCHES = 4096

SIZES = [(pipeline, virtual) for pipeline in (4, 8, 16) for virtual in (1, 2, 4)]


def expected_costs(config: GlmvConfig, images: int) -> UnitCosts:
    """Return the costs of a pack with `images` images."""
    return unit_costs(config, SEGMENTS, [IMAGE_PATCHES] * images)


def bridge_layouts(costs: UnitCosts, pipeline: int) -> Iterator[tuple[str, PipelineLayout]]:
    """Yield Megatron-Bridge's layouts for `pipeline` ranks, with this cost model."""
    for name, tables in MEGATRON_BRIDGE.items():
        yield name, PipelineLayout.of(costs, tables[pipeline], pipeline)


def main() -> None:
    """Print the summary and every layout of both models."""
    for preset in ("glm45v", "glm41v_9b"):
        config = GlmvConfig.from_preset(preset)
        print_summary(config, preset)
        for pipeline, virtual in SIZES:
            for pack, images in PACKS.items():
                print(f"\n{preset}, PP {pipeline}, VPP {virtual}, {pack}")
                print(solve_layout(expected_costs(config, images), pipeline, virtual).table())


def print_summary(config: GlmvConfig, preset: str) -> None:
    """Print a line for each size: for each pack, costliest rank over mean, and how much slower Megatron-Bridge is."""
    print(f"\n{preset}: costliest rank over the mean (a step with Megatron-Bridge's table, full / LoRA)")
    print((f"{'PP':>3} {'VPP':>4}" + "".join(f"   {pack:<23}" for pack in PACKS)).rstrip())
    for pipeline, virtual in SIZES:
        line = f"{pipeline:>3} {virtual:>4}"
        for images in PACKS.values():
            costs = expected_costs(config, images)
            solved = solve_layout(costs, pipeline, virtual)
            cell = f"{solved.imbalance:.3f}"
            if preset == "glm45v" and virtual == 1:
                tables = [max(table.rank_costs) for _, table in bridge_layouts(costs, pipeline)]
                cell += f" ({' / '.join(f'{cost / max(solved.rank_costs) - 1:+.1%}' for cost in tables)})"
            line += f"   {cell:<23}"
        print(line.rstrip())


if __name__ == "__main__":
    main()
