"""What pip would install: every module of the package, what the README's commands need, and what importing needs."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def _sources(folder: str) -> set[str]:
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What a wheel holds, for a user and for an editable install."""
    folder = tmp_path_factory.mktemp("wheels")
    found = {}
    for version in ("standard", "editable"):
        (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder / version), versions=[version])
        found[version] = set(ZipFile(wheel).namelist())
    return found


def test_a_wheel_holds_the_whole_package_and_the_bundled_model(wheels: dict[str, set[str]]) -> None:
    assert _sources("modelopt_tdq") <= wheels["standard"]
    model = "trt_examples/ddim_cifar10/model/"
    bundled = {f"modelopt_tdq/lab/demo/model/{file.removeprefix(model)}" for file in _sources(model)}
    assert len(bundled) > 3
    assert bundled <= wheels["standard"]


def test_an_editable_install_leaves_no_hollow_package(wheels: dict[str, set[str]]) -> None:
    assert any(name.endswith(".pth") for name in wheels["editable"])
    assert not [name for name in wheels["editable"] if name.startswith("modelopt_tdq/")]


@pytest.mark.parametrize("what", ["modelopt_tdq", "tests", "trt_examples"])
def test_an_sdist_holds_what_the_commands_of_the_readme_need(what: str) -> None:
    built = {file.distribution_path.partition("/")[2] for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    built |= {file.relative_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    assert _sources(what) <= built
    assert {"README.md", "constraints.txt", "docs/works_with.md", ".ci/run", "hatch_build.py"} <= built


def test_what_modelopt_imports_without_requiring_it_is_required_here() -> None:
    always = {Requirement(text).name.replace("_", "-") for text in WheelBuilder(str(ROOT)).metadata.core.dependencies}
    assert {"requests", "huggingface-hub"} <= always
    theirs = {
        Requirement(text).name for text in importlib.metadata.requires("nvidia-modelopt") or [] if ";" not in text
    }
    assert not {"requests", "huggingface-hub"} & theirs  # else leave them to it
