"""``modelopt-tdq demo``: runs what is still to be done, shows the table, writes the report."""

from __future__ import annotations

import importlib.util
import json
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from modelopt_tdq.core.files import write_text
from modelopt_tdq.errors import require
from modelopt_tdq.lab.demo.cache import StageCache
from modelopt_tdq.lab.demo.gather import gather
from modelopt_tdq.lab.demo.pool import run_stages
from modelopt_tdq.lab.demo.settings import DemoSettings
from modelopt_tdq.lab.demo.stages import Stage, stages
from modelopt_tdq.lab.report.figures import draw_figures
from modelopt_tdq.lab.report.html import write_html
from modelopt_tdq.lab.report.table import print_verdict, results_table

__all__ = ["available_backends", "run_demo", "unfinished"]

_MODULES = {"onnx": ("onnx", "onnx_ir", "onnxscript"), "openvino": ("openvino",), "tensorrt_rtx": ("tensorrt_rtx",)}


def available_backends() -> frozenset[str]:
    """Of "onnx", "openvino", "tensorrt_rtx": those that are installed."""
    return frozenset(name for name, modules in _MODULES.items() if all(map(importlib.util.find_spec, modules)))


def unfinished(settings: DemoSettings, backends: frozenset[str]) -> list[Stage]:
    """The stages whose results an earlier run did not leave."""
    cache = StageCache(settings.output)
    return [stage for stage in stages(settings, backends) if cache.load(stage.name, stage.depends) is None]


def run_demo(settings: DemoSettings, console: Console | None = None, command: str = "") -> dict[str, Any]:
    """Run the demo, or what is left of an interrupted one.

    Writes into ``settings.output``: ``results.json``, ``report.html``, ``images/``, ``plots/``, ``tables/``
    (scale tables), ``models/`` (quantized models), ``deploy/`` (ONNX files, engines), and ``cache/``.

    Args:
        settings: What to do.
        console: Where the progress and the table go.
        command: How the demo was called, for the record.

    Returns:
        The content of ``results.json``.

    Raises:
        TdqError: A stage failed.
        MissingExtraError: The extra ``diffusers`` or ``report`` is not installed.
    """
    console = console or Console()
    require("diffusers", "diffusers")
    require("matplotlib", "report")
    require("jinja2", "report")
    settings.output.mkdir(parents=True, exist_ok=True)
    backends = available_backends()
    if settings.restart:
        StageCache(settings.output).clear()
    started = time.monotonic()
    all_stages, todo = stages(settings, backends), unfinished(settings, backends)
    if len(todo) < len(all_stages):
        console.print(f"{len(all_stages) - len(todo)} of {len(all_stages)} stages are done already (--restart: again)")
    with _Display(console, todo) as display:
        run_stages(todo, {s.name for s in all_stages} - {s.name for s in todo}, settings, backends, display)
        display.say("report")
        results, arrays = gather(settings, backends, command)
        results["figures"] = draw_figures(results, arrays, settings.output)
        results["seconds"] = round(time.monotonic() - started, 1)
        write_text(settings.output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        report = write_html(results, settings.output, settings.output / "report.html")
    console.print(results_table(results))
    print_verdict(results, console)
    for note in results["notes"]:
        console.print(f"[dim]{note}[/]")
    console.print(f"Report: {report}   ({time.monotonic() - started:.0f} s)", highlight=False)
    return results


class _Display:
    """One progress bar over all stages, weighted by what they cost, with the time left."""

    def __init__(self, console: Console, todo: list[Stage]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._cost = {stage.name: stage.cost for stage in todo}
        self._done = dict.fromkeys(self._cost, 0.0)
        self._running: dict[str, str] = {}
        self._task = self._progress.add_task("start", total=sum(self._cost.values()) + 5.0)

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, stage: Stage, fraction: float) -> None:
        self._done[stage.name] = fraction * self._cost[stage.name]
        self._running[stage.name] = stage.title
        if fraction >= 1.0:
            del self._running[stage.name]
        self.say(", ".join(self._running.values()) or stage.title)

    def say(self, description: str) -> None:
        self._progress.update(self._task, completed=sum(self._done.values()), description=description)
