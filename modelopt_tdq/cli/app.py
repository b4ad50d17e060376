"""The ``modelopt-tdq`` program: its commands, and how errors are shown."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from modelopt_tdq.cli import analyze, bench, build, compare, demo, doctor, export, quantize, report, table, twin
from modelopt_tdq.cli.output import Output, shown
from modelopt_tdq.errors import TdqError
from modelopt_tdq.version import __version__

__all__ = ["app"]


#: Commands that go on where they stopped.
_RESUMED = ("demo",)


class _Group(TyperGroup):
    """Shows an error that the user can mend as one line, exit status 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """--quiet and --json may stand behind the command, too."""
        everywhere = [arg for arg in args if arg in ("--quiet", "--json")]
        return super().parse_args(ctx, [*everywhere, *(arg for arg in args if arg not in everywhere)])

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        output = Output(bool(ctx.params.get("quiet")), bool(ctx.params.get("json")), sys.stdout)
        try:
            with shown(output):
                return super().invoke(ctx)
        except TdqError as error:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            if ctx.invoked_subcommand in _RESUMED:
                typer.echo("Interrupted: run the same command again to resume.", err=True)
            raise


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help=(
        "Quantize diffusion models with activation scales that follow the diffusion time: a plugin to NVIDIA ModelOpt."
        "\n\nStart with `modelopt-tdq demo`; then analyze, quantize, export, and build your own model."
    ),
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"modelopt-tdq {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    quiet: bool = typer.Option(False, "--quiet", help="Print warnings and errors only. Also behind the command."),
    json: bool = typer.Option(
        False, "--json", help="Print what the command did as one JSON object. Also behind the command."
    ),
) -> None:
    pass


app.command("demo")(demo.demo)
app.command("analyze")(analyze.analyze)
app.command("quantize")(quantize.quantize)
app.command("export")(export.export)
app.command("twin")(twin.twin)
app.command("table")(table.table)
app.command("build")(build.build)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.bench, name="bench")
