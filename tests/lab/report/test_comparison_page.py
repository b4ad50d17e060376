from pathlib import Path

import pytest

import modelopt_tdq as tdq
from modelopt_tdq.compare import CodesDifference, LayerResult, ModelComparison, OutputDifference, StepResult

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from modelopt_tdq.lab.report.comparison import write_comparison

NAMES = ("down.conv1.input_quantizer", "up.conv2.input_quantizer")


def comparison(*layers: LayerResult) -> ModelComparison:
    good, bad = OutputDifference(60.0, 40.0, 0.1, 0.2), OutputDifference(30.0, 40.0, 0.3, 0.2)
    steps = [StepResult("torch", step, time, good) for step, time in enumerate((0.0, 500.0, 900.0))]
    steps.append(StepResult("openvino", 0, 0.0, bad))
    return ModelComparison(tuple(steps), layers, {"torch": 300}, NAMES, ("a <note>",))


def test_page(tmp_path: Path) -> None:
    flip = LayerResult("torch", 0, 0.0, NAMES[0], CodesDifference(NAMES[0], 1, 100, 1))
    fault = LayerResult("torch", 2, 900.0, NAMES[1], CodesDifference(NAMES[1], 50, 100, 2))
    output = LayerResult("torch", 2, 900.0, "output", OutputDifference(30.0, 100.0, 0.3, 1e-5, "rounding"))
    page = write_comparison(
        comparison(flip, fault, output), tmp_path / "new" / "page.html", "a <model>", "noise"
    ).read_text()
    assert page.count('src="data:image/svg+xml;base64,') == 1
    assert '<th scope="row" class="long">up.conv2.input_quantizer</th><td>900</td>' in page
    assert page.count("<table") == page.count("<thead>") == 3
    assert "Fed with noise." in page
    assert 'content="width=device-width' in page
    assert "a &lt;model&gt;: <span" in page
    assert "a &lt;note&gt;" in page
    assert "FAILED" in page
    assert f"First faulty layer: {NAMES[1]}" in page
    assert "http" not in page.replace("http-equiv", "")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_comparison_without_layers_and_without_faults(tmp_path: Path) -> None:
    steps = (StepResult("torch", 0, 0.0, OutputDifference(float("inf"), 40.0, 0.0, 0.2)),)
    page = write_comparison(ModelComparison(steps, (), {}), tmp_path / "page.html").read_text()
    assert "passed" in page
    assert "First faulty" not in page
    with pytest.raises(tdq.TdqError, match="it is a folder"):
        write_comparison(ModelComparison(steps, (), {}), tmp_path)
