"""The page of the report: a card of facts for each run, the charts by section, and the keys that differ."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from data_pipeline.domains import DOMAINS
from model.moe import MODALITIES
from tools.report_charts import SHARE_COLORS, Chart, Curve, curves_chart, shares_chart, short_number
from tools.report_rollouts import newest_rollouts
from tools.report_runs import RunRecord, different_keys
from training.grad_norms import PARTS as NORM_PARTS
from training.metrics import duration
from training.timers import PARTS as TIMED_PARTS

Draw = Callable[[Sequence[RunRecord], str], Chart | None]  # takes the runs and the label of the x axis


def page(runs: Sequence[RunRecord], x_label: str) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("tools", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    reasons: Counter[tuple[str, str]] = Counter()
    for run in runs:
        reasons.update(run.quarantined)
    return environment.get_template("report_page.html").render(
        runs=runs,
        facts=[(run, dict(facts(run))) for run in runs],
        sections=list(sections(runs, x_label)),
        differences=different_keys(runs),
        rollouts=[(run, newest_rollouts(run.folder, run.steps)) for run in runs],
        quarantined=[(shard, reason, [run.quarantined[shard, reason] for run in runs]) for shard, reason in reasons],
    )


def facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield the facts of a run's card."""
    yield "steps", f"{run.steps:,} of {run.steps_in_all:,}" if run.steps_in_all else f"{run.steps:,}"
    if not run.lines:
        return
    loss = run.last_loss()
    tokens = run.last("tokens_total") or sum(run.values("tokens"))
    yield "loss of the last steps", "not finite" if loss is None else f"{loss:.4f}"
    if rewards := run.values("reward"):
        yield "reward, first and last", f"{rewards[0]:.2f}, {rewards[-1]:.2f}"
    if right := [line["validation/accuracy"] for line in run.validation if "validation/accuracy" in line]:
        yield "held-out accuracy, first and last", f"{right[0]:.1%}, {right[-1]:.1%}"
    if validated := next(
        (line["validation/loss"] for line in reversed(run.validation) if "validation/loss" in line), None
    ):
        yield "validation loss", f"{validated:.4f}"
    yield "useful tokens", short_number(tokens)
    yield "tokens/s", f"{statistics.median(run.values('tokens_per_second')):,.0f}"
    if mfu := run.values("mfu"):
        yield "MFU", f"{statistics.median(mfu):.1%}"
    if memory := run.values("memory_gb"):
        yield "memory", f"{max(memory):.1f} GB"
    if waits := run.values("data_seconds"):
        yield "wait for data", f"{sum(waits) / sum(run.values('step_seconds')):.1%} of the time"
    yield "time in steps", duration(sum(run.values("step_seconds")))
    left = run.last("eta_seconds")
    if left and run.steps < run.steps_in_all:
        yield "time left", duration(left)
    if run.starts:
        yield "processes", " then ".join(dict.fromkeys(str(start.processes) for start in run.starts))
        yield "restarts", str(len(run.starts) - 1)
    yield "quarantined", f"{run.quarantined.total():,}"


# --- the charts -------------------------------------------------------------------------------------------------------


def _curves(
    title: str,
    key: str,
    *,
    note: str = "",
    log: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    of_validation: bool = False,
) -> Draw:
    def draw(runs: Sequence[RunRecord], x_label: str) -> Chart | None:
        curves = [Curve(run.curve(key, of_validation=of_validation), run.color) for run in runs]
        return curves_chart(title, curves, x_label, note=note, log=log, percent=percent, from_zero=from_zero)

    return draw


def _domain_loss(domain: str) -> Draw:
    """Draw the loss of one domain, unless it is the only one."""
    draw_loss = _curves(domain, f"loss/{domain}")

    def draw(runs: Sequence[RunRecord], x_label: str) -> Chart | None:
        present = [one for one in DOMAINS if any(run.curve(f"loss/{one}")[0] for run in runs)]
        return draw_loss(runs, x_label) if len(present) > 1 else None

    return draw


def _shares(title: str, prefix: str, names: Sequence[str], *, note: str) -> Draw:
    """Draw the sums of PREFIX/NAME over each run's steps, without those that are 0."""

    def draw(runs: Sequence[RunRecord], x_label: str) -> Chart | None:
        totals = {run.name: {name: sum(run.values(f"{prefix}/{name}")) for name in names} for run in runs}
        drawn = {run: {name: total for name, total in sums.items() if total > 0} for run, sums in totals.items()}
        return shares_chart(title, drawn, note=note)

    return draw


def _expert_load(runs: Sequence[RunRecord], x_label: str) -> Chart | None:
    curves = []
    for run in runs:
        curves.append(Curve(run.curve("expert_load/max"), run.color))
        curves.append(Curve(run.curve("expert_load/min"), run.color, dashed=True))
    note = "busiest (solid) and least busy expert (dashed) of any layer; 1: an even share"
    return curves_chart("expert load", curves, x_label, from_zero=True, note=note)


