"""Pages to check: a report and a comparison with every part that they can have. ``python pages.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "lab" / "report")]

from small_results import results, row

from modelopt_tdq.compare import CodesDifference, LayerResult, ModelComparison, OutputDifference, StepResult
from modelopt_tdq.lab.report.comparison import write_comparison
from modelopt_tdq.lab.report.html import write_html

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)

content = results(folder)
content["rows"][3] = row(variant="tdq", name="TDQ mse", sqnr_mean_db=39.5, psnr_db=33.0)
content["figures"] = [
    {**content["figures"][0], "section": section, "alt": f"What {section} shows."}
    for section in ("sqnr", "images", "scales", "details", "features")
]
content["features"] = {
    "int8": {"columns": ["feature", "channels", "chosen"], "rows": [["a", "8", "tib"]], "notes": ["b"]}
}
write_html(content, folder, folder / "report.html")

name = "down.conv1.input_quantizer"
steps = tuple(
    StepResult(backend, 0, 500.0, OutputDifference(found, 40.0, 0.1, 0.2))
    for backend, found in (("a", 60.0), ("b", 30.0))
)
layers = (LayerResult("b", 0, 500.0, name, CodesDifference(name, 50, 100, 2)),)
write_comparison(
    ModelComparison(steps, layers, {"a": 100, "b": 100}, (name,), ("a note",)), folder / "failed.html", "int8", "noise"
)
write_comparison(ModelComparison(steps[:1], (), {}), folder / "passed.html", "int8")
