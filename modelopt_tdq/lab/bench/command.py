"""``modelopt-tdq bench supplement``: runs the tables, and writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from modelopt_tdq.core.files import write_text
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.present import markdown, plot
from modelopt_tdq.lab.bench.summary import summarize
from modelopt_tdq.lab.bench.supplement import Bench, Store, run_table
from modelopt_tdq.lab.bench.tables import Table, qat_table
from modelopt_tdq.lab.provenance import provenance, provenance_line

__all__ = ["results_file", "run_supplement"]


def results_file(bench: Bench) -> Path:
    """All runs of one model and budget."""
    return bench.output / f"{bench.name}_{bench.budget.name}.json"


def _number(text: str) -> int:
    if not text.isdigit():
        raise TdqError("table", text, "not a number", "Use numbers of the supplementary's tables, such as 1,2,7")
    return int(text)


def run_supplement(bench: Bench, tables: Sequence[str], command: str, run: bool = True) -> Iterator[str]:
    """Run tables and write their results; yields each as Markdown.

    Args:
        bench: What all runs share.
        tables: Their numbers.
        command: To write beside the results.
        run: Run what is missing; False: write the tables of the runs that there are.

    Raises:
        TdqError: There is no such table, model or data.
    """
    chosen: list[Table] = [qat_table(_number(text)) for text in tables]
    store = Store(results_file(bench))
    for table in chosen:
        if run:
            run_table(bench, table, store)
        rows = summarize(table, store.runs, bench.checksum, bench.budget)
        budget = bench.budget
        name = bench.name
        notes = [
            "",
            f"Model {name} (weights {bench.checksum}), {budget.steps} steps of {budget.batch} images, learning rate "
            f"{budget.lr:g}, plain diffusion loss. Test loss: noise prediction on {budget.loss_images} test images at "
            f"fixed noises and times. SQNR: against full precision on {budget.judged_samples} of its trajectories of "
            f"{budget.judged_steps} steps. PSNR: images of the same seeds.",
            provenance_line(provenance(command)),
        ]
        stem = bench.output / f"{name}_{budget.name}_table{table.number}"
        text = markdown(table, rows, notes)
        bench.output.mkdir(parents=True, exist_ok=True)
        write_text(stem.with_suffix(".md"), text + "\n")
        plot(table, rows, f"{name}, {budget.name}", stem.with_suffix(".png"))
        yield text
