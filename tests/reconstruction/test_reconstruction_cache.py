"""The bound on memory, chunks, and going on after an interruption."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import reconstructed as run
from support.models import TinyDenoiser, calls
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.reconstruction import cache, reconstruct

#: Bytes of one sample of each block of TinyDenoiser: 8 channels of 8 x 8 in, the same out, in float32.
SAMPLE = 2 * 8 * 8 * 8 * 4


def reconstructed(*args: Any, **fields: Any) -> nn.Module:
    return run(*args, **{"iterations": 60, **fields})


def _same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def _watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of all recorded tensors that are alive, each time that some are made."""
    alive: list[weakref.ref[Tensor]] = []
    sizes: list[int] = []

    class Watched(cache.Chunk):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.extend(weakref.ref(t) for t in self.inputs + self.full + self.targets)
            found = {t.data_ptr(): t for ref in alive if (t := ref()) is not None}
            sizes.append(sum(t.numel() * t.element_size() for t in found.values()))

    monkeypatch.setattr(cache, "Chunk", Watched)
    return sizes


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("qdrop", [0.0, 0.5])
def test_memory_stays_within_its_bound(
    qdrop: float, on_disk: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    each = SAMPLE if qdrop == 0 else 3 * SAMPLE // 2
    sizes = _watch(monkeypatch)
    folder = str(tmp_path / "cache") if on_disk else None
    fields: dict[str, Any] = {"batch_size": 4, "iterations": 80, "qdrop": qdrop, "cache_dir": folder}
    reconstructed(memory_limit=10 * each, **fields)
    assert max(sizes) <= 10 * each
    assert max(sizes) > 7 * each
    sizes.clear()
    reconstructed(**{**fields, "cache_dir": None})
    assert max(sizes) == 20 * each  # all 16 samples and a batch


def test_chunks_from_disk_give_what_chunks_recorded_again_give(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"batch_size": 4, "iterations": 50, "memory_limit": 10 * SAMPLE}
    recorded = reconstructed(**fields)
    read = reconstructed(**fields, cache_dir=str(tmp_path))
    assert _same(recorded, read)
    assert not list(tmp_path.rglob("chunk-*"))  # each block cleans up behind itself
    assert len(list(tmp_path.glob("block-000?.safetensors"))) == 3
    assert not _same(recorded, reconstructed(**{**fields, "memory_limit": 1 << 30}))


def _interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path, **fields: Any) -> None:
    """A run that is stopped in the middle of its second block."""
    learn, calls = reconstruct.learn, []

    def stopping(*args: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            ticks = iter(range(5))

            def tick() -> None:
                if next(ticks) == 4:
                    raise KeyboardInterrupt

            learn(*args[:-1], tick)
        learn(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruct, "learn", stopping)
        with pytest.raises(KeyboardInterrupt):
            reconstructed(cache_dir=str(folder), **fields)
    assert len(list(folder.glob("block-000?.safetensors"))) == 1


@pytest.mark.parametrize("fields", [{"intervals": "mlp"}, {"scheme": "duq"}, {"memory_limit": 16 * SAMPLE}])
def test_resumed_is_uninterrupted(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = reconstructed(**fields)
    _interrupted(monkeypatch, tmp_path, **fields)
    found = []
    learn = reconstruct.learn
    with monkeypatch.context() as patch:
        patch.setattr(reconstruct, "learn", lambda *args: (found.append(args[0].name), learn(*args)))
        resumed = reconstructed(cache_dir=str(tmp_path), **fields)
    assert found == ["mix", "conv2"]
    assert _same(resumed, expected)
    reports = [tdq.reconstruction_report(model) for model in (resumed, expected)]
    assert reports[0] == reports[1]
    assert _same(reconstructed(cache_dir=str(tmp_path), **fields), expected)  # nothing is left to do


@pytest.mark.parametrize(
    ("field", "value"), [("iterations", 61), ("samples", 12), ("intervals", "static"), ("qdrop", 0.1), ("seed", 1)]
)
def test_another_config_is_refused(field: str, value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _interrupted(monkeypatch, tmp_path)
    with pytest.raises(TdqError, match=f"{field} = .*was started with") as error:
        reconstructed(cache_dir=str(tmp_path), **{field: value})
    assert error.value.field == field


def test_another_model_or_other_data_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _interrupted(monkeypatch, tmp_path)
    other = TinyDenoiser().eval()
    with torch.no_grad():
        other.conv1.weight.mul_(1.01)
    with pytest.raises(TdqError, match="other weights"):
        reconstructed(other, cache_dir=str(tmp_path))
    with pytest.raises(TdqError, match="calibrates other scales"):
        reconstructed(data=calls(4, 4, seed=9), cache_dir=str(tmp_path))


@pytest.mark.parametrize("damage", ["bytes", "json", "missing", "schema", "kind"])
def test_damaged_files_are_refused(damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _interrupted(monkeypatch, tmp_path)
    data, sidecar = tmp_path / "block-0000.safetensors", tmp_path / "block-0000.json"
    if damage == "bytes":
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)
    elif damage == "json":
        sidecar.write_text(sidecar.read_text()[:-20])
    elif damage == "missing":
        (tmp_path / "run.json").write_text("{}")
    else:
        changes = {"schema": {"schema_version": 99}, "kind": {"kind": "something else"}}[damage]
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **changes}))
    with pytest.raises(TdqError, match=r"cache_dir|schema_version") as error:
        reconstructed(cache_dir=str(tmp_path))
    assert error.value.field in ("cache_dir", "schema_version")


def test_a_file_without_its_description_counts_as_unfinished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = reconstructed()
    _interrupted(monkeypatch, tmp_path)
    (tmp_path / "block-0000.json").unlink()
    assert _same(reconstructed(cache_dir=str(tmp_path)), expected)


def test_a_limit_that_two_batches_do_not_fit_into() -> None:
    with pytest.raises(TdqError, match=rf"Allow {2 * 8 * SAMPLE} bytes") as error:
        reconstructed(memory_limit=15 * SAMPLE)
    assert error.value.field == "memory_limit"
    reconstructed(memory_limit=16 * SAMPLE, iterations=10)
