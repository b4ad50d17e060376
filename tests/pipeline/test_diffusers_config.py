"""diffusers' own from_pretrained with a TDQ config: quantizers first, calibrated afterwards, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, NVIDIAModelOptConfig, PipelineQuantizationConfig
from support.models import fast_config
from support.pipelines import FAMILIES

import modelopt_tdq as tdq

DIT, WAN = FAMILIES["dit"], FAMILIES["wan"]


def _raw(config: dict[str, Any]) -> Any:
    return NVIDIAModelOptConfig("INT8_INT8", modelopt_config=config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit")
    DIT.tiny().save_pretrained(path)
    return path


def _quantized(pipeline: Any, config: dict[str, Any] | None = None) -> Any:
    return tdq.quantize_pipeline(pipeline, config or fast_config(), calls=[DIT.tiny_call(0)], steps=3, progress=False)


def _prediction(pipeline: Any) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.transformer(**tdq.sample_inputs(DIT.tiny(), **DIT.tiny_call(0))).sample


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """Of ModelOpt's own call."""
    return _prediction(_quantized(DIT.tiny()))


@pytest.mark.parametrize("make", [_raw, tdq.diffusers_config])
def test_calibrated_after_loading_it_is_what_modelopts_own_call_makes(
    folder: Path, expected: torch.Tensor, make: Callable[[dict[str, Any]], Any]
) -> None:
    config = fast_config()
    before = copy.deepcopy(config)
    transformer = DiTTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=make(config)
    )
    assert config == before
    pipeline = _quantized(DiTPipeline.from_pretrained(folder, transformer=transformer))
    assert torch.equal(_prediction(pipeline), expected)


def test_a_whole_pipeline_is_loaded_calibrated_saved_and_loaded_again(
    folder: Path, expected: torch.Tensor, tmp_path: Path, diffusers_checkpoints: None
) -> None:
    mapping = {"transformer": tdq.diffusers_config(tdq.TDQ_CONFIG)}
    pipeline = DiTPipeline.from_pretrained(
        folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    _quantized(pipeline).save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(_prediction(again), expected)
    assert again.transformer.config.quantization_config.quant_method == "modelopt"
    table = tdq.scale_table(again.transformer)
    assert torch.equal(table.scale, tdq.scale_table(pipeline.transformer).scale)


def test_until_then_it_says_that_it_is_not_calibrated(folder: Path) -> None:
    with pytest.warns(UserWarning, match="loaded uncalibrated"):
        model = DiTTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", quantization_config=_raw(fast_config())
        )
    with pytest.raises(tdq.TdqError, match="Quantize it first"):
        tdq.scale_table(model)


def test_modules_that_are_to_stay_as_they_are(tmp_path: Path) -> None:
    """Also those that a model keeps in float32, as Wan does: diffusers adds them to the rules by itself."""
    transformer = WAN.tiny().transformer
    assert transformer._keep_in_fp32_modules
    transformer.save_pretrained(tmp_path)
    model = type(transformer).from_pretrained(
        tmp_path, quantization_config=tdq.diffusers_config(fast_config(), ["attn2"])
    )
    enabled = {name for name, module in model.named_modules() if name.endswith("_quantizer") and module.is_enabled}
    assert any("attn1" in name for name in enabled)
    assert not any("attn2" in name for name in enabled)


def test_a_whole_model_still_needs_data() -> None:
    import modelopt.torch.quantization as mtq

    with pytest.raises(tdq.TdqError) as error:
        mtq.quantize(DIT.tiny().transformer, fast_config())
    assert error.value.field == "forward_loop"
