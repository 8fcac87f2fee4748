"""The commands. Each is a few lines here; what it needs is imported when it runs, so that `--help` is instant.

An error of the operator's (`SetupError`) is one line and exit code 1, never a traceback.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serve.commands import artifacts, experiment, rollout
from serve.commands.advise import advise
from serve.commands.bench import bench
from serve.commands.compress import compress
from serve.commands.distill import distill
from serve.commands.evaluate import evaluate
from serve.commands.sensitivity import sensitivity
from serve.errors import SetupError

__all__ = ["app", "main"]

app = typer.Typer(
    name="halftone",
    help="One language model at several precisions, compressed while it loads, compared on live traffic.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_DEFAULT_RECIPES = ["bf16", "int8", "nf4"]


@app.command()
def serve(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]",
            help="A YAML file, or a model: a folder, a Hub id or builtin:storyteller. Default: the embedded model.",
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="With a model: one variant per recipe (repeatable). Default: bf16 int8 nf4."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON once all is loaded.")] = False,
) -> None:
    """Serve one model at several precisions until Ctrl-C."""
    from serve.config import Config, default_config, load_config, serve_source
    from serve.serving import run

    def chosen() -> Config:
        if config is not None and config.endswith((".yaml", ".yml")):
            if recipe:
                raise SetupError("--recipe goes with a model; a configuration file names its own variants")
            return load_config(Path(config))
        if config is None and not recipe:
            return default_config()
        return serve_source(config or "builtin:storyteller", tuple(recipe or _DEFAULT_RECIPES))

    run(chosen(), host=host, port=port, as_json=as_json)


app.command()(compress)
app.command()(evaluate)
app.command()(bench)
app.command()(advise)
app.command()(distill)
app.command()(sensitivity)
app.add_typer(artifacts.app, name="artifacts")
app.add_typer(rollout.app, name="rollout")
app.add_typer(experiment.app, name="experiment")


def main() -> None:
    """The console script."""
    try:
        app()
    except SetupError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {_escaped(error.message)}")
        sys.exit(1)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
