"""The bound on memory, chunks, and going on after an interruption."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from small_runs import FAST
from small_runs import reconstructed as run
from support.models import TinyDenoiser, calls, fast_config, loop
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.core.files import read_arrays, write_arrays
from modelopt_tdq.high_precision import HIGH_PRECISION
from modelopt_tdq.model.batch_axis import BatchAxis
from modelopt_tdq.reconstruction import cache, fingerprint, reconstruct
from modelopt_tdq.reconstruction.samples import Samples

#: Bytes of one sample of each block of TinyDenoiser: 8 channels of 8 x 8 in, the same out, in float32.
SAMPLE = 2 * 8 * 8 * 8 * 4


def reconstructed(*args: Any, **fields: Any) -> nn.Module:
    return run(*args, **{"iterations": 24, **fields})


def _same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


#: Other ways to the bound: without the inputs in full precision, and with chunks that are recorded again.
FURTHER = [(0.0, False), (0.0, True), (0.5, False)]


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


@pytest.mark.parametrize(
    ("qdrop", "on_disk"), [(0.5, True), *(pytest.param(*each, marks=pytest.mark.slow) for each in FURTHER)]
)
def test_memory_stays_within_its_bound(
    qdrop: float, on_disk: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    each = SAMPLE if qdrop == 0 else 3 * SAMPLE // 2
    sizes = _watch(monkeypatch)
    folder = str(tmp_path / "cache") if on_disk else None
    fields: dict[str, Any] = {"batch_size": 4, "iterations": 20, "qdrop": qdrop, "cache_dir": folder}
    reconstructed(memory_limit=10 * each, **fields)
    assert max(sizes) <= 10 * each
    assert max(sizes) > 7 * each
    sizes.clear()
    reconstructed(**{**fields, "cache_dir": None})
    assert max(sizes) == 20 * each  # all 16 samples and a batch


def test_chunks_from_disk_give_what_chunks_recorded_again_give(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"batch_size": 4, "iterations": 24, "memory_limit": 10 * SAMPLE}
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
    ("field", "value"), [("iterations", 25), ("samples", 12), ("intervals", "static"), ("qdrop", 0.1), ("seed", 1)]
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


def _started(folder: Path, **fields: Any) -> nn.Module:
    """A finished run."""
    return reconstructed(cache_dir=str(folder), iterations=5, **fields)


def _refused(folder: Path, field: str, match: str, model: nn.Module | None = None, **fields: Any) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TdqError, match=match) as error:
        reconstructed(model, cache_dir=str(folder), iterations=5, **fields)
    assert error.value.field == field
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("fields", "quantizer", "told"),
    [
        ({"weight_bits": 4}, "conv1.weight_quantizer", "num_bits 3, axis 0"),
        ({"activation_bits": 8}, "conv1.input_quantizer", "num_bits 6"),
        ({"high_precision": (*HIGH_PRECISION, "mix*")}, "mix.input_quantizer", "num_bits 6"),
    ],
)
def test_other_formats_are_refused(fields: dict[str, Any], quantizer: str, told: str, tmp_path: Path) -> None:
    _started(tmp_path)
    _refused(tmp_path, "quant_cfg", f"{quantizer}: .*was started with '{told}", **fields)


@pytest.mark.parametrize(
    "cfg",
    [
        {"num_bits": 3, "axis": None},
        {"num_bits": 3, "narrow_range": True},
    ],
    ids=["axis", "narrow"],
)
def test_another_property_of_one_quantizer_is_refused(cfg: dict[str, Any], tmp_path: Path) -> None:
    _started(tmp_path)
    config = fast_config(**{**FAST, "iterations": 5, "cache_dir": str(tmp_path)})
    config["quant_cfg"] = [*config["quant_cfg"], {"quantizer_name": "mix.weight_quantizer", "cfg": cfg}]
    torch.manual_seed(0)
    with pytest.raises(TdqError, match=r"mix\.weight_quantizer") as error:
        mtq.quantize(TinyDenoiser().eval(), config, loop(calls(4, 4)))
    assert error.value.field == "quant_cfg"


def test_scales_of_weights_that_came_from_elsewhere_are_refused(tmp_path: Path) -> None:
    """Kept weight scales, of another algorithm, with the same formats."""
    for algorithm in ({"method": "max"}, {"method": "mse", "start_multiplier": 0.3, "stop_multiplier": 0.6}):
        torch.manual_seed(0)
        config = fast_config(**{**FAST, "iterations": 5, "cache_dir": str(tmp_path), "weights": "keep"})
        model = mtq.quantize(TinyDenoiser().eval(), {**config, "algorithm": algorithm}, loop(calls(4, 4)))
        if algorithm["method"] == "max":
            mtq.calibrate(model, config["algorithm"], loop(calls(4, 4)))
            continue
        with pytest.raises(TdqError, match=r"weight_quantizer: num_bits 3.* was started with"):
            mtq.calibrate(model, config["algorithm"], loop(calls(4, 4)))


def test_other_samples_of_the_same_scales_are_refused(tmp_path: Path) -> None:
    """Mirrored images: the same ranges, the same times, other data."""
    _started(tmp_path)
    mirrored = [(x.flip(3), t) for x, t in calls(4, 4)]
    found: list[str] = []
    try:
        _started(tmp_path, data=mirrored)
    except TdqError as error:
        found.append(error.problem)
    assert found[0].startswith(("it records other samples", "it calibrates other scales"))
    rounded = [(x * (1 + 1e-6), t) for x, t in calls(4, 4)]
    _started(tmp_path, data=rounded)  # as another device might give


def test_sketches_of_other_samples_differ_and_of_rounded_ones_do_not() -> None:
    model = reconstructed(iterations=1)
    samples = [{"sample": torch.randn(1, 3, 8, 8), "timestep": torch.tensor([t])} for t in (20.0, 900.0)]
    axis = BatchAxis("timestep", frozenset(["sample", "timestep"]), frozenset())
    made = [
        fingerprint.computed(model, torch.ones(1, 2), Samples(calls, torch.tensor([20.0, 900.0]), axis))
        for calls in (
            samples,
            [{**call, "sample": call["sample"] * (1 + 1e-6)} for call in samples],
            [{**call, "sample": call["sample"].flip(2)} for call in samples],
        )
    ]
    assert fingerprint.difference(made[0], made[1]) is None
    assert fingerprint.difference(made[0], made[2]) == "samples"


def test_the_scales_of_all_other_quantizers_count() -> None:
    """Those of weights, which an algorithm before this one may have set."""
    model: Any = reconstructed(iterations=1)
    axis, times = BatchAxis("timestep", frozenset(["sample", "timestep"]), frozenset()), torch.tensor([20.0])
    samples = Samples([{"sample": torch.ones(1, 3, 8, 8), "timestep": times}], times, axis)
    scale = model.conv1.weight_quantizer._amax
    found = []
    for factor in (1.0, 1.0 + 1e-6, 1.05):
        model.conv1.weight_quantizer._amax = scale * factor
        found.append(fingerprint.computed(model, torch.ones(1, 2), samples))
    assert fingerprint.difference(found[0], found[1]) is None
    assert fingerprint.difference(found[0], found[2]) == "quantizer/conv1.weight_quantizer._amax"


@dataclass
class _Condition:
    image: Tensor


class _Conditional(TinyDenoiser):
    """Takes conditions that change nothing."""

    def forward(self, sample: Tensor, timestep: Tensor, conditions: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(sample, timestep)


@pytest.mark.parametrize(
    "nested",
    [lambda x: {"images": [x]}, lambda x: (_Condition(x),), lambda x: x],
    ids=["mapping", "dataclass", "tensor"],
)
def test_sketches_are_of_the_tensors_in_any_nesting(nested: Any) -> None:
    model = reconstructed(_Conditional().eval(), iterations=1)
    axis = BatchAxis("timestep", frozenset(["sample", "timestep"]), frozenset())
    times = torch.tensor([20.0])

    def computed(image: Tensor) -> dict[str, Tensor]:
        call = {"sample": torch.ones(1, 3, 8, 8), "timestep": times, "conditions": nested(image)}
        return fingerprint.computed(model, torch.ones(1, 2), Samples([call], times, axis))

    first = computed(torch.arange(4.0))
    assert fingerprint.difference(first, computed(torch.arange(4.0))) is None
    assert fingerprint.difference(first, computed(torch.arange(4.0).flip(0))) == "samples"


class _Gained(TinyDenoiser):
    """With a number that is no parameter, no buffer and no setting of a layer."""

    gain = 1.0

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(sample, timestep, context) * self.gain


def test_a_model_with_the_same_weights_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Gained().eval()
    other = copy.deepcopy(model)
    other.gain = 1.5
    reconstructed(model, cache_dir=str(tmp_path), iterations=5)
    _refused(tmp_path, "model", "predicts something else", other)


def test_other_buffers_and_settings_of_layers_are_refused(tmp_path: Path) -> None:
    class Buffered(TinyDenoiser):
        def __init__(self, value: float, padding: str = "zeros") -> None:
            super().__init__()
            self.register_buffer("level", torch.tensor(value))
            self.conv2.padding_mode = padding

    def model(*args: Any) -> nn.Module:
        torch.manual_seed(0)
        return Buffered(*args).eval()

    reconstructed(model(1.0), cache_dir=str(tmp_path), iterations=5)
    _refused(tmp_path, "model", "other weights", model(2.0))
    _refused(tmp_path, "model", "other layers", model(1.0, "circular"))


@pytest.mark.parametrize("package", ["algorithm", "torch", "nvidia-modelopt"])
def test_a_run_of_another_version_is_refused(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = fingerprint._versions()
    if package == "algorithm":
        monkeypatch.setattr(fingerprint, "_ALGORITHM", 1)
    else:
        monkeypatch.setattr(fingerprint, "_versions", lambda: {**versions, package: "0.0.1"})
    _started(tmp_path)
    monkeypatch.undo()
    _refused(tmp_path, "cache_dir", f"{package}: .*was started with")


def _rewrite(path: Path, **changes: Any) -> None:
    """The same file with another description, its checksum right."""
    arrays, description = read_arrays(path, "reconstruction", "file", 99)
    fields = {**description, **changes}
    kind, version = str(fields.pop("kind")).rpartition(".")[2], fields.pop("schema_version")
    write_arrays(path, kind, version, arrays, fields)


@pytest.mark.parametrize("damage", ["bytes", "cut", "schema", "kind"])
def test_damaged_files_are_refused(damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _interrupted(monkeypatch, tmp_path)
    file = tmp_path / "block-0000.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "bytes":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-20])
    else:
        _rewrite(file, **{"schema": {"schema_version": 99}, "kind": {"kind": "modelopt_tdq.other"}}[damage])
    with pytest.raises(TdqError, match=r"cache_dir|schema_version") as error:
        reconstructed(cache_dir=str(tmp_path))
    assert error.value.field in ("cache_dir", "schema_version")


def test_a_run_of_an_earlier_schema_is_refused(tmp_path: Path) -> None:
    """Whose description holds less than is compared today."""
    _started(tmp_path)
    _, description = read_arrays(tmp_path / "run", "reconstruction", "file", 99)
    arrays = {"calibrated": torch.ones(1, 1), "times": torch.ones(1)}
    write_arrays(tmp_path / "run", "reconstruction", 1, arrays, {"config": description["config"], "weights": "0"})
    with pytest.raises(TdqError, match="was started with"):
        _started(tmp_path)


def test_a_limit_that_two_batches_do_not_fit_into() -> None:
    with pytest.raises(TdqError, match=rf"Allow {2 * 8 * SAMPLE} bytes") as error:
        reconstructed(memory_limit=15 * SAMPLE)
    assert error.value.field == "memory_limit"
    reconstructed(memory_limit=16 * SAMPLE, iterations=10)