def _prefixed(title: str, prefix: str, *, note: str = "", percent: bool = False, of_validation: bool = False) -> Draw:
    """Draw every key that begins with a prefix, in the colors of shares; of the first run alone that has any."""

    def draw(runs: Sequence[RunRecord], x_label: str) -> Chart | None:
        for run in runs:
            names = run.names(prefix, of_validation=of_validation)
            curves = [
                Curve(run.curve(prefix + name, of_validation=of_validation), SHARE_COLORS[place % len(SHARE_COLORS)])
                for place, name in enumerate(names)
            ]
            if names:
                return curves_chart(
                    f"{title} ({run.name})", curves, x_label, note=note, percent=percent, from_zero=True, labels=names
                )
        return None

    return draw


SECTIONS: dict[str, list[Draw]] = {
    "Rewards": [
        _curves("reward of the rollouts", "reward", from_zero=True),
        _curves("accuracy, held out", "validation/accuracy", of_validation=True, percent=True, from_zero=True),
        _prefixed("reward by source and tier", "reward/", note="tier_0 is the hardest"),
        _prefixed("weight of the tiers in the next draw", "curriculum/weight/", percent=True),
        _prefixed("pass rate by kind", "curriculum/pass_rate/", percent=True),
        _curves("prompts drawn for each that is trained on", "expansion/ratio", from_zero=True),
        _curves("groups with differences", "groups/valid_share", percent=True, from_zero=True),
    ],
    "Rollouts": [
        _curves("tokens of a rollout", "rollout/tokens", from_zero=True),
        _curves("thoughts that were ended", "rollout/forced", percent=True, from_zero=True),
        _curves("rollouts that were truncated", "rollout/truncated", percent=True, from_zero=True),
        _curves("rollouts that no rule decides, without a judge", "rollout/no_judge", percent=True, from_zero=True),
        _curves("rollouts whose judge gave no verdict", "rollout/judge_fallback", percent=True, from_zero=True),
        _curves("entropy", "policy/entropy", from_zero=True, note="mean of minus the log-probability of drawn tokens"),
        _curves("mismatch of the engine", "rollout/mismatch", log=True, note="mean difference of log-probabilities"),
        _curves("tokens that are clipped", "policy/clip_fraction", percent=True, from_zero=True),
    ],
    "Loss": [
        _curves("all domains", "loss", note="cross-entropy per token that carries loss"),
        *(_domain_loss(domain) for domain in DOMAINS),
    ],
    "Validation": [
        _curves("all domains, held out", "validation/loss", of_validation=True),
        *(_curves(f"{domain}, held out", f"validation/loss/{domain}", of_validation=True) for domain in DOMAINS),
    ],
    "Optimizer": [
        _curves("learning rate", "lr", from_zero=True),
        _curves("gradient norm", "grad_norm", log=True, note="before clipping"),
        *(_curves(f"gradient norm: {part}", f"grad_norm/{part}", log=True) for part in NORM_PARTS),
    ],
    "Data": [
        _shares("mixture", "tokens", DOMAINS, note="useful tokens by domain"),
        _curves("padding", "padding_fraction", percent=True, from_zero=True, note="share of the packs' tokens"),
        _curves("images and frame pairs per step", "images", from_zero=True),
        _curves("useful tokens per step", "tokens", from_zero=True),
    ],
    "Experts": [
        _expert_load,
        *(_curves(f"busiest expert: {kind} tokens", f"expert_load/{kind}/max", from_zero=True) for kind in MODALITIES),
        _curves("experts without a token in the step", "dead_experts", from_zero=True),
        _curves("balance loss", "balance_loss", note="1: balanced"),
    ],
    "Speed": [
        _curves("tokens per second", "tokens_per_second", from_zero=True),
        _curves("MFU", "mfu", percent=True, from_zero=True, note="useful FLOPs over the devices' peak"),
        _curves("seconds per step", "step_seconds", from_zero=True),
        _curves("wait for data, seconds", "data_seconds", from_zero=True, note="of the slowest rank"),
        _shares("where the time goes", "seconds", TIMED_PARTS, note="each of its slowest rank"),
        _curves("memory, GB", "memory_gb", from_zero=True, note="of the fullest rank"),
    ],
}


def sections(runs: Sequence[RunRecord], x_label: str) -> Iterator[tuple[str, list[Chart]]]:
    """Yield the sections of the page with their charts; charts and sections without data are omitted."""
    for name, draws in SECTIONS.items():
        if charts := [chart for draw in draws if (chart := draw(runs, x_label)) is not None]:
            yield name, charts
