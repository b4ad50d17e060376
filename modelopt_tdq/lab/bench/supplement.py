"""Runs the rows of a table on worker processes; finished rows are kept, so that it can go on after an interruption."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
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
from modelopt_tdq.lab.trajectories import load_scheduler

__all__ = ["Bench", "Store", "class_name", "full_precision_key", "run_table", "runs_of", "table_path"]

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


@dataclass(frozen=True)
class Bench:
    """What all rows share.

    Attributes:
        model: Folder of the full-precision model.
        data: ``cifar10.npz``, or None to download.
        budget: What a row may cost.
        output: Folder of the results.
        workers: Processes, with one thread each on a CPU.
        device: ``"cpu"`` or ``"cuda"``.
    """

    model: Path
    data: Path | None
    budget: Budget
    output: Path
    workers: int = 1
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Class of the model, which results are named by."""
        return class_name(self.model)

    @cached_property
    def checksum(self) -> str:
        """Of the model's weights."""
        return checksum(self.model)


class Store:
    """Finished runs in one JSON file, by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Any] = {}
        if path.is_file():
            content = json.loads(path.read_text())
            if content.get("schema_version") != _SCHEMA_VERSION:
                raise TdqError(
                    "output", str(path), "its results are of another version", "Name another folder with --output"
                )
            self.runs = content["runs"]

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result; the file is replaced when the new one is complete."""
        self.runs[key] = result
        write_text(self.path, json.dumps({"schema_version": _SCHEMA_VERSION, "runs": self.runs}, indent=1) + "\n")


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
    """Run what the store does not have yet."""
    wanted: dict[str, Run | None] = {full_precision_key(bench): None}
    wanted |= {run.key(bench.checksum, bench.budget): run for run in runs_of(table)}
    missing = {key: run for key, run in wanted.items() if key not in store.runs}
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
