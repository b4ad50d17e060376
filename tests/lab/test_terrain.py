"""The terrain model: what is ours, on a small one of the same kind; and the real one where its package is installed."""

from __future__ import annotations

import copy
import math
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from support.models import fast_config
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.errors import MissingExtraError, TdqError
from modelopt_tdq.high_precision import HIGH_PRECISION
from modelopt_tdq.lab import terrain
from modelopt_tdq.lab.denoising import predict, sample_labels
from modelopt_tdq.lab.example_call import example_call
from modelopt_tdq.lab.judge import judge, reference
from modelopt_tdq.lab.model_folder import describe_inputs, load_quantized, make_inputs, save_quantized
from modelopt_tdq.lab.terrain import DIFFICULTIES, INSTALL, TerrainScheduler, TerrainUNet, load_terrain, terrain_file
from modelopt_tdq.lab.trajectories import is_unconditional, noise, sample, sample_shape

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "channels": (32, 64),
    "attention": (False, True),
    "blocks": 1,
    "embedding": 32,
}

#: Names of parts in the file with the weights, by ours.
IN_FILE = {
    "time_embedding": "time_embed",
    "difficulty_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def _package_is_missing() -> bool:
    try:
        terrain_file()
    except MissingExtraError:
        return True
    return False


needs_package = pytest.mark.skipif(_package_is_missing(), reason=INSTALL)


@pytest.fixture(scope="module")
def model() -> TerrainUNet:
    torch.manual_seed(0)
    made = TerrainUNet(**SMALL).eval()
    for module in made.modules():
        if isinstance(module, nn.GroupNorm):  # each with its own parameters, so that none can be mistaken for another
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return made


@pytest.fixture(scope="module")
def quantized(model: TerrainUNet) -> nn.Module:
    start = noise(2, sample_shape(model), 0)
    return mtq.quantize(copy.deepcopy(model), fast_config(), lambda m: sample(m, TerrainScheduler(), start, 3))


def test_it_is_called_as_a_class_conditional_denoiser(model: TerrainUNet) -> None:
    assert is_unconditional(model)
    assert sample_shape(model) == (1, 16, 16)
    x = 3 * noise(7, sample_shape(model), 0)
    labels = sample_labels(model, 7)
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    with torch.no_grad():
        together = predict(model, x, torch.tensor(2.0), labels)
        assert together.abs().max() <= 1.0
        one_by_one = torch.cat([model(x[i : i + 1], torch.tensor([2.0]), labels[i : i + 1]) for i in range(7)])
        times = torch.tensor([2.0, 5.0, 2.0, 2.0, 2.0, 2.0, 2.0])
        changed = (model(x, times, labels) - together).abs().amax((1, 2, 3)) > 1e-3
        rougher = (model(x, torch.tensor(2.0), (labels + 1) % 5) - together).abs().amax((1, 2, 3))
    assert torch.allclose(one_by_one, together, atol=1e-5)
    assert changed.tolist() == [False, True, False, False, False, False, False]
    assert bool((rougher > 1e-4).all())
    with pytest.raises(TdqError, match="class_labels"):
        model(x, torch.tensor(2.0))


def test_difficulties_are_spread_and_in_range() -> None:
    assert len(set(DIFFICULTIES)) == 5
    assert (min(DIFFICULTIES), max(DIFFICULTIES)) == (0.1, 0.9)
    assert abs(DIFFICULTIES[0] - DIFFICULTIES[1]) == pytest.approx(0.8)


def _inputs_of(model: nn.Module, start: Tensor, steps: int) -> tuple[list[Tensor], Tensor]:
    seen: list[Tensor] = []
    scheduler = TerrainScheduler()
    end = sample(model, scheduler, start, steps, lambda time, x, prediction: seen.append(x))
    return seen, end


def test_trajectory(model: TerrainUNet) -> None:
    """x0 + sigma_next * noise: what is added to the prediction is noise of the next sigma, new at every step."""
    start = noise(3, sample_shape(model), 0)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    scheduler = TerrainScheduler()
    end = sample(model, scheduler, start, 4, lambda *call: calls.append(call))
    sigmas = torch.stack([time for time, _, _ in calls])
    assert torch.allclose(sigmas, torch.tensor([80.0, 8.0, 0.8, 0.08]), rtol=1e-5)
    assert torch.equal(calls[0][1], 80.0 * start)
    assert torch.equal(end, calls[-1][2])
    added = [(after[1] - before[2]) / after[0] for before, after in pairwise(calls)]
    for each in added:
        assert float(each.std()) == pytest.approx(1.0, abs=0.1)
        assert float(each.mean()) == pytest.approx(0.0, abs=0.1)
    assert abs(float(torch.corrcoef(torch.stack([added[0].flatten(), added[1].flatten()]))[0, 1])) < 0.15


def test_noise_is_a_function_of_the_start(model: TerrainUNet) -> None:
    """A quantized model on the same start gets the noise of full precision; other starts get other noise."""

    class Constant(nn.Module):
        config = model.config

        def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return torch.full_like(sample, 0.25)

    def fresh(start: Tensor) -> Tensor:
        """[S - 1, N, ...] what was added."""
        seen, _ = _inputs_of(Constant(), start, 4)
        return torch.stack(seen[1:]) - 0.25

    judged, calibration = (noise(3, sample_shape(model), seed) for seed in (1, 0))
    found = fresh(judged)
    assert torch.equal(found, fresh(judged))
    assert torch.equal(found[:, 1:2], fresh(judged[1:2])[:, 0:1])  # whatever else is in the batch
    samples = [*found.unbind(1), *fresh(calibration).unbind(1)]
    assert len({each.numpy().tobytes() for each in samples}) == 6
    interrupted = TerrainScheduler()
    sample(Constant(), interrupted, calibration, 4)
    seen: list[Tensor] = []
    sample(Constant(), interrupted, judged, 4, lambda time, x, prediction: seen.append(x))
    assert torch.equal(torch.stack(seen[1:]) - 0.25, found)  # whatever the scheduler did before


def test_full_precision_is_judged_to_be_perfect(model: TerrainUNet) -> None:
    """From the same start, not from what the scheduler made of it, and with the same noise."""
    against = reference(model, TerrainScheduler(), 2, 4, 1, lambda: None)
    found = judge(model, TerrainScheduler(), against, lambda: None)
    assert found.psnr_db == math.inf
    assert found.sqnr_db == [math.inf] * 4
    assert torch.equal(against.inputs[0], 80.0 * against.start)


@pytest.fixture(scope="module")
def file(model: TerrainUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as its package has the large one: its operators, its names, no names of group norms."""
    path = tmp_path_factory.mktemp("terrain") / "small.onnx"
    call = example_call(model, 2, torch.tensor([5.0, 7.0]))
    program = torch.onnx.export(model, (), kwargs=call, dynamo=True, opset_version=18, verbose=False)
    program.save(str(path))
    graph = onnx.load(str(path))
    renamed = {}
    for name, _ in model.named_parameters():
        part = next((ours for ours in IN_FILE if name.startswith(f"{ours}.")), "")
        renamed[name] = f"network.{IN_FILE.get(part, part)}{name.removeprefix(part)}"
    for initializer in graph.graph.initializer:
        initializer.name = renamed.get(initializer.name, initializer.name)
    for node in graph.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    assert any(node.op_type == "InstanceNormalization" for node in graph.graph.node)
    onnx.save(graph, path)
    return path


def test_weights_come_from_the_onnx_file(model: TerrainUNet, file: Path) -> None:
    loaded = load_terrain(file, **SMALL)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    call = example_call(model, 2, torch.tensor([5.0, 7.0]))
    session = onnxruntime.InferenceSession(str(file))
    result = session.run(None, {name: value.numpy() for name, value in call.items()})[0]
    with torch.no_grad():
        assert np.allclose(loaded(**call).numpy(), result, atol=1e-5)


def test_another_file_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(TdqError, match=r"not the weights of version 0\.4\.2") as caught:
        load_terrain(file)
    assert INSTALL in caught.value.cure
    graph = onnx.load(str(file))
    del graph.graph.initializer[:]
    onnx.save(graph, tmp_path / "empty.onnx")
    with pytest.raises(TdqError, match=r"not the weights of version 0\.4\.2"):
        load_terrain(tmp_path / "empty.onnx", **SMALL)


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terrain, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        load_terrain()
    assert "Run pip install --no-deps adaptive-terrain-diffusion==0.4.2 (" in caught.value.cure


def test_the_presets_keep_the_embeddings_and_the_first_and_last_layer() -> None:
    layers = [name for name, m in TerrainUNet().named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 255
    kept = [n for n in layers if any(fnmatch(f"{n}.input_quantizer", glob) for glob in HIGH_PRECISION)]
    assert kept == [
        "time_embedding.0",
        "time_embedding.2",
        "difficulty_embedding.0",
        "difficulty_embedding.2",
        "conv_in",
        "conv_out",
    ]


def test_a_quantized_model_is_saved_and_restored(quantized: nn.Module, tmp_path: Path) -> None:
    call = example_call(quantized, 2, torch.tensor([5.0, 7.0]))
    save_quantized(quantized, tmp_path / "saved", describe_inputs(quantized, (), call), {})
    found = load_quantized(tmp_path / "saved")
    assert isinstance(found.model, TerrainUNet)
    assert found.inputs["class_labels"] == {"shape": [2], "dtype": "int64"}
    with torch.no_grad():
        expected = quantized(**call)
        assert torch.equal(found.model(**call), expected)
        assert torch.equal(copy.deepcopy(quantized)(**call), expected)


def test_a_quantized_model_runs_in_onnx_runtime(model: TerrainUNet, quantized: nn.Module, tmp_path: Path) -> None:
    call = example_call(model, 2, torch.tensor([0.8, 8.0]))
    described = make_inputs(describe_inputs(quantized, (), call))  # as the command line does: noise, even for sigma
    report = tdq.export_onnx(quantized, tmp_path / "model.onnx", described)
    assert not report.skipped
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert [each.name for each in session.get_inputs()] == ["sample", "timestep", "class_labels"]
    result = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in call.items()})[0])
    with torch.no_grad():
        exact, ours = model(**call), quantized(**call)
    # roundings of single codes differ; they are less than what quantization does, and of its size in total
    assert sqnr_db(ours, result) > sqnr_db(exact, ours)
    assert sqnr_db(exact, result) == pytest.approx(sqnr_db(exact, ours), abs=1.5)


@needs_package
def test_the_real_model_equals_onnx_runtime() -> None:
    """10.5 M parameters, and the results of the file itself, at sigmas over the whole range."""
    model = load_terrain()
    assert sum(p.numel() for p in model.parameters()) == 10_456_545
    session = onnxruntime.InferenceSession(str(terrain_file()))
    labels = torch.tensor([1])
    for sigma in (80.0, 0.8):
        x = sigma * noise(1, sample_shape(model), 0)
        difficulty = np.array([DIFFICULTIES[1]], "f4")
        feeds = {"noisy": x.numpy(), "sigma": np.array([sigma], "f4"), "difficulty": difficulty}
        expected = session.run(None, feeds)[0]
        with torch.no_grad():
            found = model(x, torch.tensor(sigma), labels).numpy()
        assert np.abs(found - expected).max() < 1e-4 * expected.std()
