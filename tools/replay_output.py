"""What tools.replay shows of the packs that it ran: lines for the terminal, and packs with losses for a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from data_pipeline.encoding.batch import Batch
from data_pipeline.encoding.tokenizer import GlmTokenizer
from tools.view_content import PackView, view_of_pack
from tools.view_page import shown_text
from training.replay import Replay, SampleLoss


def lines_of(replayed: Replay, seq_length: int) -> Iterator[str]:
    """Yield what the terminal shows."""
    yield f"step {replayed.step}, with {replayed.weights}"
    if replayed.steps_between:
        yield f"these weights are {replayed.steps_between} steps older than the step"
    for pack in replayed.packs:
        yield ""
        yield (
            f"pack {pack.pack}: loss {_number(pack.loss)}, gradient norm {_number(pack.grad_norm)}, {pack.tokens:,} of "
            f"{seq_length:,} tokens, {pack.loss_tokens:,} with loss"
        )
        yield "      loss  max loss  tokens  sample"
        yield from (_line(sample) for sample in pack.samples)
    yield ""
    yield f"mean loss {_number(replayed.loss)} over {sum(pack.loss_tokens for pack in replayed.packs):,} tokens"


def _line(sample: SampleLoss) -> str:
    at = "" if sample.max_token is None else f"  {shown_text(repr(sample.max_text))} at token {sample.max_token}"
    numbers = f"{_number(sample.loss):>10}{_number(sample.max_loss):>10}{sample.tokens:>8,}"
    return f"{numbers}  {sample.source}: {sample.shard}/{sample.key}{at}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def views_of(replayed: Replay, batches: list[Batch], tokenizer: GlmTokenizer) -> list[PackView]:
    """Return the packs as tools.view shows them, with their losses."""
    views = []
    for pack, batch in zip(replayed.packs, batches, strict=True):
        view = view_of_pack(batch, tokenizer, f"step {replayed.step}, pack {pack.pack}")
        facts = {"loss": _number(pack.loss), "gradient norm": _number(pack.grad_norm), **view.facts}
        sequences = [
            replace(sequence, facts={**_facts(sample), **sequence.facts})
            for sequence, sample in zip(view.sequences, pack.samples, strict=True)
        ]
        views.append(replace(view, facts=facts, sequences=sequences))
    return views


def _facts(sample: SampleLoss) -> dict[str, str]:
    if sample.loss is None:
        return {"source": sample.source}
    highest = f"{_number(sample.max_loss)} of {sample.max_text!r} at token {sample.max_token}"
    return {"source": sample.source, "loss": _number(sample.loss), "highest": highest}
