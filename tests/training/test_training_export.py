"""A trained model deploys: the codes of torch in both lowerings, for every scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.export import LOWERINGS, codes_by_definition, layer_results, lowered, trace
from support.models import SMALL_UNET
from support.slow import slow_but
from test_qat import adam
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.model.timestep import find_timestep
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

_TIME = 410.0


def _trained(scheme: str, intervals: str = "mlp") -> tuple[nn.Module, dict[str, Any]]:
    """A tiny UNet, W4A4, after a few steps of QAT."""
    family = SMALL_UNET
    torch.manual_seed(0)
    config = tdq.make_config(
        4, 4, method="tdq_qat", scheme=scheme, intervals=intervals, statistic="max", weights="max", progress=False
    )
    model = mtq.quantize(family.make(), config, family.forward_loop()).train()
    optimizer = adam(model)
    for step in range(3):
        arguments = family.inputs(2, torch.tensor([900.0, 20.0]), step)
        (model(**arguments).sample - 0.1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), family.inputs(2, torch.tensor(_TIME), 9)


@pytest.mark.parametrize("scheme", slow_but(("lsq", "pact", "nipq", "duq", "qil"), "lsq", "pact", "duq"))
def test_trained_schemes_export_with_the_codes_of_torch(scheme: str) -> None:
    model, inputs = _trained(scheme)
    table = tdq.scale_table(model)
    assert not bool(table.is_static.all())  # PACT learns nothing where nothing is clipped
    assert (table.dequant_scale is not None) == (scheme in ("duq", "qil"))
    graph = trace(model, inputs)
    for lowering in LOWERINGS:
        made = lowered(graph, lowering)
        assert made.context.skipped == {}
        compared, mismatched = codes_by_definition(made, model, inputs, _TIME)
        assert compared > 10_000
        assert mismatched == 0
        find_timestep(model).begin(torch.tensor([_TIME]))  # type: ignore[union-attr]
        for layer, (x, y) in layer_results(made, inputs).items():
            with torch.no_grad():
                expected = model.get_submodule(layer)(x)
            # the offset times the sum of the weights cancels in float32; one code more or less would be 1e-2
            assert float((y - expected).abs().max() / expected.abs().max()) < 1e-5, layer


def test_training_mode_does_not_leak_into_the_export(tmp_path: Path) -> None:
    """Exported from a model in training mode: the table, not the source with its dropout."""
    model, inputs = _trained("lsq")
    with torch.no_grad():
        expected = model(**inputs).sample
    tdq.export_onnx(model.train(), tmp_path / "m.onnx", inputs, lowering="reference")
    found = OnnxRuntimeSession(tmp_path / "m.onnx")({k: v.numpy() for k, v in inputs.items()})
    difference = torch.from_numpy(next(iter(found.values()))) - expected
    assert float(difference.square().mean() / expected.square().mean()) < 1e-3
