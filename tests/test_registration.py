"""What importing the package does to ModelOpt: a mode more in its registry, and nothing else."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from modelopt.torch.quantization.mode import CalibrateModeRegistry
from support.processes import run_fresh

import modelopt_tdq
from modelopt_tdq.modes import register

_ATTRIBUTES = """
import sys, types

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("modelopt", "torch", "diffusers") or name.startswith("torch._inductor"):
            continue
        if type(module) is not types.ModuleType:
            continue
        for key, value in list(vars(module).items()):
            if not name.startswith("modelopt") and not callable(value):
                continue  # torch counts and caches in its modules
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__ == name and name.startswith("modelopt"):
                found.update({(name, key, k): id(v) for k, v in vars(value).items()})
    return found

import diffusers, torch
import modelopt.torch.opt, modelopt.torch.quantization
from modelopt.torch.quantization.mode import CalibrateModeRegistry
from modelopt.torch.quantization.nn import QuantModuleRegistry
from modelopt.torch.quantization.nn.modules.tensor_quantizer import _QUANT_FUNCTIONAL_BACKENDS

assert "modelopt_tdq" not in sys.modules
before, modules = attributes(), set(sys.modules)
modes, backends = set(CalibrateModeRegistry._name2descriptor), dict(_QUANT_FUNCTIONAL_BACKENDS)
layers = dict(QuantModuleRegistry._registry)
import modelopt_tdq
after = attributes()
# but for the context that leaves PyTorch's functions exchanged after an error: see modelopt_tdq.model.exchanged
mended = "replace_function"
changed = [key for key, value in before.items() if after.get(key) != value and key[1] != mended]
from modelopt.torch.quantization.utils import core_utils
assert core_utils.replace_function.__module__ == "modelopt_tdq.model.exchanged"
# importing a submodule sets it as an attribute of its package; anything else that is new is ours
new = [
    key for key in set(after) - set(before)
    if key[0] in modules and ".".join(key[:2]) not in sys.modules and not key[1].startswith("__")
]
assert len(before) > 10_000, len(before)
assert not changed, changed
assert not [key for key in new if key[0].startswith("modelopt")], new
added = set(CalibrateModeRegistry._name2descriptor) - modes
ours = {f"{name}_calibrate" for name in ("tdq", "tdq_correct", "tdq_qat", "tdq_reconstruct", "tdq_temporal")}
assert {name.partition(" ")[0] for name in added} == ours, added
assert dict(_QUANT_FUNCTIONAL_BACKENDS) == backends
assert dict(QuantModuleRegistry._registry) == layers
print("unchanged")
"""


def test_nothing_of_modelopt_is_changed(tmp_path: Path) -> None:
    _, printed = run_fresh(_ATTRIBUTES, tmp_path)
    assert printed.strip().endswith("unchanged"), printed


def test_importing_and_registering_again_is_harmless() -> None:
    mode = CalibrateModeRegistry["tdq_calibrate"]
    register()
    register()
    importlib.reload(modelopt_tdq)
    assert CalibrateModeRegistry["tdq_calibrate"] is mode


@pytest.mark.parametrize("preset", [name for name in dir(modelopt_tdq) if name.startswith("TDQ_")])
def test_every_preset_is_a_config_of_modelopt(preset: str) -> None:
    from modelopt.torch.quantization.config import QuantizeConfig

    QuantizeConfig(**getattr(modelopt_tdq, preset))
