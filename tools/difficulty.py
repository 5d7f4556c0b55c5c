"""Grade prompts before a run: how often models answer each of them right (pass@k).

    python -m tools.difficulty SHARDS... --hf DIR
    python -m tools.difficulty SHARDS... --url http://localhost:8000/v1 --model NAME --config RL.yaml

SHARDS are folders of shards with prompts, .tar files or patterns. With --hf, transformers answers here; with --url, any
server with an OpenAI-compatible endpoint does (vLLM, SGLang). With --config, answers get the rewards of that run: its
registry, its judge and its curriculum.pass_score. Grades are written beside each shard when it is done, as
NAME.grades.arrow, where rl.train finds them; those of several models add up. The same command, given again after a
stop, continues after the last prompt. An answer that only a judge could score does not count where there is none.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_pipeline.errors import DataError
from model.errors import ConfigError
from tools.errors import errors_in_one_line, run
from tools.help_text import keep_lines

app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()


@app.command(help=keep_lines(__doc__))
def main(
    shards: Annotated[list[str], typer.Argument(help="folders of shards, .tar files or patterns", metavar="SHARDS...")],
    hf: Annotated[Path | None, typer.Option(help="Hugging Face folder of the model that answers")] = None,
    url: Annotated[str, typer.Option(help="address of a server that answers, up to /v1")] = "",
    model: Annotated[
        str, typer.Option(help="with --url: the model's name there. With --hf: its name in the grades")
    ] = "",
    config: Annotated[
        list[Path] | None,
        typer.Option(help="configuration of the run whose rewards are given; may be repeated: later ones win"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="answers to each prompt")] = 8,
    temperature: Annotated[float, typer.Option(min=0.01, help="of the answers")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer with its thought, in tokens")] = 8192,
    pass_score: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="an answer of at least this score is right; default: curriculum.pass_score"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the answers")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="with --url: prompts that are answered at once")] = 16,
) -> None:
    from data_pipeline.shards.index import read_index
    from tools.difficulty_answers import Answering, HfModel, Server
    from tools.difficulty_grades import DifficultyError, grade_shard
    from tools.difficulty_scores import RunScores, rewards_of
    from tools.exported import Exported, GenerateError
    from tools.shard_paths import shards_of
    from tools.shard_prompts import prompts_in, table_of_prompts

    with errors_in_one_line(ConfigError, DataError, GenerateError, DifficultyError):
        if (hf is None) == (not url):
            raise DifficultyError("name the model that answers: --hf DIR, or --url with --model (one of them)")
        if url and not (model and url.startswith(("http://", "https://"))):
            raise DifficultyError("--url needs an address such as http://localhost:8000/v1, and --model NAME")
        rewards, right_from = rewards_of(config, pass_score)
        indexes = [read_index(path) for path in shards_of(shards, console.print)]
        answering = Answering(samples, temperature, max_tokens, seed)
        answerer = HfModel(Exported.load(hf), answering) if hf else Server(url, model, answering, concurrency)
        scores = RunScores(rewards, answerer.form)
        grader = {"model": model or (hf.resolve().name if hf else ""), **answering.as_json(), "pass_score": right_from}
        if config:
            grader["rewards"] = scores.fingerprint
        try:
            for index in indexes:
                of_shard = partial(scores.of_source, label=index.file.parent.name)
                found = grade_shard(index, answerer, of_shard, grader, right_from)
                console.print(found.line(), markup=False, highlight=False, soft_wrap=True)
        finally:
            scores.close()
        console.print(table_of_prompts(prompts_in(indexes)))


if __name__ == "__main__":
    run(app)
