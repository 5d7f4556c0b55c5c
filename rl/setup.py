"""From a configuration to what a run of reinforcement learning needs, before its processes join."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from data_pipeline.domains.rl_record import TIERS
from data_pipeline.encoding.template_check import prompt_difference
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import DataError
from data_pipeline.loading.source import Source
from data_pipeline.sample import ROLE_TOKENS
from model.backend import has_gpu
from model.config import ConfigError, GlmvConfig
from model.routed_experts import MAX_EXPERTS
from rewards.table import verifier_named
from rewards.verdict import RewardError
from rl.config import RlConfig
from rl.curriculum.facts import NO_TIER
from rl.engines.build import GB
from rl.engines.embedded import token_bytes
from rl.engines.starting import check_placement
from rl.objective import PolicyLoss
from rl.prompts import PromptTable
from rl.repeated import warnings_of_held_out, warnings_of_repeated
from rl.reward_checks import check_rewards, warnings_of_rewards
from rl.sampler import PromptSampler
from training.dtypes import DTYPES
from training.hf_files import check_tokenizer
from training.prompts import chat_form_of
from training.setup import Prepared, check_run, lay_out_pipeline
from training.validation import check_overlap
from training.validator import PreparedValidation

MARKS = ("</think>", "<|begin_of_box|>", "<|end_of_box|>")  # tokens of responses
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
    prompts = open_prompts(config, model)
    check_tokenizer(model, prompts.table.tokenizer, start_point.hf_files)
    sampler = PromptSampler(config, prompts.table)
    policy = config.rl
    return PreparedRl(
        config,
        model,
        sampler,
        lay_out_pipeline(config, model, sampler),
        PreparedValidation(None, []),
        PolicyLoss(policy.clip_low, policy.clip_high),
        prompts.warnings,
        prompts.chat_form,
        prompts.held_out,
    )


@dataclass(frozen=True)
class OpenedPrompts:
    """The prompts of a run, which can be used."""

    chat_form: str  # how the model writes chats
    table: PromptTable
    held_out: PromptTable | None
    warnings: tuple[str, ...]  # what is allowed but hardly meant


def open_prompts(config: RlConfig, model: GlmvConfig) -> OpenedPrompts:
    """Open the prompts of a run, and check them and how they are scored. The model's weights need not be there.

    Args:
        config: the run.
        model: what it trains.

    Raises:
        ConfigError, DataError: they cannot be used.
    """
    _check_router_replay(config, model)
    chat_form = chat_form_of(model.variant, GlmTokenizer(config.data.tokenizer))
    table = PromptTable(config.data, chat_form=chat_form, max_tokens=longest_prompt(config))
    _check_marks(table.tokenizer)
    _check_end(model, table.tokenizer)
    _check_verifiers(table)
    _check_labels(config, table)
    held_out = _open_held_out(config, chat_form, table)
    scored = table.scored + (held_out.scored if held_out is not None else Counter())
    registry = check_rewards(config.reward, scored)
    of_rewards = warnings_of_rewards(config.reward, registry, scored, chat_form, config.curriculum.pass_score)
    repeated = [*warnings_of_repeated(table)]
    if held_out is not None and not config.validation.allow_overlap:
        repeated += warnings_of_held_out(held_out, table)
    return OpenedPrompts(
        chat_form, table, held_out, (*_warnings(config, model, table, chat_form), *repeated, *of_rewards)
    )


def _warnings(config: RlConfig, model: GlmvConfig, table: PromptTable, chat_form: str) -> Iterator[str]:
    """Yield a line about everything that is allowed but hardly meant, as far as it depends on model and prompts."""
    rl, rollout, score = config.rl, config.rollout, config.curriculum.pass_score
    if problem := prompt_difference(table.tokenizer.folder, chat_form):
        yield (
            f"data.tokenizer {table.tokenizer.folder}: {problem} (this run asks in the form {chat_form}): a base model "
            "that has not learned to answer in this form gets no reward, and an engine that serves the trained model "
            "would ask it otherwise. Bring the template of the model that the run starts from"
        )
    if rl.prompts > len(table):
        yield (
            f"rl.prompts={rl.prompts:,} is more than the {len(table):,} prompts of data.sources: an iteration draws "
            f"each about {rl.prompts / len(table):.1f} times"
        )
    if others := sorted(table.pass_scores - {score}):
        yield (
            f"grades of the prompts count an answer as right from a score of {', '.join(f'{one:g}' for one in others)} "
            f"on, and this run from curriculum.pass_score={score:g}: grade them again with tools.difficulty "
            f"--pass-score {score:g}, or change the key"
        )
    of_group = rl.group * longest_response(config) + int(table.lengths.max())
    group_gb = of_group * token_bytes(model, DTYPES[config.train.precision]) / GB
    if rollout.engine == "embedded" and group_gb > rollout.embedded_cache_gb:
        yield (
            f"rollout.embedded_cache_gb={rollout.embedded_cache_gb:g}: the {rl.group} responses to a prompt may need "
            f"{group_gb:.2g} GB, and are drawn together all the same; lower rl.group or the limits of their length"
        )
    if model.decoder.is_moe and config.moe_in_effect.expert_bias_update_rate:
        yield (
            f"moe.expert_bias_update_rate={config.moe.expert_bias_update_rate:g} moves the experts' biases without a "
            "gradient: the policy changes beside what the rewards teach"
        )


def _check_machine(config: RlConfig) -> None:
    """Check that this machine can do what the configuration asks for.

    Raises:
        ConfigError, EngineError: it cannot.
    """
    check_placement(config.rollout)
    if config.train.deterministic and config.rollout.engine == "embedded" and has_gpu():
        raise ConfigError(
            "train.deterministic=true: the embedded engine draws with torch.cumsum, which torch then refuses on a GPU; "
            "set it to false, or use servers (rollout.engine=vllm)"
        )


def _check_router_replay(config: RlConfig, model: GlmvConfig) -> None:
    """Check that the model has experts, which router replay is about.

    Raises:
        ConfigError: it has none, or more than their numbers can say.
    """
    if not config.rollout.has_router_replay:
        return
    if not model.decoder.is_moe:
        raise ConfigError("rollout.router_replay=engine: the model is dense and has no routers; set it to none")
    if model.decoder.n_routed_experts > MAX_EXPERTS:
        raise ConfigError(
            f"rollout.router_replay=engine: the model has {model.decoder.n_routed_experts} experts per layer, and only "
            f"{MAX_EXPERTS} can be told apart; set it to none"
        )


def longest_response(config: RlConfig) -> int:
    """Return the most tokens of a response."""
    return config.rollout.max_thinking_tokens + config.rollout.max_answer_tokens + MOST_INSERTED


def longest_prompt(config: RlConfig) -> int:
    """Return how many tokens a prompt may have, so that its longest rollout fits into a pack.

    Raises:
        ConfigError: none would fit.
    """
    limits, seq_length = config.rollout, config.train.seq_length
    response = longest_response(config)
    if response >= seq_length:
        raise ConfigError(
            f"train.seq_length={seq_length} must hold a prompt and its longest response: "
            f"rollout.max_thinking_tokens={limits.max_thinking_tokens} and "
            f"rollout.max_answer_tokens={limits.max_answer_tokens} leave no room for the prompt; raise the one, or "
            "lower the others"
        )
    return seq_length - response


def _check_marks(tokenizer: GlmTokenizer) -> None:
    """Check that the tokenizer has the tokens by which thought and answer are found.

    Raises:
        DataError: it lacks one.
    """
    if missing := [name for name in MARKS if name not in tokenizer.special]:
        raise DataError(
            f"data.tokenizer {tokenizer.folder} lacks the special tokens {' '.join(missing)}, by which the thought and "
            "the answer of a response are found: use that of a model which answers so"
        )


def _check_end(model: GlmvConfig, tokenizer: GlmTokenizer) -> None:
    """Check that the token by which a model learns to end its answer ends a response.

    Raises:
        ConfigError: it does not.
    """
    name, ends = ROLE_TOKENS["user"], model.decoder.eos_token_id
    if (end := tokenizer.special[name]) not in ends:
        raise ConfigError(
            f"eos_token_id in the config.json of model.init_from is {list(ends)}, without {name} ({end}), by which an "
            "answer ends: every response would be cut off at its limit. Add it there"
        )


def _check_verifiers(table: PromptTable) -> None:
    """Check that every verifier of the prompts exists: shards may have been built by another version.

    Raises:
        DataError: one does not.
    """
    for name in sorted({verifier for _, verifier in table.scored}):
        try:
            verifier_named(name)
        except RewardError as error:
            raise DataError(f"data.sources: prompts name a verifier that does not exist: {error}") from None


def _check_labels(config: RlConfig, table: PromptTable) -> None:
    """Check that the tiers that people gave are those of the curriculum.

    Raises:
        DataError: they are not.
    """
    tiers = len(config.curriculum.weights)
    labelled = int((table.facts.tiers != NO_TIER).sum())
    if labelled and tiers != len(TIERS):
        raise DataError(
            f"{labelled:,} prompts are labelled with one of the {len(TIERS)} tiers {', '.join(TIERS)}, but "
            f"curriculum.edges makes {tiers}: give {len(TIERS) - 1} edges, or build the sources without `tier`"
        )


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
