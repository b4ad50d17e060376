"""Runs the rows of a table on worker processes; finished rows are kept, so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from modelopt_tdq.core.files import write_text
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.lab.bench.budget import Budget
from modelopt_tdq.lab.bench.cifar10 import load_cifar10
from modelopt_tdq.lab.bench.qat_run import Data, QatRun, checksum, full_precision, full_precision_row
from modelopt_tdq.lab.bench.tables import Run, Table
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.provenance import installed_versions
from modelopt_tdq.lab.trajectories import load_scheduler

__all__ = [
    "Bench",
    "OfModel",
    "Store",
    "class_name",
    "facts",
    "full_precision_key",
    "labelled_progress",
    "run_table",
    "runs_of",
    "table_path",
]

_SCHEMA_VERSION = 1


def class_name(folder: Path) -> str:
    """Of the diffusers model in a folder.

    Raises:
        TdqError: There is none.
    """
    try:
        return str(json.loads((folder / "config.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise TdqError(
            "model", str(folder), f"it holds no diffusers model ({error!r})", "Name a folder with config.json"
        ) from error


#: Whose versions may change a result.
_PACKAGES = ("modelopt-tdq", "nvidia-modelopt", "torch", "diffusers")


def facts(model: Path, packages: Sequence[str] = _PACKAGES, **others: str) -> dict[str, Any]:
    """What all results of a table depend on beside the weights, the budget and the row: plain data for JSON.

    Args:
        model: Folder of the model, whose settings and scheduler count.
        packages: Whose versions may change a result.
        **others: Further facts.
    """
    digest = hashlib.sha256()
    for file in sorted([*model.glob("*.json"), *model.glob("scheduler/*.json")]):
        digest.update(file.name.encode() + file.read_bytes())
    return {"settings": digest.hexdigest()[:16], "versions": installed_versions(packages), **others}


@dataclass(frozen=True)
class OfModel:
    """Something about the full-precision model in a folder.

    Attributes:
        model: The folder.
    """

    model: Path

    @property
    def name(self) -> str:
        """Class of the model, which results are named by."""
        return class_name(self.model)

    @cached_property
    def checksum(self) -> str:
        """Of the model's weights."""
        return checksum(self.model)


@dataclass(frozen=True)
class Bench(OfModel):
    """What all rows share.

    Attributes:
        model: Folder of the full-precision model.
        data: ``cifar10.npz``, or None to download.
        budget: What a row may cost.
        output: Folder of the results.
        workers: Processes, with one thread each on a CPU.
        device: ``"cpu"`` or ``"cuda"``.
    """

    data: Path | None
    budget: Budget
    output: Path
    workers: int = 1
    device: str = "cpu"

    def facts(self) -> dict[str, Any]:
        """See :func:`facts`; with the images and the device."""
        file = None if self.data is None else (self.data / "cifar10.npz" if self.data.is_dir() else self.data)
        data = "uoft-cs/cifar10" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        return facts(self.model, data=data, device=self.device)


class Store:
    """Finished runs in one JSON file, by key; and what the runs of each model share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Any] = {}
        self._shared: dict[str, Any] = {}
        self._written_down = False  # earlier versions did not
        if path.is_file():
            content = json.loads(path.read_text())
            if content.get("schema_version") != _SCHEMA_VERSION:
                raise TdqError(
                    "output", str(path), "its results are of another version", "Name another folder with --output"
                )
            self.runs = content["runs"]
            self._written_down = "shared" in content
            self._shared = content.get("shared", {})

    def begin(self, model: str, found: dict[str, Any]) -> None:
        """More runs of a model follow: they belong into one table with those that are there.

        Args:
            model: Checksum of its weights.
            found: What they share, see :func:`facts`.

        Raises:
            TdqError: The runs that are there share something else, or it is not known what.
        """
        if model not in self._shared and (self._written_down or not self.runs):
            self._shared[model], self._written_down = found, True
        was = self._shared.get(model, {})
        for name, value in found.items():
            if was.get(name) != value:
                raise TdqError(
                    "output",
                    str(self.path),
                    f"runs that are there are of other {name}: {was.get(name, 'not written down')}, not {value}",
                    "Name another folder with --output, or write the tables of what there is with --no-run",
                )

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result; the file is replaced when the new one is complete."""
        self.runs[key] = result
        content = {"schema_version": _SCHEMA_VERSION, "shared": self._shared, "runs": self.runs}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def full_precision_key(bench: Bench) -> str:
    """Key of the full-precision row."""
    return QatRun(0, 0).key(bench.checksum, bench.budget)


def runs_of(table: Table) -> Iterator[Run]:
    """All training runs of a table, one per row and seed; seeds first, so that every row has one early."""
    for index in range(max(len(row.seeds) for row in table.rows)):
        for row in table.rows:
            if row.run is not None and index < len(row.seeds):
                yield replace(row.run, seed=row.seeds[index])


def _prepare(bench: Bench) -> tuple[Any, Any, Data]:
    diffusers = require("diffusers", "diffusers")
    model = load_model(bench.model).to(bench.device)
    noise = diffusers.DDPMScheduler.from_pretrained(bench.model, subfolder="scheduler")
    data = Data(load_cifar10(bench.data), load_cifar10(bench.data, "test"), noise)
    return model, load_scheduler(bench.model), data


def table_path(bench: Bench, key: str) -> Path:
    """Where the learned ScaleTable of a run is written."""
    return bench.output / "tables" / f"{key}.safetensors"


def _work(bench: Bench, run: Run | None) -> dict[str, Any]:
    if bench.device == "cpu":
        torch.set_num_threads(1)
    start = time.perf_counter()
    model, sampler, data = _prepare(bench)
    if run is None:
        found = full_precision_row(model, data, bench.budget)
    else:
        against = full_precision(model, sampler, bench.budget)
        path = table_path(bench, run.key(bench.checksum, bench.budget))
        found = run.measure(model, sampler, data, bench.budget, against, path)
    return {**found, "wall_seconds": round(time.perf_counter() - start, 1)}


def run_table(bench: Bench, table: Table, store: Store) -> None:
    """Run what the store does not have yet.

    Raises:
        TdqError: What the store has is of other data, settings or versions; see :meth:`Store.begin`.
    """
    wanted: dict[str, Run | None] = {full_precision_key(bench): None}
    wanted |= {run.key(bench.checksum, bench.budget): run for run in runs_of(table)}
    missing = {key: run for key, run in wanted.items() if key not in store.runs}
    if missing:
        store.begin(bench.checksum, bench.facts())
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=f"table {table.number}", unit="run") as bar,
        ProcessPoolExecutor(bench.workers, mp_context=context) as pool,
    ):
        futures = {pool.submit(_work, bench, run): key for key, run in missing.items()}
        try:
            for future in as_completed(futures):
                store.add(futures[future], future.result())
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def labelled_progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar over rows that take different steps.

    Args:
        total: Of all steps.

    Yields:
        Says what is being done, and by how much it advanced; 0 where it begins, which is shown at once.
    """
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"
    with tqdm(total=total, bar_format=layout) as bar:

        def advance(what: str, by: int) -> None:
            bar.set_description_str(what.ljust(32), refresh=not by)
            bar.update(by)

        yield advance
