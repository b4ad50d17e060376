"""The tables of the TDQ supplementary: what the paper says, and the runs that measure the same here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.ptq_run import PtqRun
from modelopt_tdq.lab.bench.qat_run import QatRun

__all__ = ["QAT_TABLES", "Row", "Table", "qat_table"]


#: One training or reconstruction.
Run: TypeAlias = "QatRun | PtqRun"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        label: As printed.
        paper: FID in the paper (lower is better); None where it gives none, infinite where training failed.
        run: What to train; None: full precision.
        seeds: Trained once with each.
    """

    label: str
    paper: float | None
    run: Run | None
    seeds: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class Table:
    """A table of the supplementary.

    Attributes:
        number: There.
        title: What its rows differ in.
        paper_setting: The setting of the paper's numbers.
        rows: In the paper's order.
    """

    number: int
    title: str
    paper_setting: str
    rows: tuple[Row, ...]


def _run(bits: int = 4, **options: Any) -> QatRun:
    return QatRun(bits, bits, options=options)


FULL_PRECISION = Row("full precision", 3.56, None)
_STATIC, _TDQ = _run(intervals="static"), _run(intervals="mlp")


def _scheme(label: str, scheme: str, static: float, temporal: float) -> tuple[Row, Row]:
    return (
        Row(label, static, _run(scheme=scheme, intervals="static")),
        Row(f"{label} + TDQ", temporal, _run(scheme=scheme, intervals="mlp")),
    )


_SETTING = "CIFAR-10, DDIM, W4A4 QAT, FID"

QAT_TABLES = (
    Table(
        1,
        "static, dynamic and temporal intervals",
        _SETTING,
        (
            FULL_PRECISION,
            Row("LSQ, static", 7.3, _STATIC),
            Row("LSQ, static, scales at the full learning rate", None, replace(_STATIC, scale_lr=1.0)),
            Row("dynamic (a) largest magnitude", 6.21, _run(intervals="dynamic_absmax")),
            Row("dynamic (b) statistics", 5.49, _run(intervals="dynamic_statistics")),
            Row("dynamic (c) statistics and time", 4.96, _run(intervals="dynamic_statistics_time")),
            Row("TDQ", 4.48, _TDQ),
            Row("TDQ, thin", None, _run(intervals="thin")),
            Row("TDQ, a learned value per step", None, _run(intervals="table", bins="per_step")),
        ),
    ),
    Table(
        2,
        "encodings of time",
        _SETTING,
        (
            FULL_PRECISION,
            Row("raw", float("inf"), _run(intervals="mlp", encoding="raw")),
            Row("normalized", 5.03, _run(intervals="mlp", encoding="normalized")),
            Row("random Fourier", 4.76, _run(intervals="mlp", encoding="random_fourier")),
            Row("frequency", 4.48, _TDQ),
        ),
    ),
    Table(
        5,
        "other schemes",
        "CIFAR-10, DDIM, W4A4 QAT, 200 sampling steps, FID",
        (
            FULL_PRECISION,
            *_scheme("PACT", "pact", 51.92, 74.56),
            *_scheme("NIPQ", "nipq", 30.73, 24.27),
            *_scheme("DuQ", "duq", 7.88, 4.46),
            *_scheme("QIL", "qil", 9.85, 7.51),
        ),
    ),
    Table(
        6,
        "bit widths, three seeds",
        "CIFAR-10, DDIM, QAT, FID",
        (
            FULL_PRECISION,
            Row("W4A4 LSQ", 7.13, _STATIC, (0, 1, 2)),
            Row("W4A4 TDQ", 4.71, _TDQ, (0, 1, 2)),
            Row("W3A3 LSQ", 8.34, _run(3, intervals="static"), (0, 1, 2)),
            Row("W3A3 TDQ", 6.67, _run(3, intervals="mlp"), (0, 1, 2)),
        ),
    ),
    Table(
        7,
        "initialization of the interval MLP",
        _SETTING,
        (
            FULL_PRECISION,
            Row("He", 4.48, _TDQ),
            Row("Gaussian", float("inf"), _run(intervals="mlp", initialization="gaussian")),
            Row("zero", 4.98, _run(intervals="mlp", initialization="zero")),
            Row("Xavier", 4.90, _run(intervals="mlp", initialization="xavier")),
        ),
    ),
)


def _reconstructions(bits: int, samples: int, paper: Sequence[float | None]) -> Iterator[Row]:
    """Rows of one activation width and number of samples; the paper's FID of TDQ, thin, S1, S2, S4, S10, S20."""
    steps = (1, 2, 4, 10, 20)
    rows: list[tuple[str, dict[str, Any]]] = [
        ("TDQ", {"intervals": "mlp"}),
        ("thin", {"intervals": "thin"}),
        *((f"S{n}", {"intervals": "table" if n > 1 else "static", "bins": n}) for n in steps),
        ("optimal, at most 7", {"intervals": "table", "bins": "optimal", "max_bins": 7}),
    ]
    for (label, options), value in zip(rows, [*paper, None], strict=True):
        yield Row(f"W4A{bits}, {samples} samples, {label}", value, PtqRun(4, bits, samples, options=options), (0,))


_W4A8 = (44.88, 28.74, 76.36, float("inf"), 33.19, 37.63, 29.87)
_W4A6 = (120.53, 55.27, 158.07, 193.11, 185.19, 72.37, 47.39)
_UNKNOWN: tuple[None, ...] = (None,) * 7

#: The paper's numbers stand beside its own number of samples, 256.
PTQ_TABLE = Table(
    4,
    "PTQ reconstruction",
    "LSUN-Churches, 256 samples, 5 000 iterations, FID; S2 at W4A8: N/A",
    (
        FULL_PRECISION,
        *_reconstructions(8, 256, _W4A8),
        *_reconstructions(6, 256, _W4A6),
        *_reconstructions(8, 64, _UNKNOWN),
        *_reconstructions(6, 64, _UNKNOWN),
        *_reconstructions(8, 8, _UNKNOWN),
        *_reconstructions(6, 8, _UNKNOWN),
    ),
)


def qat_table(number: int) -> Table:
    """The table of that number.

    Raises:
        TdqError: There is none.
    """
    for table in QAT_TABLES:
        if table.number == number:
            return table
    if number == PTQ_TABLE.number:
        return PTQ_TABLE
    known = sorted([PTQ_TABLE.number, *(t.number for t in QAT_TABLES)])
    raise TdqError("table", number, "no such table", f"Use one of {known}")
