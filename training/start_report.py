"""What a run says when it starts: where from, on what data, and which settings look like mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from data_pipeline.encoding.template_check import template_difference
from data_pipeline.plan.mixture_report import mixture_table, too_long_share
from model.config import GlmvConfig
from model.installed import describe_versions
from model.lora_config import LoraConfig
from training.config import RunConfig
from training.fp8_checks import describe_fp8, fp8_warnings, has_kernels
from training.metrics import logger
from training.prompts import chat_form_of
from training.ranks import world_size
from training.run_data import RunData
from training.setup import Prepared
from training.start_point import StartPoint
from training.throughput import device_peak
from training.validation import describe_held_out

SAVING = ("keep_last", "async_save")  # keys of checkpoint
TOO_LONG_SHARE = 0.02  # of all samples: more is worth a warning


def log_start(prepared: Prepared[Any], start_point: StartPoint, done: int, backend: str) -> None:
    """Log where the run starts and what it will do.

    Args:
        prepared: the run.
        start_point: where its weights come from.
        done: steps that are taken already.
        backend: description of what computes the model.
    """
    config = prepared.config
    start = start_point.folder or f"random weights, seed {config.train.seed}"
    logger.info("step %d of %d, from %s, on %d processes", done, config.train.steps, start, world_size())
    for line in (*start_point.moved, *start_point.changed, *start_point.formats()):
        logger.info(line)
    logger.info("backend: %s", backend)
    logger.info("versions: %s", describe_versions(transformer_engine=backend.startswith("transformer_engine")))
    for line in describe_fp8(config, prepared.model):
        logger.info(line)
    if not device_peak(config.metrics.peak_tflops, config.train.precision, fp8=has_kernels(config)):
        logger.info("no mfu: the peak of this device is not known; set metrics.peak_tflops to its TFLOP/s")
    if prepared.layout is not None:
        logger.info("pipeline layout:\n%s", prepared.layout.table())
    mixture = prepared.loader.planned_mixture()
    if mixture:
        logger.info("the next window of steps takes from every domain:\n%s", mixture_table(mixture))
    for warning in (
        *warnings_of(config, prepared.model, prepared.loader, too_long_share(mixture)),
        *prepared.warnings,
    ):
        logger.warning(warning)
    for line in describe_held_out(prepared.held_out_sources, prepared.loader.sources):
        logger.info(line)
    if done == config.train.steps:
        logger.info("nothing is left to do; raise train.steps to continue")


def warnings_of(config: RunConfig, model: GlmvConfig, loader: RunData, too_long: float) -> Iterator[str]:
    """Yield a line about everything that is allowed but rarely intended.

    Args:
        config: the run.
        model: what it trains.
        loader: its data; only the index is read.
        too_long: share of the planned samples that are longer than a sequence.
    """
    if too_long > TOO_LONG_SHARE:
        yield (
            f"{too_long:.0%} of these samples are longer than train.seq_length={config.train.seq_length} and are not "
            "used: raise it, lower data.image_max_tokens or data.video_max_tokens, or set data.too_long"
        )
    if config.train.seq_length > model.decoder.max_position_embeddings:
        yield (
            f"train.seq_length={config.train.seq_length} is above the model's max_position_embeddings "
            f"{model.decoder.max_position_embeddings}, and engines refuse longer prompts: set "
            f"model.max_position_embeddings={config.train.seq_length}, and model.rope_theta if its base should change"
        )
    if 0 < config.health.hang_seconds <= config.data.retry_seconds:
        yield (
            f"data.retry_seconds={config.data.retry_seconds:g} is not below health.hang_seconds="
            f"{config.health.hang_seconds}: a run that waits for a lost shard would be ended as if it hung"
        )
    yield from config.warnings_of_domains({domain for source in loader.sources for domain in source.domains})
    yield from _other_chat_forms(model, loader)
    yield from settings_without_effect(config, model)
    yield from fp8_warnings(config)
    yield from _unused_parts(config, loader)
    for use in loader.source_use():
        if use.is_repeated:
            yield (
                f"source {use.label!r} has only {use.samples:,} samples: a step takes {use.samples_per_step:,.0f} from "
                f"it, each about {use.repeats_per_step:,.1f} times. More data, or a smaller weight, avoids that"
            )


def _other_chat_forms(model: GlmvConfig, loader: RunData) -> Iterator[str]:
    """Warn about chats that are written as the other model variant writes them."""
    wanted = chat_form_of(model.variant, loader.tokenizer)
    for label, forms in loader.chat_forms.items():
        if others := [form for form in forms if form != wanted]:
            yield (
                f"source {label!r} holds chats in the form {others[0]}, but published models of this kind "
                f"({model.variant}) write them as {wanted}: build or index the source again with --chat-form {wanted}, "
                f"unless the tokenizer's chat template is that of {others[0]}"
            )
    folder, form = loader.tokenizer.folder, loader.tokenizer.generation.chat_forms[0]
    written = [label for label, forms in loader.chat_forms.items() if form in forms]
    if written and (what := template_difference(folder, form)):
        yield (
            f"the chat template in {folder} writes {what} differently than the chats of source {written[0]!r} are "
            f"({form}): an engine would show the model other prompts than it is trained on"
        )


def settings_without_effect(config: RunConfig, model: GlmvConfig) -> Iterator[str]:
    """Warn about keys that were set for a part of the model that is frozen or missing."""
    reasons = {part: f"freeze names {part}" for part in config.freeze}
    if config.lora.rank:
        reasons["router"] = "LoRA freezes the routers"
    elif not model.decoder.is_moe:
        reasons["router"] = "the model is dense"
    elif "decoder" in config.freeze:
        reasons["router"] = reasons["decoder"]
    if not config.lora.rank:
        reasons["lora"] = "lora.rank is 0"
    if config.optimizer.offload_fraction or config.optimizer.is_low_precision:
        yield (
            "optimizer.offload_fraction and moments below fp32 were not run on a GPU before this version: "
            "compare a resumed run's first losses with those of an uninterrupted one (tests/gpu does so)"
        )
    if config.optimizer.decay_style == "constant" and config.optimizer.min_lr != type(config)().optimizer.min_lr:
        yield "optimizer.min_lr has no effect, because optimizer.decay_style=constant keeps optimizer.lr"
    held_out = config.validation
    if held_out.sources and not held_out.interval:
        yield "validation.sources has no effect, because validation.interval is 0: set it to a number of steps"
    if (held_out.samples or held_out.samples_file) and not held_out.samples_interval:
        yield "the prompts of validation have no effect, because validation.samples_interval is 0: set it"
    set_keys = [
        (f"optimizer.lr_scale.{part}", part) for part, scale in asdict(config.optimizer.lr_scale).items() if scale != 1
    ]
    set_keys += [
        (f"moe.{key}", "router")
        for key in ("balance_loss_coeff", "expert_bias_update_rate")
        if getattr(config.moe, key) != getattr(type(config)().moe, key)
    ]
    set_keys += [
        (f"lora.{key}", "lora") for key, value in asdict(config.lora).items() if value != getattr(LoraConfig(), key)
    ]
    yield from _keys_that_need_others(config)
    for key, part in set_keys:
        if part in reasons:
            yield f"{key} has no effect, because {reasons[part]}"


def _keys_that_need_others(config: RunConfig) -> Iterator[str]:
    """Warn about keys that were set although what they belong to is off."""
    health, optimizer = config.health, config.optimizer
    skips = "skip" in (health.on_nonfinite, health.on_spike)
    for keys, section, names, is_on, reason in (
        (health, "health", ("spike_window",), health.spike_factor, "health.spike_factor is 0"),
        (health, "health", ("max_skipped",), skips, "neither health.on_nonfinite nor health.on_spike is skip"),
        (config.profile, "profile", ("steps", "ranks"), config.profile.start, "profile.start is 0"),
        (config.metrics, "metrics", ("mlflow_experiment",), config.metrics.mlflow, "metrics.mlflow is empty"),
        (config.checkpoint, "checkpoint", SAVING, config.checkpoint.save_interval, "checkpoint.save_interval is 0"),
        (optimizer, "optimizer", ("cooldown_style",), optimizer.cooldown_steps, "optimizer.cooldown_steps is 0"),
    ):
        for name in names:
            if not is_on and getattr(keys, name) != getattr(type(keys)(), name):
                yield f"{section}.{name} has no effect, because {reason}"


def _unused_parts(config: RunConfig, loader: RunData) -> Iterator[str]:
    """Warn about parts that would be trained although the data has no image for them."""
    unused = [part for part in ("vision", "adapter") if part not in config.freeze]
    if config.lora.rank:
        unused = []  # frozen weights do not change, and an adapter without a gradient stays zero
    if not unused or loader.has_media:
        return
    without = f"no source in data.sources has an image or a video, so {' and '.join(unused)} cannot learn"
    if "decoder" in config.freeze:
        yield f"{without}, and the decoder is frozen: this run trains nothing. Set freeze=[vision,adapter]"
    elif decay := config.optimizer.weight_decay:
        yield f"{without}: a step only multiplies their matrices by 1 - lr * {decay:g}. Set freeze=[vision,adapter]"
    else:
        yield f"{without}. Set freeze=[vision,adapter], which also saves their optimizer state"
