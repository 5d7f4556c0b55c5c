"""One iteration's learning: which groups are kept, the packs of each update, and what is written down of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from megatron.core import parallel_state

from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.plan.pack_cost import PackCost
from rewards.answer import REASONS
from rl.advantages import group_advantages
from rl.config import RlConfig
from rl.errors import RolloutError
from rl.metric_names import metric_name
from rl.packs import Work, plan_packs
from rl.policy_batch import LearnedRollout, PolicyBatch, make_policy_batch
from rl.reading import in_threads
from rl.rollout_manager import Group
from rl.rollouts import RolloutPrompt
from rl.scoring import MEDIA_TOKEN, NO_JUDGE
from rl.selection import count_groups, have_differences, select_groups
from training.batch_broadcast import broadcast_batches

BROKEN = {*REASONS, MEDIA_TOKEN}  # reasons of rewards for responses without the form of an answer
LEAST_RESPONSES = 64  # of which none has that form: fewer may be bad luck
UNDECIDED = (NO_JUDGE, "judge_fallback")  # reasons of rewards that neither a rule nor a judge has given


@dataclass(frozen=True)
class Chosen:
    """A group that is trained on, with the advantage of each of its rollouts."""

    group: Group
    advantages: np.ndarray  # float64 [group]


def choose(groups: Sequence[Group], config: RlConfig) -> tuple[list[Chosen], dict[str, float]]:
    """Return the groups to train on, and the metrics of all."""
    scores = scores_of(groups, config.rl.group)
    kept = select_groups(scores, config.rl.prompts)
    advantages = group_advantages(scores, config.rl.advantage)
    chosen = [Chosen(groups[number], advantages[number]) for number in kept.tolist()]
    return chosen, count_groups(scores, len(chosen), config.curriculum.pass_score) if len(groups) else {}


def check_answers(groups: Sequence[Group], step: int) -> None:
    """Check that a model which is about to learn from rewards knows how an answer is written.

    Raises:
        RolloutError: in the first iteration no response has the form of an answer, so that there is nothing to learn.
    """
    reasons = Counter(verdict.reason for group in groups for verdict in group.verdicts)
    if step == 1 and reasons.total() >= LEAST_RESPONSES and reasons.keys() <= BROKEN:
        raise RolloutError(
            f"step 1: none of the {reasons.total():,} responses has the form of an answer ({counted(reasons)}), so "
            "that none has a reward: the model has not learned to answer, as base models have not. Train it on chats "
            "with thoughts and boxed answers first (sft.train); if responses are cut off, raise "
            "rollout.max_thinking_tokens and rollout.max_answer_tokens"
        )


def counted(reasons: Counter[str]) -> str:
    """Return the most frequent reasons of rewards with their numbers, such as "no_box 14, cut_off 10"."""
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(3))


def scores_of(groups: Sequence[Group], size: int) -> np.ndarray:
    """Return the scores, float64 [groups, size]."""
    return np.array([group.scores for group in groups], np.float64).reshape(-1, size)


def valid_share(groups: Sequence[Group], size: int) -> float:
    """Return the share of the groups that have differences."""
    return float(have_differences(scores_of(groups, size)).mean()) if groups else 1.0


def split_updates(chosen: Sequence[Chosen], updates: int, seed: Sequence[int]) -> list[list[Chosen]]:
    """Deal the groups at random to at most `updates` updates of about the same size."""
    order = np.random.Generator(np.random.PCG64(list(seed))).permutation(len(chosen))
    return [[chosen[number] for number in part.tolist()] for part in np.array_split(order, updates) if len(part)]


class PackMaker:
    """Makes the packs of an update.

    Args:
        config: of the run.
        tokenizer: of the run.
        cost: by which packs are balanced.
        image_id: the token that stands for a piece of an image.
    """

    def __init__(self, config: RlConfig, tokenizer: GlmTokenizer, cost: PackCost, image_id: int) -> None:
        self.config, self.tokenizer, self.cost, self.image_id = config, tokenizer, cost, image_id

    def packs(self, update: Sequence[Chosen], seed: Sequence[int]) -> list[PolicyBatch]:
        """Return this data-parallel rank's packs of an update. Collective over the processes that share packs."""
        learned = [
            (LearnedRollout(chosen.group.prompt.sample, rollout, float(advantage)), chosen.group)
            for chosen in update
            for rollout, advantage in zip(chosen.group.rollouts, chosen.advantages, strict=True)
        ]
        ranks, train = parallel_state.get_data_parallel_world_size(), self.config.train
        members = plan_packs(
            work_of([rollout for rollout, _ in learned]),
            cost=self.cost,
            seq_length=train.seq_length,
            segment_multiple=self.config.data.segment_multiple,
            ranks=ranks,
            multiple=self.config.parallel.micro_batch_multiple,
            seed=seed,
        )[parallel_state.get_data_parallel_rank()]

        def make() -> list[PolicyBatch]:
            prompts = {group.prompt.id: group.prompt for _, group in (learned[n] for pack in members for n in pack)}
            decoded = in_threads(RolloutPrompt.decoded, list(prompts.values()), self.config.data.num_workers)
            whole = {prompt.id: prompt.sample for prompt in decoded}
            return [
                make_policy_batch(
                    [replace(learned[number][0], prompt=whole[learned[number][1].prompt.id]) for number in pack],
                    seq_length=train.seq_length,
                    segment_multiple=self.config.data.segment_multiple,
                    image_id=self.image_id,
                    pad_id=self.tokenizer.pad_id,
                    sources=[learned[number][1].record.source for number in pack],
                )
                for pack in members
            ]

        return broadcast_batches(make)


def work_of(rollouts: Sequence[LearnedRollout]) -> Work:
    """Return what rollouts take."""
    patches = [[h * w for h, w in rollout.prompt.grids] for rollout in rollouts]
    return Work(
        lengths=np.array([len(rollout) for rollout in rollouts], np.int64),
        patches=np.array([sum(of_prompt) for of_prompt in patches], np.int64),
        patches_squared=np.array([sum(n * n for n in of_prompt) for of_prompt in patches], np.int64),
    )


# --- metrics ----------------------------------------------------------------------------------------------------------


def rollout_metrics(groups: Sequence[Group], tiers: Sequence[str]) -> dict[str, float]:
    """Return what rollouts were like: rewards, lengths, and how they ended.

    Args:
        groups: of the iteration.
        tiers: the name of the tier that each group's prompt was in when it was drawn.
    """
    rewards = defaultdict[str, list[float]](list)
    for group, tier in zip(groups, tiers, strict=True):
        for name in ("reward", f"reward/{metric_name(group.record.source)}", f"reward/{tier}"):
            rewards[name] += group.scores
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    reasons = [verdict.reason for group in groups for verdict in group.verdicts]
    lengths = [len(rollout.tokens) for rollout in rollouts]
    ends = {name: [rollout.finish == name for rollout in rollouts] for name in ("truncated", "media")}
    return {
        **{name: float(np.mean(values)) for name, values in sorted(rewards.items())},
        **{f"rollout/{name}": reasons.count(name) / len(reasons) for name in UNDECIDED if name in reasons},
        "rollouts": len(rollouts),
        "rollout/tokens": float(np.mean(lengths)),
        "rollout/max_tokens": max(lengths),
        "rollout/forced": float(np.mean([rollout.forced for rollout in rollouts])),
        **{f"rollout/{name}": float(np.mean(values)) for name, values in ends.items()},
    }
