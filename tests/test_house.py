"""The order of building: every folder imports only those below it, and no circle of imports ties two files."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "modelopt_tdq"

#: From the ground up; single files count as folders.
ORDER = (
    "version",
    "install",
    "errors",
    "recipes",
    "core",
    "model",
    "high_precision",
    "config",
    "calibration",
    "intervals",
    "training",
    "reconstruction",
    "temporal_features",
    "layer_coverage",
    "modes",
    "registration",
    "analysis",
    "plugin",
    "export",
    "runtime",
    "compare",
    "pipeline",
    "lab",
    "cli",
)


@cache
def _imports() -> dict[str, set[str]]:
    """Module to the modules of the package that it imports, wherever in the file; without imports for types alone."""
    files = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in files}
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text())
        typing = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for inner in ast.walk(node)
        }
        imported = found.setdefault(name.removesuffix(".__init__"), set())
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or id(node) in typing:
                continue
            if not (node.module or "").startswith("modelopt_tdq."):
                continue
            source = node.module.removeprefix("modelopt_tdq.")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                imported.add(inner if inner in modules else source)
    return found


def _room(module: str) -> str:
    return module.partition(".")[0]


def test_each_folder_imports_only_those_below_it() -> None:
    level = {room: number for number, room in enumerate(ORDER)}
    rooms = {_room(module) for module in _imports()} - {"__init__", "__main__"}
    assert rooms == set(ORDER)
    upwards = [
        f"{module} imports {other}"
        for module, imported in _imports().items()
        if module not in ("__init__", "__main__")
        for other in imported
        if level[_room(other)] > level[_room(module)]
    ]
    assert not upwards


def test_no_circle_of_imports_ties_two_files() -> None:
    TopologicalSorter(_imports()).prepare()  # raises CycleError, which names the circle


def test_the_product_does_not_need_the_laboratory() -> None:
    users = {_room(module) for module, imported in _imports().items() if any(_room(o) == "lab" for o in imported)}
    assert users == {"lab", "cli"}


def test_folders_say_in_which_order_to_read_them() -> None:
    silent = [
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("__init__.py")
        if len(list(file.parent.glob("*.py"))) > 2
        and " first" not in (ast.get_docstring(ast.parse(file.read_text())) or "")
    ]
    assert not silent


_LIGHT = """
import sys
{statement}
heavy = {{"torch", "modelopt", "numpy", "transformers", "onnx"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_package_and_its_command_line_import_nothing_heavy() -> None:
    for statement in ("import modelopt_tdq", "import modelopt_tdq.cli"):
        done = subprocess.run(
            [sys.executable, "-c", _LIGHT.format(statement=statement)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


#: Each in a process of its own, forked from one that has imported what ModelOpt needs, and not ModelOpt.
_REGISTERED = """
import os, sys
import accelerate, diffusers, omegaconf, onnx, peft, pulp, transformers
import scipy.optimize, scipy.stats, torch._inductor.compile_fx
for script in {scripts!r}:
    assert not {{"modelopt", "modelopt_tdq"}} & set(sys.modules)
    process = os.fork()
    if not process:
        exec(script)
        from modelopt.torch.quantization.mode import CalibrateModeRegistry
        there = all(name in CalibrateModeRegistry for name in ("tdq_calibrate", "tdq_temporal_calibrate"))
        os._exit(0 if there else 1)
    assert os.waitpid(process, 0)[1] == 0, script
"""


def test_algorithms_are_registered_without_an_import_of_modelopt() -> None:
    """By a public name of this package, or one of its modules; ``test_registration.py`` imports ModelOpt first."""
    scripts = [
        "import modelopt_tdq; modelopt_tdq.make_config",
        "from modelopt_tdq.config import make_config",
    ]
    script = _REGISTERED.format(scripts=scripts)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
