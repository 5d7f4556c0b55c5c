"""From a command line to a run: shared by the entries of all stages."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from model.config import ConfigError
from training.config import RunConfig, load_config
from training.errors import expected_errors
from training.keys import help_command
from training.ranks import rank
from training.recipe import commented_yaml, read_layers


def main(schema: type[RunConfig], description: str | None, package: str = "training") -> None:
    """Read the command line and train.

    Args:
        schema: the stage's configuration.
        description: the entry's docstring, for --help.
        package: the package whose modules `setup` and `loop` prepare and run the stage.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

    unwrapped = (description or "").replace("\n\n", "\n\n\b\n")  # click would join the lines of a paragraph

    @app.command(cls=help_command(schema), help=unwrapped)
    def train(
        config: Annotated[list[Path], typer.Option(help="the run's YAML file; may be repeated: later ones win")],
        overrides: Annotated[
            list[str] | None, typer.Argument(help="keys that replace those of the files", metavar="dotted.key=value")
        ] = None,
        print_config: Annotated[
            bool, typer.Option("--print-config", help="print all keys, and where each value comes from; then stop")
        ] = False,
        dry: Annotated[
            bool, typer.Option("--dry-run", help="print what the run would do; nothing is written or started")
        ] = False,
        world_size: Annotated[
            int | None, typer.Option(min=1, help="with --dry-run: number of processes; default: WORLD_SIZE, or 1")
        ] = None,
        skip_files: Annotated[
            bool, typer.Option("--skip-files", help="with --dry-run: open no data, tokenizer or model.init_from")
        ] = False,
    ) -> None:
        with expected_errors(on_every_process=False):
            if not dry and (world_size is not None or skip_files):
                raise ConfigError("--world-size and --skip-files belong to --dry-run; add it, or remove them")
            if dry and print_config:
                raise ConfigError("--print-config and --dry-run: give one of them")
            run_config = load_config(schema, config, overrides or ())
            if print_config:
                if rank() == 0:
                    print(commented_yaml(run_config, read_layers(config, overrides or ())), end="")
                return
            # These need torch and megatron-core; --help and wrong keys are answered without.
            from training.dry_run import dry_run

            if dry:
                dry_run(run_config, world_size, skip_files, import_module(f"{package}.setup").prepare)
            else:
                import_module(f"{package}.loop").run(run_config)

    app()
