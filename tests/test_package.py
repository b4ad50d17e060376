"""What pip would install: every module of the package, what the README's commands need, and what importing needs."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def _sources(folder: str) -> set[str]:
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_a_wheel_holds_the_whole_package_and_the_bundled_model() -> None:
    built = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert _sources("modelopt_tdq") <= built
    model = "trt_examples/ddim_cifar10/model/"
    assert {f"modelopt_tdq/lab/demo/model/{file.removeprefix(model)}" for file in _sources(model)} <= built


@pytest.mark.parametrize("what", ["modelopt_tdq", "tests", "trt_examples"])
def test_an_sdist_holds_what_the_commands_of_the_readme_need(what: str) -> None:
    built = {file.distribution_path.partition("/")[2] for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    built |= {file.relative_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    assert _sources(what) <= built
    assert {"README.md", "constraints.txt", "docs/works_with.md"} <= built


def test_what_modelopt_imports_without_requiring_it_is_required_here() -> None:
    always = {Requirement(text).name.replace("_", "-") for text in WheelBuilder(str(ROOT)).metadata.core.dependencies}
    assert {"requests", "huggingface-hub"} <= always
    theirs = {
        Requirement(text).name for text in importlib.metadata.requires("nvidia-modelopt") or [] if ";" not in text
    }
    assert not {"requests", "huggingface-hub"} & theirs  # else leave them to it
