"""Score a file of answers, by rules and, where no rule decides, by a judge.

    python -m rewards.score FILE.jsonl [--registry YAML] [--out FILE] [--judge URL --judge-model M]

One line in, one line out: {"id", "score", "reason", "rules", "verifier", "answer"}. `rules` is the score without a
judge; both are null where a judge is needed and there is none. `rewards.records` has the keys of a line. A line that
cannot be scored is named, with what is wrong, and the command continues.

Exit status: 0; 1 if lines could not be scored or are not as they expect; 2 for a mistake in the call.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.files import replacing
from rewards import workers
from rewards.judge import Judge, JudgeConfig, recorded
from rewards.records import Line, Record, read_lines, record_of
from rewards.registry import Registry, read_registry
from rewards.scoring import Scored, score_answer, score_response
from rewards.summary import Summary, table
from rewards.verdict import Ask, RewardError, Verdict

JUDGE_NEEDED = "judge needed"
MOST_WORKERS = 1024
_AT_ONCE = 256  # lines that are read ahead of the scoring

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    file: Annotated[Path, typer.Argument(help="JSON lines, or one JSON array")],
    registry: Annotated[Path | None, typer.Option(help="YAML of data sources and judges")] = None,
    out: Annotated[Path | None, typer.Option(help="file for the scores; without, they go to stdout")] = None,
    judge: Annotated[str, typer.Option(help="address of an OpenAI-compatible endpoint, up to /v1")] = "",
    judge_model: Annotated[str, typer.Option(help="name of the model at --judge")] = "",
    judge_cache: Annotated[str, typer.Option(help="folder for the replies of judges")] = "",
    workers_: Annotated[
        int, typer.Option("--workers", min=1, max=MOST_WORKERS, help="symbolic comparisons and judges at once")
    ] = 2,
) -> None:
    try:
        _check_call(file, out, judge, judge_model, judge_cache)
        known = read_registry(registry) if registry else Registry()
        judges = _judges(known, judge, judge_model, judge_cache)
        total = sum(1 for _ in read_lines(file))
        workers.configure(workers_).start()
        summary = _run(file, known, judges, out, total, workers_)
    except RewardError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"error: {error.filename or out}: {error.strerror}", err=True)
        raise typer.Exit(2) from None
    finally:
        workers.shared().close()
    Console(stderr=True).print(table(summary))
    for name, asked in judges.items():
        if asked.counts:
            typer.echo(f"judge {name}: " + ", ".join(f"{n} {event}" for event, n in asked.counts.items()), err=True)
    raise typer.Exit(0 if summary.all_well else 1)


def _check_call(file: Path, out: Path | None, judge: str, judge_model: str, judge_cache: str) -> None:
    """Refuse options that would be ignored, or destroy something. Raises RewardError."""
    if judge_cache and not (judge or judge_model):
        raise RewardError(
            "--judge-cache is of --judge, which is missing: give --judge and --judge-model, or write `cache` under a "
            "judge of the registry"
        )
    if out is not None and out.is_dir():
        raise RewardError(f"--out {out} is a folder: name a file")
    if out is not None and file.exists() and out.exists() and out.samefile(file):
        raise RewardError(f"--out {out} is the file of the answers, which would be replaced: name another")


def _judges(registry: Registry, url: str, model: str, cache: str) -> dict[str, Judge]:
    """Return the judges of the registry, and that of the command under the empty name."""
    judges = {name: Judge(config) for name, config in registry.judges.items()}
    if url or model:
        try:
            judges[""] = Judge(JudgeConfig(url=url, model=model, cache=cache))
        except RewardError as error:
            said = str(error).replace("judge.url", "--judge").replace("judge.model", "--judge-model")
            raise RewardError(said) from error
    return judges


def _run(
    file: Path, registry: Registry, judges: dict[str, Judge], out: Path | None, total: int, threads: int
) -> Summary:
    summary = Summary()
    console = Console(stderr=True)
    columns = (TextColumn("scored"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        temporary = stack.enter_context(replacing(out) if out else nullcontext())
        to: IO[str] = stack.enter_context(temporary.open("w", encoding="utf-8")) if temporary else sys.stdout
        progress = stack.enter_context(Progress(*columns, console=console, disable=not console.is_terminal))
        bar = progress.add_task("scored", total=total)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        lines = read_lines(file)
        for some in iter(lambda: list(islice(lines, _AT_ONCE)), []):
            for line, answer in zip(
                some, pool.map(lambda line: scored_line(line, registry, judges), some), strict=True
            ):
                if "error" in answer:
                    progress.console.print(
                        f"line {line.number}: {answer['error']}", markup=False, highlight=False, soft_wrap=True
                    )
                summary.add(answer.pop("domain"), answer, answer.pop("as_expected", None))
                to.write(as_json(answer) + "\n")
                progress.advance(bar)
    return summary


def scored_line(line: Line, registry: Registry, judges: dict[str, Judge]) -> dict[str, Any]:
    """Return what the output says about a line, with its domain; and `as_expected` if the line says what it expects."""
    try:
        record = record_of(line, registry)
    except RewardError as error:
        return _error(line, str(error))
    scored = _by_rules(record)
    verdict = _verdict(scored, record, judges)
    rules = scored.outcome.score if isinstance(scored.outcome, Verdict) else None
    answer = {
        "id": record.id,
        "score": None if verdict is None else verdict.score,
        "reason": JUDGE_NEEDED if verdict is None else verdict.reason,
        "rules": rules,
        "verifier": record.task.verifier.name,
        "answer": scored.answer,
        "domain": record.domain,
    }
    if record.expected is not None:
        answer["as_expected"] = _as_expected(record.expected, scored.outcome, verdict)
    return answer


def _error(line: Line, message: str) -> dict[str, Any]:
    given = line.content
    said = {"id": str(given.get("id", line.number)), "score": None, "reason": "error", "error": message}
    said["domain"] = str(given.get("domain") or given.get("source") or given.get("verifier") or "")
    return {**said, "as_expected": False} if "expected" in given else said


def _by_rules(record: Record) -> Scored:
    if record.response is not None:
        return score_response(record.response, record.task)
    assert record.answer is not None
    return Scored(score_answer(record.answer, record.task), record.answer)


def _verdict(scored: Scored, record: Record, judges: dict[str, Judge]) -> Verdict | None:
    """Return the verdict of the rules, of a recorded reply, or of a judge; None if there is no judge to ask."""
    if isinstance(scored.outcome, Verdict):
        return scored.outcome
    if record.judge_says is not None:
        return recorded(record.judge_says, scored.outcome)
    judge = judges.get(record.judge) or judges.get("")
    return judge.verdict(record.task.item, scored.answer or "", scored.outcome) if judge else None


def _as_expected(
    expected: tuple[float | None, float, float | None], outcome: Verdict | Ask, verdict: Verdict | None
) -> bool:
    """Return whether a line scores as it expects. null expects a judge to be asked, who then says `semantic`."""
    score, tolerance, semantic = expected
    if score is None:
        by_judge = verdict is None or semantic is None or abs(verdict.score - semantic) <= tolerance
        return isinstance(outcome, Ask) and by_judge
    return verdict is not None and abs(verdict.score - score) <= tolerance


def as_json(content: dict[str, Any]) -> str:
    """Return one line of JSON; lone surrogates, which have no UTF-8, are escaped."""
    text = json.dumps(content, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(content)
    return text


if __name__ == "__main__":
    app()
