"""What an export says when torch's exporter fails: which operator, where, and whether quantization is to blame."""

from __future__ import annotations

from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.core import installed
from modelopt_tdq.export import trace
from modelopt_tdq.export.failure import failed_operator


class Zeta(nn.Module):
    """A layer with an operator that no ONNX has."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.special.zeta(x.abs() + 2.0, x.abs() + 1.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(8, 8), Zeta(), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.add(self.odd(self.first(sample)), 1.0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = tdq.make_config(high_precision=(), progress=False, protect_steps=False)
    times = (1.0, 5.0, 9.0)
    return mtq.quantize(Model().eval(), config, lambda m: [m(torch.randn(2, 8), torch.tensor([t])) for t in times])


def _failure(model: nn.Module, path: Path) -> TdqError:
    with pytest.raises(TdqError) as raised:
        tdq.export_onnx(model, path, {"sample": torch.randn(2, 8), "timestep": torch.tensor([5.0])})
    assert not path.exists()
    return raised.value


def test_the_operator_and_its_layer_are_named_and_full_precision_is_tried(model: nn.Module, tmp_path: Path) -> None:
    error = _failure(model, tmp_path / "m.onnx")
    assert "operator aten.special_zeta.default in 'odd'" in error.problem
    assert "nor can the model in full precision" in error.problem
    assert "quant_cfg" not in error.cure


def test_a_rule_is_advised_only_where_it_helps(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_plain_fails", lambda *of_the_export: False)
    error = _failure(model, tmp_path / "m.onnx")
    assert "{'quantizer_name': 'odd*', 'enable': False}" in error.cure


def test_versions_that_are_too_old_are_named(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed.installed_version
    monkeypatch.setattr(installed, "installed_version", lambda name: "0.0.1" if name == "onnxscript" else found(name))
    error = _failure(model, tmp_path / "m.onnx")
    assert "onnxscript 0.0.1 (it takes >=0.6)" in error.cure


def test_an_operator_is_not_mistaken_for_one_whose_name_holds_its_own() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(x, x, x) + torch.add(x, x)

    program = torch.export.export(Both(), (torch.randn(2, 2),))
    operator, _ = failed_operator(ValueError("OpOverload(op='aten.add', overload='Tensor')"), program)
    assert operator == "aten.add.Tensor"
    assert failed_operator(ValueError("something else"), program) == ("", "")
