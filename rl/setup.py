"""From a configuration to what a run of reinforcement learning needs, before its processes join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import DataError
from data_pipeline.loading.source import Source
from model.backend import has_gpu
from model.config import ConfigError
from rewards.table import verifier_named
from rewards.verdict import RewardError
from rl.config import RlConfig
from rl.objective import PolicyLoss
from rl.prompts import PromptTable
from rl.sampler import PromptSampler
from training.hf_files import check_tokenizer
from training.prompts import chat_form_of
from training.setup import Prepared, check_run, lay_out_pipeline
from training.validation import check_overlap
from training.validator import PreparedValidation

MOST_INSERTED = 8  # tokens that end a thought which is too long


@dataclass
class PreparedRl(Prepared[PromptSampler]):
    """What is known of a run of reinforcement learning before its processes join."""

    chat_form: str = ""
    held_out: PromptTable | None = None

    @property
    def held_out_sources(self) -> Sequence[Source]:
        """The sources of the held-out prompts."""
        return self.held_out.sources if self.held_out is not None else []


def prepare(config: RlConfig, processes: int | None = None) -> PreparedRl:
    """Check all that can be checked in one process, and open the prompts. Writes nothing.

    Args:
        config: the run.
        processes: number of processes of a run on other machines; None: the run is here.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: the configuration cannot work, by itself or with the
            folders that it names.
    """
    if processes is None:
        _check_machine(config)
    start_point, model = check_run(config, processes)
    chat_form = chat_form_of(model.variant, GlmTokenizer(config.data.tokenizer))
    table = PromptTable(config.data, chat_form=chat_form, max_tokens=longest_prompt(config))
    check_tokenizer(model, table.tokenizer, start_point.hf_files)
    _check_verifiers(table)
    sampler = PromptSampler(config, table)
    policy = config.rl
    return PreparedRl(
        config,
        model,
        sampler,
        lay_out_pipeline(config, model, sampler),
        PreparedValidation(None, []),
        PolicyLoss(policy.clip_low, policy.clip_high),
        chat_form,
        _open_held_out(config, chat_form, table),
    )


def _check_machine(config: RlConfig) -> None:
    """Check that this machine can do what the configuration asks for.

    Raises:
        ConfigError: it cannot.
    """
    if config.train.deterministic and config.rollout.engine == "embedded" and has_gpu():
        raise ConfigError(
            "train.deterministic=true: the embedded engine draws with torch.cumsum, which torch then refuses on a GPU; "
            "set it to false, or use servers (rollout.engine=vllm)"
        )


def longest_prompt(config: RlConfig) -> int:
    """Return how many tokens a prompt may have, so that its longest rollout fits into a pack.

    Raises:
        ConfigError: none would fit.
    """
    limits, seq_length = config.rollout, config.train.seq_length
    response = limits.max_thinking_tokens + limits.max_answer_tokens + MOST_INSERTED
    if response >= seq_length:
        raise ConfigError(
            f"train.seq_length={seq_length} must hold a prompt and its longest response: "
            f"rollout.max_thinking_tokens={limits.max_thinking_tokens} and "
            f"rollout.max_answer_tokens={limits.max_answer_tokens} leave no room for the prompt; raise the one, or "
            "lower the others"
        )
    return seq_length - response


def _check_verifiers(table: PromptTable) -> None:
    """Check that every verifier of the prompts exists: shards may have been built by another version.

    Raises:
        DataError: one does not.
    """
    for name in sorted(table.verifiers):
        try:
            verifier_named(name)
        except RewardError as error:
            raise DataError(f"data.sources: prompts name a verifier that does not exist: {error}") from None


def _open_held_out(config: RlConfig, chat_form: str, training: PromptTable) -> PromptTable | None:
    """Open the held-out prompts.

    Raises:
        DataError: they cannot be used, or are training prompts.
    """
    options = config.validation
    if not options.interval:
        return None
    try:
        data = replace(config.data, sources=options.sources)
        table = PromptTable(data, chat_form=chat_form, max_tokens=longest_prompt(config))
    except DataError as error:
        raise DataError(f"validation.sources: {error}") from None
    _check_verifiers(table)
    check_overlap(table.sources, training.sources, allowed=options.allow_overlap)
    return table
