"""What the runs of a table say: mean and spread over seeds, and whether the order of the rows is the paper's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from modelopt_tdq.lab.bench.budget import Budget
from modelopt_tdq.lab.bench.qat_run import QatRun
from modelopt_tdq.lab.bench.tables import Row, Table

__all__ = ["RowSummary", "rank_correlation", "summarize"]


@dataclass(frozen=True)
class RowSummary:
    """One row over its seeds.

    Attributes:
        label: Of the row.
        paper: FID there, lower is better; infinite where training failed, None where it has no such row.
        loss: Of each seed that was run: the test loss, infinite where training failed.
        sqnr_db: Mean over the steps, of each seed.
        worst_sqnr_db: The worst step, of each seed.
        psnr_db: Of the final images, of each seed.
        seconds: Wall time of all seeds together.
        seeds: Those that were run.
        wanted: Number of seeds that the table asks for.
    """

    label: str
    paper: float | None
    loss: tuple[float, ...]
    sqnr_db: tuple[float, ...]
    worst_sqnr_db: tuple[float, ...]
    psnr_db: tuple[float, ...]
    seconds: float
    seeds: tuple[int, ...]
    wanted: int

    @property
    def mean_loss(self) -> float:
        """NaN where nothing was run."""
        return math.fsum(self.loss) / len(self.loss) if self.loss else math.nan


def _numbers(results: Sequence[dict[str, Any]], name: str) -> tuple[float, ...]:
    return tuple(float(r[name]) for r in results if name in r)


def _loss(result: dict[str, Any]) -> float:
    loss = math.inf if "failed" in result else float(result["loss"])
    return math.inf if math.isnan(loss) else loss


def _row(row: Row, runs: dict[str, Any], model: str, budget: Budget) -> RowSummary:
    if row.run is None:
        keys = {0: QatRun(0, 0).key(model, budget)}
    else:
        keys = {seed: replace(row.run, seed=seed).key(model, budget) for seed in row.seeds}
    found = {seed: runs[key] for seed, key in keys.items() if key in runs}
    results = list(found.values())
    return RowSummary(
        row.label,
        row.paper,
        tuple(_loss(r) for r in results),
        _numbers(results, "sqnr_db"),
        _numbers(results, "worst_sqnr_db"),
        _numbers(results, "psnr_db"),
        math.fsum(r["wall_seconds"] for r in results),
        tuple(found),
        len(keys),
    )


def summarize(table: Table, runs: dict[str, Any], model: str, budget: Budget) -> list[RowSummary]:
    """The rows of ``table``, from finished runs.

    Args:
        table: Which rows.
        runs: By key, from :class:`modelopt_tdq.lab.bench.supplement.Store`.
        model: Checksum of the full-precision model.
        budget: Of the runs.
    """
    return [_row(row, runs, model, budget) for row in table.rows]


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]


def rank_correlation(rows: Sequence[RowSummary]) -> float | None:
    """Spearman's correlation between the paper's FID and our loss; None with fewer than three rows to compare."""
    pairs = [(r.paper, r.mean_loss) for r in rows if r.paper is not None and r.loss]
    if len(pairs) < 3:
        return None
    ours, theirs = _ranks([loss for _, loss in pairs]), _ranks([paper for paper, _ in pairs])
    middle = (len(pairs) + 1) / 2
    above = math.fsum((a - middle) * (b - middle) for a, b in zip(ours, theirs, strict=True))
    below = math.sqrt(math.fsum((a - middle) ** 2 for a in ours) * math.fsum((b - middle) ** 2 for b in theirs))
    return above / below if below else None
