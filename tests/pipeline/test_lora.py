"""Adapters of peft on a quantized denoiser: loaded after quantization, merged, or there before."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from support.models import fast_config, unet_condition
from support.pipelines import FAMILIES
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from trt_examples import tiny

peft = pytest.importorskip("peft")

FAMILY = FAMILIES["stable_diffusion"]
CALL = FAMILY.tiny_call(0)


def _pipeline() -> Any:
    """With a second level: what a LoRA does is to be well above the noise."""
    pipeline = FAMILY.tiny()
    pipeline.unet = tiny.seeded(unet_condition)
    return pipeline


def _lora(unet: nn.Module) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 on all attention layers, as a file holds it."""
    from peft.utils import get_peft_model_state_dict

    adapted: Any = copy.deepcopy(unet)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    adapted.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(adapted).items()}


def _sqnr(output: torch.Tensor, reference: torch.Tensor) -> float:
    noise = (output - reference).double().square().sum()
    return 10 * math.log10(float(reference.double().square().sum() / noise))


@torch.no_grad()
def _output(pipeline: Any, inputs: dict[str, Any]) -> torch.Tensor:
    output: torch.Tensor = pipeline.unet(**inputs).sample
    return output


def test_loaded_after_quantization_and_merged() -> None:
    reference, pipeline = _pipeline(), _pipeline()
    state = _lora(reference.unet)
    config = fast_config(statistic="mse", weights="mse")
    tdq.quantize_pipeline(pipeline, config, calls=[CALL], steps=4, progress=False)
    inputs = tdq.sample_inputs(pipeline, **CALL)
    for one in (reference, pipeline):
        one.load_lora_weights(dict(state))
    active = _sqnr(_output(pipeline, inputs), _output(reference, inputs))
    for one in (reference, pipeline):
        one.fuse_lora(components=["unet"])
    merged = _sqnr(_output(pipeline, inputs), _output(reference, inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tdq.TdqWarning)
        assert tdq.recalibrate_weights(pipeline.unet)
    mended = _sqnr(_output(pipeline, inputs), _output(reference, inputs))
    assert merged < active - 1
    assert mended > active - 1


def test_loaded_before_quantization_is_named_with_the_wrapper() -> None:
    pipeline = _pipeline()
    pipeline.load_lora_weights(_lora(pipeline.unet))
    with pytest.warns(tdq.TdqWarning, match=r"attn1\.to_q,.*peft\.tuners\.lora\.layer\.Linear computes"):
        tdq.quantize_pipeline(pipeline, fast_config(), calls=[CALL], steps=4, progress=False)


def test_a_merged_weight_that_is_quantized_on_the_fly_is_refused() -> None:
    """Its scale would be that of the weight without the LoRA, and an export would lose the LoRA."""
    pipeline = _pipeline()
    pipeline.load_lora_weights(_lora(pipeline.unet))
    rules: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
        {"quantizer_name": "*time_emb*", "enable": False},
    ]
    config = {"quant_cfg": rules, "algorithm": fast_config()["algorithm"]}
    with pytest.raises(TdqError, match=r"to_q\.weight_quantizer.*pipeline\.fuse_lora\(\)"):
        tdq.quantize_pipeline(pipeline, config, calls=[CALL], steps=4, progress=False)
