"""``modelopt-tdq bench zoo``: what a class goes through, what is kept, and what is told of what fails."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.slow import slow_but
from typer.testing import CliRunner

import modelopt_tdq as tdq
from modelopt_tdq.cli.app import app
from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.report import UNUSED
from modelopt_tdq.lab.bench.zoo import command, deployment_stages, judge, model_stages
from modelopt_tdq.lab.bench.zoo.command import Bench, run_zoo
from modelopt_tdq.lab.bench.zoo.judge import judged
from modelopt_tdq.lab.bench.zoo.present import markdown
from modelopt_tdq.lab.bench.zoo.stage import Case, Cell
from modelopt_tdq.lab.bench.zoo.stages import STAGES, chosen_stages
from modelopt_tdq.lab.bench.zoo.work import run_stages
from modelopt_tdq.lab.zoo.catalogue import find_entry

pytest.importorskip("diffusers")
pytest.importorskip("onnxscript")
pytest.importorskip("openvino")

SMALL = "DreamLiteTransformer2DModel"

#: With temporal features.
PRIOR = "PriorTransformer"

#: Small ones of different build, and what they have that others do not.
DEPLOYED = (
    "DiTTransformer2DModel",  # labels
    "PixArtTransformer2DModel",  # cross attention
    "SanaTransformer2DModel",  # linear attention, gated convolutions
    "SD3Transformer2DModel",  # two streams
    "AuraFlowTransformer2DModel",  # registers
    "CogView3PlusTransformer2DModel",  # sizes as conditions
    "PRXTransformer2DModel",  # text beside the image as keys only
    "DreamLiteTransformer2DModel",  # a time of no dimension
    "FluxTransformer2DModel",  # guidance, one stream behind two
    "Ideogram4Transformer2DModel",  # several segments in a row of tokens
    "ErnieImageTransformer2DModel",  # tokens in front of samples
    "AllegroTransformer3DModel",  # video
    "CogVideoXTransformer3DModel",  # video and text in one row of tokens
    "LatteTransformer3DModel",  # frames folded into the batch
    "MiniMaxH3Transformer3DModel",
    "StableAudioDiTModel",  # fewer heads of keys than of queries
    "MiniMaxMusic3Transformer1DModel",
    "PriorTransformer",  # a causal mask
    "HunyuanDiT2DControlNetModel",  # several outputs
    "SD3ControlNetModel",
)


def case(name: str, folder: Path) -> Case:
    folder.mkdir(exist_ok=True)
    return Case(find_entry(name), folder)


def bench(folder: Path, *only: str, **options: Any) -> Bench:
    """In forks of this process, which has imported everything, and whose patches they have."""
    return Bench(folder, only, **{"start": "fork", **options})


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Case], Cell]], None]:
    """Another way for a stage to run."""

    def patch(name: str, run: Callable[[Case], Cell]) -> None:
        monkeypatch.setitem(STAGES, name, replace(STAGES[name], run=run))  # type: ignore[arg-type]

    return patch


#: Labels, time of no dimension, a causal mask, several outputs, video and text in one row of tokens.
QUICK = (
    "DiTTransformer2DModel",
    "DreamLiteTransformer2DModel",
    "PriorTransformer",
    "SD3ControlNetModel",
    "CogVideoXTransformer3DModel",
)


@pytest.mark.parametrize("name", slow_but(DEPLOYED, *QUICK))
def test_quantized_exported_and_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    """At ONNX Runtime's own optimizations, 10 dB below the quantization noise."""
    some = case(name, tmp_path)
    with torch.no_grad():
        some.exact = some.outputs(some.entry.build())
        some.quantized = model_stages.quantized(some, model_stages.config(some), some.forward_loop)
        some.expected = some.outputs(some.quantized)
    some.noise_db = judge.noise(some.exact, some.expected)
    table = tdq.scale_table(some.quantized)
    assert len(table) == 5
    assert not table.is_static.any()
    assert all(5 < db < 90 for db in some.noise_db.values())
    report = tdq.export_onnx(some.quantized, some.ratio, some.held_out)
    assert [reason for _, reason in report.skipped if reason != UNUSED] == []
    cell = judged(some, deployment_stages.run_onnxruntime(some, some.ratio), "onnxruntime")
    assert cell["verdict"] == "right", cell
    assert "by" not in cell  # no codes were needed


