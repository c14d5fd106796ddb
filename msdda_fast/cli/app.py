# SPDX-License-Identifier: Apache-2.0
"""The command `msdda-fast`. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import msdda_fast
from msdda_fast.cli.certify import certify
from msdda_fast.cli.compare import compare
from msdda_fast.cli.doctor import doctor
from msdda_fast.cli.generate import generate
from msdda_fast.cli.serve import serve
from msdda_fast.cli.sweep import sweep
from msdda_fast.cli.train import app as train
from msdda_fast.cli.tune import tune

__all__ = ["app", "main"]

# Everything that draws is imported inside the commands: `--help` must not wait for it.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Balance several aligned diffusion models at inference time.",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"msdda-fast {msdda_fast.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


app.command()(generate)
app.command()(sweep)
app.command()(doctor)
app.add_typer(train, name="train")
app.command()(compare)
app.command()(tune)
app.command()(certify)
app.command()(serve)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):  # a path need not be text that the terminal can show
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app()
