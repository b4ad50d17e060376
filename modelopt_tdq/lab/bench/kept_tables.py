"""What the benchmark has left in its folder: finished runs, and the scale tables that they learned."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from modelopt_tdq.core.table import ScaleTable
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.budget import BUDGETS, Budget
from modelopt_tdq.lab.bench.qat_run import QatRun
from modelopt_tdq.lab.bench.supplement import Bench, Store, full_precision_key, runs_of, table_path
from modelopt_tdq.lab.bench.tables import QAT_TABLES, Row, qat_table

__all__ = ["KeptTables", "kept_tables"]

#: The table whose rows learn with three seeds, static and temporal.
SEEDS_TABLE = 6


@dataclass(frozen=True)
class KeptTables:
    """Learned intervals of one bit width.

    Attributes:
        label: Of the bit width, ``"W4A4"``.
        budget: That they were trained with; None if there are none.
        temporal: TDQ, by seed.
        static: LSQ, by seed.
        missing: What could not be found, in sentences.
    """

    label: str
    budget: Budget | None
    temporal: dict[int, ScaleTable]
    static: dict[int, ScaleTable]
    missing: tuple[str, ...]


def kept_tables(folder: Path, model: Path) -> KeptTables:
    """The intervals that the benchmark learned on a model: W4A4 where there are, else W3A3; the largest budget.

    Args:
        folder: The benchmark's ``--output``: JSON files of results, and their tables in ``tables/``.
        model: Folder of the full-precision model.

    Raises:
        TdqError: The folder holds no results of the benchmark, or none of this model.
    """
    runs = _runs(folder)
    benches = [Bench(model, None, budget, folder) for budget in sorted(BUDGETS.values(), key=lambda b: -b.steps)]
    checksum = benches[0].checksum
    known = {full_precision_key(bench) for bench in benches}
    known |= {run.key(checksum, b.budget) for b in benches for table in QAT_TABLES for run in runs_of(table)}
    if not known & set(runs):
        raise TdqError(
            "results",
            str(folder),
            f"none of its QAT runs is of the model {model} (checksum {checksum})",
            f"Pass the model that was benchmarked, or run: {_command(SEEDS_TABLE)}",
        )
    rows = [row for row in qat_table(SEEDS_TABLE).rows if row.run is not None]
    pairs = [(row, _static_of(row, rows)) for row in rows if _intervals(row) == "mlp"]
    for temporal, static in pairs:
        for bench in benches:
            if found := _load(temporal, bench, checksum):
                reasons = (*_absent(temporal, bench, checksum, runs), *_absent(static, bench, checksum, runs))
                label = temporal.label.split()[0]
                return KeptTables(label, bench.budget, found, _load(static, bench, checksum), reasons)
    reason = f"Table {SEEDS_TABLE} was not run on this model: its learned intervals come from {_command(SEEDS_TABLE)}."
    return KeptTables(pairs[0][0].label.split()[0], None, {}, {}, (reason,))


def _command(table: int) -> str:
    return f"modelopt-tdq bench supplement --table {table}"


def _runs(folder: Path) -> dict[str, object]:
    """All finished runs in the JSON files of ``folder``, by key."""
    runs: dict[str, object] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (ValueError, OSError):
            continue  # some other file
        if isinstance(content, dict) and isinstance(content.get("runs"), dict):
            runs |= Store(path).runs
    if not runs:
        problem = "it holds no results of the benchmark" if folder.is_dir() else "no such folder"
        raise TdqError(
            "results", str(folder), problem, f"Run {_command(SEEDS_TABLE)} first, and pass the folder that it wrote"
        )
    return runs


def _intervals(row: Row) -> object:
    return None if row.run is None else row.run.options.get("intervals")


def _static_of(row: Row, rows: Iterable[Row]) -> Row:
    """The row of the same bits that differs in its intervals only."""
    return next(r for r in rows if _intervals(r) == "static" and _bits(r) == _bits(row))


def _bits(row: Row) -> tuple[int, int] | None:
    return None if row.run is None else (row.run.weight_bits, row.run.activation_bits)


def _keys(row: Row, bench: Bench, checksum: str) -> dict[int, str]:
    run = row.run or QatRun()
    return {seed: replace(run, seed=seed).key(checksum, bench.budget) for seed in row.seeds}


def _load(row: Row, bench: Bench, checksum: str) -> dict[int, ScaleTable]:
    paths = {seed: table_path(bench, key) for seed, key in _keys(row, bench, checksum).items()}
    return {seed: ScaleTable.load(path) for seed, path in paths.items() if path.is_file()}


def _absent(row: Row, bench: Bench, checksum: str, runs: dict[str, object]) -> list[str]:
    """Why a seed of a row has no table."""
    sentences = []
    for seed, key in _keys(row, bench, checksum).items():
        if table_path(bench, key).is_file():
            continue
        result = runs.get(key)
        if result is None:
            why = f"was not run with the budget {bench.budget.name}"
        elif isinstance(result, dict) and "failed" in result:
            why = f"failed ({result['failed']})"
        else:
            why = "was run, but its scale table is not in tables/"
        sentences.append(f"{row.label}, seed {seed}, of table {SEEDS_TABLE}: {why}.")
    return sentences
