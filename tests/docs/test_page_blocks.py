"""The Python blocks of the README and of the pages run as they stand, in their order, a page in one namespace.

Blocks that need no more than a denoiser have the bundled one; ``pipe`` and ``prompts`` are a tiny Stable Diffusion, as
text needs. Marks in a page: ``<!-- test: fresh -->`` starts anew with its names.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import render
import torch

import modelopt_tdq as tdq
from modelopt_tdq.lab.reference_models import reference_model
from modelopt_tdq.lab.trajectories import noise, sample

pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"(<!-- test: fresh -->\n)?^ *```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)

#: Blocks that cannot run on a machine without a GPU, told by a name in them; their names are checked all the same.
NOT_RUN = ("TensorRTSession",)


def pages() -> dict[str, list[list[str]]]:
    """Page to its runs of blocks."""
    texts = {"README": render.readme(), **{p.stem: render.page(p.stem) for p in sorted(DOCS.glob("*.md"))}}
    found: dict[str, list[list[str]]] = {}
    for name, text in texts.items():
        for match in _BLOCK.finditer(text):
            runs = found.setdefault(name, [[]])
            if match[1]:
                runs.append([])
            runs[-1].append(match[2])
    return found


PAGES = pages()


#: What makes the blocks quick: algorithms in their shortest form, where a page does not say another.
QUICK = {"weights": "max", "protect_steps": False, "progress": False, "correction": "none"}
MORE = {"tdq_temporal": {"iterations": 5}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_config = tdq.make_config

    def short(weight_bits: int = 8, activation_bits: int = 8, method: str = "tdq", **fields: Any) -> dict[str, Any]:
        known = QUICK if method != "tdq_qat" else {k: v for k, v in QUICK.items() if k != "correction"}
        return make_config(weight_bits, activation_bits, method=method, **{**known, **MORE.get(method, {}), **fields})

    monkeypatch.setattr(tdq, "make_config", short)
    monkeypatch.setattr(tdq, "TDQ_CONFIG", short())


def _denoiser() -> torch.nn.Module:
    return reference_model("unet").load_model()


def _forward_loop(steps: int = 3) -> Callable[[torch.nn.Module], Any]:
    scheduler = reference_model("unet").load_scheduler()
    return lambda model: sample(model, scheduler, noise(1, (3, 32, 32), seed=0), steps)


def _pipeline() -> Any:
    """A tiny Stable Diffusion that knows a text by its length."""
    from trt_examples import tiny
    from trt_examples.stable_diffusion.stable_diffusion import FAMILY

    pipe = FAMILY.tiny()

    def encode(prompt: str, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        known = [tiny.text(len(text))["prompt_embeds"] for text in texts]
        return torch.cat(known), torch.cat([torch.zeros_like(text) for text in known])

    class Quick(type(pipe)):  # type: ignore[misc]
        @functools.wraps(type(pipe).__call__)
        def __call__(self, *args: Any, num_inference_steps: int = 50, **kwargs: Any) -> Any:
            return super().__call__(*args, num_inference_steps=min(num_inference_steps, 3), **kwargs)

    Quick.__name__ = type(pipe).__name__
    pipe.__class__ = Quick
    pipe.encode_prompt = encode
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _quantized_pipeline() -> Any:
    pipe = _pipeline()
    tdq.quantize_pipeline(pipe, tdq.make_config(8, 8), ["a cat"], steps=3, progress=False)
    return pipe


def _calls(pipe: Any) -> list[dict[str, Any]]:
    return list(tdq.trajectory_inputs(pipe, prompt="a cat", num_inference_steps=3))


def _pipeline_names() -> dict[str, Any]:
    pipe = _pipeline()
    calls = _calls(pipe)
    return {"pipe": pipe, "forward_loop": lambda model: [model(**call) for call in calls]}


def names_of(page: str, blocks: list[str]) -> dict[str, Any]:
    """What a page takes for granted: what its own text says that it is."""
    x, t = noise(2, (3, 32, 32), seed=3), torch.tensor([10.0, 900.0])
    given: dict[str, Any] = {"tdq": tdq, "mtq": mtq, "torch": torch, "F": torch.nn.functional}
    if page == "demo_diffusion" or (page == "README" and blocks[0].startswith("mtq.")):  # in a script that is there
        return {**given, **_pipeline_names()}
    if page in ("README", "quick_start"):
        return {}  # they stand for themselves
    if page == "your_model":
        return {**given, "pipe": _pipeline(), "prompts": ["a cat", "a house"]}
    if page == "deploy":
        pipe = _quantized_pipeline()
        tdq.export_onnx(pipe.unet, "unet.int8.onnx", tdq.sample_inputs(pipe, prompt="a cat"))
        tdq.export_onnx(pipe.unet, "unet.onnx", tdq.sample_inputs(pipe, prompt="a cat"))
        return {**given, "pipe": pipe, "calls": _calls(pipe)}
    return {
        **given,
        "unet": _denoiser(),
        "forward_loop": _forward_loop(),
        "x": x[:1],
        "t": t[0],
        "batches": [(x, t, torch.zeros_like(x))] * 2,
        "schedule_of_50_steps": torch.linspace(0, 980, 3),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, folder: Path) -> None:
    for blocks in PAGES[page]:
        names = names_of(page, blocks)
        for block in blocks:
            if not any(name in block for name in NOT_RUN):
                exec(compile(block, f"{page}: {block.splitlines()[0]}", "exec"), names)
        del names


def test_what_is_not_run_names_what_is_there() -> None:
    blocks = [
        block for runs in PAGES.values() for run in runs for block in run if any(name in block for name in NOT_RUN)
    ]
    assert len(blocks) == 1
    assert all(hasattr(tdq, name) for block in blocks for name in re.findall(r"tdq\.(\w+)", block))


def test_the_pages_are_read() -> None:
    assert {"README", "quick_start", "your_model", "low_bits", "temporal_features", "deploy"} <= set(PAGES)
    assert sum(len(run) for runs in PAGES.values() for run in runs) >= 9