#: The last one takes as long as most others together.
ALL_STAGES = [list(STAGES), [name for name in STAGES if name != "temporal_export"]]


@pytest.mark.parametrize("stages", slow_but(ALL_STAGES, ALL_STAGES[1]), ids=len)
def test_all_stages_of_a_class_and_what_is_kept(
    stages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    text = run_zoo(bench(tmp_path, PRIOR, stages=stages))
    row = json.loads((tmp_path / "zoo.json").read_text())["runs"][PRIOR]
    cells = row["stages"]
    assert {stage: cell["verdict"] for stage, cell in cells.items()} == dict.fromkeys(stages, "right")
    assert cells["temporal"]["features"] > 0
    assert cells["temporal"]["by"] == "bit for bit"
    assert cells["tensorrt_rtx"]["low_precision"] == cells["tensorrt_rtx"]["layers"] == cells["quantize"]["quantized"]
    assert row["source"]["command"].startswith("modelopt-tdq bench zoo --again --only PriorTransformer --stages full,")
    assert (tmp_path / "zoo.md").read_text() == text + "\n"
    assert "1 of 100 classes run" in text
    assert text.count("| 1 of 1 |") == len(stages)

    ran: list[str] = []
    monkeypatch.setattr(command, "run_class", lambda name, *_: ran.append(name) or {"full": {"verdict": "right"}})
    run_zoo(bench(tmp_path, PRIOR))
    run_zoo(bench(tmp_path, stages=["full"], again=False), run=False)
    assert ran == []
    run_zoo(bench(tmp_path, PRIOR, stages=["full"], again=True))
    assert ran == [PRIOR]
    kept = json.loads((tmp_path / "zoo.json").read_text())["runs"][PRIOR]
    assert list(kept["stages"]) == stages  # what was not asked for stays
    monkeypatch.setattr(command, "installed_versions", lambda: {"torch": "another"})
    run_zoo(bench(tmp_path, PRIOR, stages=["full"]))
    assert ran == [PRIOR, PRIOR]


def test_a_stage_that_fails_keeps_what_was_found_before(tmp_path: Path, patched: Any) -> None:
    def refuses(case: Case) -> Cell:
        raise TdqError("model", "tiny", "it has no door", "Add one")

    def fails(case: Case) -> Cell:
        raise RuntimeError("no such luck")

    patched("export", refuses)
    patched("temporal", fails)
    text = run_zoo(bench(tmp_path, SMALL, stages=["restore", "temporal", "openvino"]))
    cells = json.loads((tmp_path / "zoo.json").read_text())["runs"][SMALL]["stages"]
    assert {stage: cell["verdict"] for stage, cell in cells.items()} == {
        "full": "right",
        "quantize": "right",
        "save": "right",
        "restore": "right",
        "temporal": "failed",
        "export": "refused",
        "openvino": "not run",
    }
    assert cells["export"]["reason"] == "model: it has no door"
    assert cells["temporal"]["reason"] == "RuntimeError: no such luck"
    assert cells["openvino"]["reason"] == "needs export"
    assert f"- **export**, refused, 1: {SMALL}. model: it has no door" in text
    assert "openvino**" not in text.split("## Misses")[1]


@pytest.mark.parametrize("way", ["killed", "late"])
def test_a_process_that_dies_or_hangs_keeps_what_was_found_before(way: str, tmp_path: Path, patched: Any) -> None:
    patched("quantize", lambda case: os.kill(os.getpid(), signal.SIGKILL) if way == "killed" else time.sleep(60))
    began = time.monotonic()
    run_zoo(bench(tmp_path, SMALL, stages=["restore"], limit=60.0 if way == "killed" else 2.0))
    assert time.monotonic() - began < 40
    cells = json.loads((tmp_path / "zoo.json").read_text())["runs"][SMALL]["stages"]
    assert [cell["verdict"] for cell in cells.values()] == ["right", "failed", "not run", "not run"]
    ended = "the process ended by SIGKILL" if way == "killed" else "over 2 s"
    assert cells["quantize"]["reason"] == ended
    assert cells["save"]["reason"] == f"quantize: {ended}"


def test_a_restored_model_that_gives_something_else_is_told(tmp_path: Path) -> None:
    small = case(SMALL, tmp_path)
    run_stages(small, ["full", "quantize", "save"])
    assert model_stages.restore(small)["verdict"] == "right"
    outputs = torch.load(small.saved_outputs)
    outputs["output"][0, 0, 0, 0] *= 1 + 1e-6
    torch.save(outputs, small.saved_outputs)
    cell = model_stages.restore(small)
    assert cell["verdict"] == "wrong"
    assert cell["reason"].startswith("output output differs")


def test_an_output_is_judged_by_the_noise_and_then_by_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantization noise 20 dB below the signal.

    ONNX Runtime is right at 90 dB, and below only if the codes are; OpenVINO at 30 dB, and below if it is as near.
    """
    exact = {"output": torch.ones(1000)}
    some = replace(case(SMALL, tmp_path), expected=exact, noise_db={"output": 20.0})

    def found(db: float, **backend: Any) -> Cell:
        arrays = {"output": (exact["output"] + 10 ** (-db / 20)).numpy()}
        return judged(some, arrays, backend.get("backend", "onnxruntime"))

    wrong = {"verdict": "wrong", "reason": "codes of torch at conv_in differ"}
    monkeypatch.setattr(judge, "_codes", lambda case: wrong)
    assert found(90.1)["verdict"] == "right"
    assert "by" not in found(90.1)
    assert found(89.9)["verdict"] == "wrong"
    assert found(89.9)["reason"].endswith("codes of torch at conv_in differ")
    assert found(30.1, backend="openvino")["verdict"] == "right"
    assert found(29.9, backend="openvino")["verdict"] == "wrong"
    some.codes = None
    monkeypatch.setattr(judge, "_codes", lambda case: {"verdict": "right", "by": "codes: rounding moved 1 of 9"})
    assert found(25.0)["by"] == "codes: rounding moved 1 of 9"
    assert found(24.0, backend="openvino")["verdict"] == "right"
    assert found(15.0, backend="openvino")["verdict"] == "wrong"
    assert judged(some, {"other": exact["output"].numpy()}, "openvino")["verdict"] == "wrong"
    assert judged(some, {"output": exact["output"][:9].numpy()}, "openvino")["reason"].endswith("not (1000,)")


def test_scales_that_do_worse_than_static_ones_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def four_bits(case: Case) -> dict[str, Any]:
        return tdq.make_config(
            8, 4, protect_steps=False, statistic="max", weights="max", correction="none", progress=False
        )

    small = case(SMALL, tmp_path)
    model_stages.full(small)
    quantized = model_stages.quantized

    def worse(case: Case, config: dict[str, Any], forward_loop: Any) -> Any:
        return quantized(case, config if config["algorithm"] == "max" else four_bits(case), forward_loop)

    monkeypatch.setattr(model_stages, "quantized", worse)
    cell = model_stages.quantize(small)
    assert cell["verdict"] == "wrong"
    assert "static scales" in cell["reason"]


def test_stages_bring_those_that_they_need() -> None:
    assert [s.name for s in chosen_stages(["openvino"])] == ["full", "quantize", "export", "openvino"]
    assert [s.name for s in chosen_stages([])] == [name for name in STAGES if name != "temporal_export"]


def test_causes_that_differ_in_names_and_numbers_only_stand_together() -> None:
    def row(reason: str) -> dict[str, Any]:
        cells = {"export": {"verdict": "refused", "reason": reason}}
        return {"stages": cells, "seconds": 1.0, "source": {"command": "", "date": "", "machine": "", "versions": {}}}

    rows = {"A": row("operator 'aten.sort' at 3 | 4"), "B": row("operator 'aten.qr' at 5 | 6"), "C": row("other")}
    misses = markdown({**rows, "D": None}).split("## Misses")[1]
    assert "refused, 2: A, B. operator 'aten.sort' at 3 \\| 4" in misses
    assert "refused, 1: C." in misses


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(TdqError, match="no such stage"):
        bench(tmp_path, stages=["kernels"])
    with pytest.raises(TdqError, match="no such class"):
        bench(tmp_path, "UNet9DModel")
    with pytest.raises(TdqError, match="not positive"):
        bench(tmp_path, limit=0)
    said = CliRunner().invoke(app, ["bench", "zoo", "--only", SMALL, "--no-run", "--output", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "0 of 100 classes run" in said.output
