from pathlib import Path

import pytest
from rich.console import Console
from small_results import results, row

from modelopt_tdq.lab.report.table import COLUMNS, results_table, row_cells, size_text

ENGINE = {"kernels": 170}
TIMES = {"milliseconds": 12.34, "speedup_over_fp32": 2.1, "time_over_static": 1.04}


def test_cells_follow_the_headings() -> None:
    cells = dict(zip([heading for heading, _ in COLUMNS], row_cells(row(engine=ENGINE, openvino=TIMES)), strict=True))
    assert cells["SQNR mean dB"] == "35.5"
    assert cells["kernels"] == "170"
    assert cells["table"] == "200 B"
    assert (cells["call ms"], cells["speed / FP32"], cells["time / static"]) == ("12.3", "2.10", "-")


def test_only_scales_over_time_are_held_against_static() -> None:
    assert row_cells(row(variant="tdq", openvino=TIMES))[5:8] == ("1.04", "2.10", "12.3")
    assert row_cells(row(recipe="fp32", variant="fp32", openvino=TIMES))[5:8] == ("-", "-", "12.3")


def test_what_was_not_measured_is_a_dash() -> None:
    assert row_cells(row(recipe="w4a4", label="W4A4"))[5:9] == ("-", "-", "-", "-")


def test_terminal_table_fits_80_columns(tmp_path: Path) -> None:
    content = results(tmp_path)
    for each in content["rows"]:
        each |= {"engine": ENGINE, "openvino": TIMES | {"milliseconds": 1234.5}}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(content))
    text = console.export_text()
    assert "…" not in text
    assert "inf" in text
    assert text.count("W8A8") == 1  # the label of a group is shown once


@pytest.mark.parametrize(("size", "text"), [(200, "200 B"), (4080, "4.1 kB"), (999, "999 B"), (605_000, "605 kB")])
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
