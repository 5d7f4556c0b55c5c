"""What a run in FP8 may combine with, and where its FP8 is emulated.

On a GPU, Transformer Engine's kernels compute in FP8. Elsewhere the torch backend emulates the rounding
(model.fp8_emulation), at any size. A plan for another machine (`--dry-run`, tools.launch) is checked as for GPUs,
unless `model.backend=torch` says that it is emulated there, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

from model.backend import gpu, has_gpu
from model.config import ConfigError, GlmvConfig
from model.fp8_rules import check_gpu, check_layers, check_sizes, is_quantised
from model.installed import has_transformer_engine
from model.parts import part_of
from model.weights.table import weights
from training.config import RunConfig


def is_emulated(config: RunConfig, *, here: bool = True) -> bool:
    """Return whether the FP8 of a run is emulated.

    Args:
        config: the run, with a recipe.
        here: whether the run is on this machine; another one is taken to have GPUs.
    """
    return config.model.backend == "torch" or (here and config.model.backend == "auto" and not has_gpu())


def has_kernels(config: RunConfig) -> bool:
    """Return whether kernels on this machine compute a run in FP8."""
    return config.fp8.enabled and not is_emulated(config)


def check_fp8(config: RunConfig, model: GlmvConfig, *, here: bool) -> None:
    """Check the section `fp8` against the rest of a run, the model, and this machine.

    Args:
        config: the run, whose layout is possible without FP8.
        model: the model.
        here: whether the run is on this machine.

    Raises:
        ConfigError: the run cannot work, or would compute without FP8.
    """
    if not config.fp8.enabled:
        return
    if is_emulated(config, here=here):
        check_layers(config.fp8, model, config.parallel.pipeline_model_parallel_size)
        if config.fp8.param_gather:
            raise ConfigError(
                "fp8.param_gather=true keeps weights in FP8, which the torch backend does not; set it to false, or use "
                "a GPU with model.backend=transformer_engine"
            )
        return
    _check_kernels(config, model)
    if here:
        _check_machine(config)


def _check_kernels(config: RunConfig, model: GlmvConfig) -> None:
    fp8, recipe = config.fp8, f"fp8.recipe={config.fp8.recipe}"
    if config.train.precision != "bf16":
        raise ConfigError(
            f"{recipe} needs train.precision=bf16 with Transformer Engine, and it is {config.train.precision}; set it "
            "to bf16, or model.backend=torch to emulate FP8"
        )
    if fp8.recipe == "delayed":
        _check_reproducible(config)
        recomputed = {"decoder": config.recompute.decoder, "vision": config.recompute.vision if fp8.vision else "none"}
        for part, choice in recomputed.items():
            if choice == "selective":
                raise ConfigError(
                    f"fp8.recipe=delayed cannot recompute norms, which recompute.{part}=selective does; set it to full "
                    "or none, or fp8.recipe=tensorwise"
                )
    if fp8.param_gather:
        _check_weights_in_fp8(config)
    check_sizes(fp8, model, config.parallel, config.train.seq_length)


def _check_reproducible(config: RunConfig) -> None:
    """Check what the scales of `delayed`, which depend on earlier passes, do not allow."""
    train = config.train
    if train.deterministic:
        raise ConfigError(
            "fp8.recipe=delayed takes its scales from earlier steps, which checkpoints do not hold with Transformer "
            "Engine: a resumed run would differ, and train.deterministic=true forbids it; set fp8.recipe=tensorwise"
        )
    if train.check_determinism:
        raise ConfigError(
            f"fp8.recipe=delayed changes its scales in every pass, and train.check_determinism="
            f"{train.check_determinism} computes a step twice; set it to 0, or fp8.recipe=tensorwise"
        )


def _check_weights_in_fp8(config: RunConfig) -> None:
    """Check that every weight that is kept in FP8 has a main weight in float32, from which it is rounded."""
    optimizer = config.optimizer
    if config.lora.rank:
        raise ConfigError(
            f"fp8.param_gather=true keeps only FP8 of weights that lora.rank={config.lora.rank} freezes; set it to "
            "false"
        )
    quantised = {"decoder", "vision", "adapter"} if config.fp8.vision else {"decoder"}
    if frozen := sorted(quantised & set(config.freeze)):
        raise ConfigError(
            f"fp8.param_gather=true keeps only FP8 of frozen weights, and freeze names {', '.join(frozen)}; set it to "
            "false"
        )
    if optimizer.is_low_precision:
        raise ConfigError(
            "fp8.param_gather=true needs main weights and moments in float32; set optimizer.exp_avg_dtype and "
            "exp_avg_sq_dtype to fp32, or fp8.param_gather=false"
        )
    if optimizer.offload_fraction:
        raise ConfigError(
            f"fp8.param_gather=true and optimizer.offload_fraction={optimizer.offload_fraction:g} exclude each other; "
            "set one of them to its default"
        )


def _check_machine(config: RunConfig) -> None:
    """Check that the kernels are on this machine, which has a GPU."""
    if not has_transformer_engine():
        raise ConfigError(
            f"fp8.recipe={config.fp8.recipe} needs Transformer Engine, which is not installed here (README.md says "
            "how); or set model.backend=torch, which emulates FP8 more slowly than bf16"
        )
    if (found := gpu()) is not None:
        check_gpu(config.fp8, found)


# --- reports ----------------------------------------------------------------------------------------------------------


def describe_fp8(config: RunConfig, model: GlmvConfig, *, here: bool = True) -> Iterator[str]:
    """Yield lines that say what of a model is computed in FP8, and by what. Nothing without a recipe."""
    fp8, layers = config.fp8, model.decoder.num_hidden_layers
    if not fp8.enabled:
        return
    counts, all_of = Counter[str](), Counter[str]()
    for weight in weights(model):
        part, size = part_of(weight.name), sum(prod(shape) for shape in weight.hf.values())
        all_of[part] += size
        counts[part] += size if is_quantised(weight.name, fp8, layers) else 0
    shares = ", ".join(f"{part} {counts[part] / all_of[part]:.1%}" for part in all_of)
    kept = fp8.first_last_layers_bf16
    yield (
        f"fp8: {fp8.recipe}, {fp8.number_format}, "
        + ("EMULATED by the torch backend" if is_emulated(config, here=here) else "Transformer Engine's kernels")
        + (f"; decoder layers {kept} to {layers - 1 - kept} of 0 to {layers - 1}" if kept else "")
        + ("; weights are kept and gathered in FP8" if fp8.gathers_fp8 else "")
    )
    yield f"fp8: share of the weights that are multiplied with in FP8: {shares}"


def fp8_warnings(config: RunConfig, *, here: bool = True) -> Iterator[str]:
    """Warn about keys of `fp8` without an effect, and about what has not run on a GPU."""
    fp8, default = config.fp8, type(config.fp8)()
    if not fp8.enabled:
        for key in ("format", "first_last_layers_bf16", "param_gather", "vision"):
            if getattr(fp8, key) != getattr(default, key):
                yield f"fp8.{key} has no effect, because fp8.recipe is none"
    elif not is_emulated(config, here=here):
        yield (
            "FP8 kernels were not run on a GPU before this version: compare the first losses and gradient norms with "
            "those of fp8.recipe=none"
        )
        if fp8.recipe == "delayed":
            yield (
                "fp8.recipe=delayed begins with scales of 1, also when the run resumes, because checkpoints do not "
                "hold them: look at the first losses, or set fp8.recipe=tensorwise"
            )
