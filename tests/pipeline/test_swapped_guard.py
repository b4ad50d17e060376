"""A swapped denoiser: nobody changes the torch model behind it unnoticed, and there is a way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from diffusers.models.attention_processor import AttnProcessor
from support.models import FAMILIES as MODELS
from support.pipelines import FAMILIES

import modelopt_tdq as tdq
from modelopt_tdq import TdqError

FAMILY = FAMILIES["stable_diffusion"]


class _Zeros:
    inputs: ClassVar[dict[str, Any]] = {"sample": np.float32, "timestep": np.float32}
    outputs = ("output",)

    def __init__(self, *further: str) -> None:
        self.inputs = {**self.inputs, **dict.fromkeys(further, np.float32)}

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return {"output": np.zeros_like(np.asarray(feeds["sample"]))}


@pytest.fixture
def swapped() -> Any:
    return tdq.swap_denoiser(FAMILY.tiny(), _Zeros("encoder_hidden_states"))


def test_an_engine_is_not_exported(swapped: Any, tmp_path: Path) -> None:
    inputs = {"sample": torch.zeros(1, 4, 8, 8), "timestep": torch.tensor(1.0)}
    with pytest.raises(tdq.TdqError, match=r"nothing to trace. Put the torch model back with .*restore_denoiser"):
        tdq.export_onnx(swapped.unet, tmp_path / "m.onnx", inputs)
    assert not list(tmp_path.iterdir())


def _run(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    call = {**FAMILY.tiny_call(0), "generator": torch.Generator().manual_seed(0)}
    return pipeline(**call, num_inference_steps=2, output_type="latent")


#: What pipelines and users do to a denoiser.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "enable_freeu": lambda p: p.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "disable_freeu": lambda p: p.disable_freeu(),
    "fuse_qkv_projections": lambda p: p.fuse_qkv_projections(),
    "set_attention_slice": lambda p: p.enable_attention_slicing(),
    "set_attn_processor": lambda p: p.unet.set_attn_processor(AttnProcessor()),
    "set_default_attn_processor": lambda p: p.unet.set_default_attn_processor(),
    "enable_gradient_checkpointing": lambda p: p.unet.enable_gradient_checkpointing(),
    "load_state_dict": lambda p: p.unet.load_state_dict(p.unet.original.state_dict()),
    "load_state_dict, loosely": lambda p: p.unet.load_state_dict({}, strict=False),
    "conv_in": lambda p: setattr(p.unet, "conv_in", torch.nn.Identity()),
    "add_adapter": lambda p: p.unet.add_adapter(None),
    "load_lora_adapter": lambda p: p.unet.load_lora_adapter({}),
    "fuse_lora": lambda p: p.unet.fuse_lora(),
}


def _state(model: torch.nn.Module) -> dict[str, Any]:
    return {name: (id(m), type(m), repr(sorted(vars(m), key=str))) for name, m in model.named_modules()}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_change_the_model_is_refused_and_changes_nothing(swapped: Any, change: str) -> None:
    original = swapped.unet.original
    before, weights = _state(original), copy.deepcopy(original.state_dict())
    with pytest.raises(TdqError, match=r"restore_denoiser\(pipeline\)") as raised:
        CHANGES[change](swapped)
    assert raised.value.field == change.partition(",")[0]
    assert raised.value.value == "UNet2DConditionModel"
    assert _state(original) == before
    assert all(torch.equal(value, weights[name]) for name, value in original.state_dict().items())
    _run(swapped)


#: What diffusers' pipelines do with adapters, and the method of model or layer that it comes down to.
ADAPTERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "load_lora_weights": ("load_lora_adapter", lambda p: p.load_lora_weights(_lora(), adapter_name="b")),
    "fuse_lora": ("fuse_lora", lambda p: p.fuse_lora(components=["unet"])),
    "unfuse_lora": ("unmerge", lambda p: p.unfuse_lora()),
    "set_adapters": ("set_adapters", lambda p: p.set_adapters("a", 0.5)),
    "delete_adapters": ("delete_adapters", lambda p: p.delete_adapters("a")),
    "disable_lora": ("disable_lora", lambda p: p.disable_lora()),
    "enable_lora": ("enable_lora", lambda p: p.enable_lora()),
    "unload_lora_weights": ("unload_lora", lambda p: p.unload_lora_weights()),
    "enable_lora_hotswap": ("enable_lora_hotswap", lambda p: p.enable_lora_hotswap(target_rank=4)),
}


def _lora() -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on one layer, as a file holds it."""
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return {f"{place}.lora_A.weight": torch.ones(2, 8), f"{place}.lora_B.weight": torch.ones(8, 2)}


@pytest.fixture(scope="module")
def with_lora() -> Any:
    pytest.importorskip("peft")
    pipeline = FAMILY.tiny()
    pipeline.load_lora_weights(_lora(), adapter_name="a")
    pipeline.fuse_lora(components=["unet"])
    return tdq.swap_denoiser(pipeline, _Zeros("encoder_hidden_states"))


@pytest.mark.parametrize("change", ADAPTERS)
def test_adapters_stay_as_they_were(with_lora: Any, change: str) -> None:
    original = with_lora.unet.original
    before, weights = _state(original), copy.deepcopy(original.state_dict())
    method, act = ADAPTERS[change]
    with pytest.raises(TdqError, match=r"restore_denoiser\(pipeline\)") as raised:
        act(with_lora)
    assert raised.value.field == method
    assert _state(original) == before
    assert all(torch.equal(value, weights[name]) for name, value in original.state_dict().items())
    assert with_lora.get_list_adapters() == {"unet": ["a"]}
    assert with_lora.get_active_adapters() == ["a"]
    _run(with_lora)


def test_adapters_can_be_changed_again_on_the_torch_model(with_lora: Any) -> None:
    pipeline = copy.copy(with_lora)
    tdq.restore_denoiser(pipeline)
    layer = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    merged = layer.base_layer.weight.clone()
    pipeline.unfuse_lora()
    assert float((merged - layer.base_layer.weight).mean()) == pytest.approx(2.0)  # B A of ones, rank 2
    pipeline.fuse_lora(components=["unet"])


def test_caches_of_diffusers_are_refused() -> None:
    """They put hooks on the layers of a transformer, which no engine runs."""
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks import apply_pyramid_attention_broadcast

    pipeline = FAMILIES["wan"].tiny()
    inputs = dict.fromkeys(("hidden_states", "timestep", "encoder_hidden_states"), np.float32)
    tdq.swap_denoiser(pipeline, type("Session", (_Zeros,), {"inputs": inputs})())
    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 1)
    config.spatial_attention_block_identifiers = ("blocks",)
    with pytest.raises(TdqError, match="would not change with it"):
        apply_pyramid_attention_broadcast(pipeline.transformer, config)
    assert not any(hasattr(module, "_diffusers_hook") for module in pipeline.transformer.original.modules())


def test_no_cache_of_diffusers_is_enabled_for_an_engine() -> None:
    from diffusers import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    pipeline = FAMILIES["wan"].tiny()
    inputs = dict.fromkeys(("hidden_states", "timestep", "encoder_hidden_states"), np.float32)
    tdq.swap_denoiser(pipeline, type("Session", (_Zeros,), {"inputs": inputs})())
    for config in (
        FasterCacheConfig(),
        FirstBlockCacheConfig(),
        MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)),
        TaylorSeerCacheConfig(),
    ):
        with pytest.raises(TdqError, match=r"would not change with it.*restore_denoiser") as raised:
            pipeline.transformer.enable_cache(config)
        assert raised.value.field == "enable_cache"
    assert not pipeline.transformer.original.is_cache_enabled


def test_the_layers_of_a_swapped_model_can_be_looked_at_only(swapped: Any) -> None:
    original = swapped.unet.original
    found = dict(swapped.unet.named_modules())
    assert found.keys() == dict(original.named_modules()).keys()
    assert list(swapped.unet.parameters()) == []  # it has none that could be trained
    part = found["conv_in"]
    assert isinstance(part, torch.nn.Conv2d)
    assert part.weight is original.conv_in.weight
    for change in (
        lambda: part.register_forward_hook(print),
        lambda: setattr(part, "weight", None),
        lambda: setattr(part, "forward", print),
        part.reset_parameters,
        part.half,
    ):
        with pytest.raises(TdqError, match="would not change with it"):
            change()


def test_a_transformer_refuses_forward_chunking_and_other_attention() -> None:
    family = FAMILIES["sd3"]
    pipeline = family.tiny()
    tdq.swap_denoiser(
        pipeline, type("Session", (_Zeros,), {"inputs": {"hidden_states": np.float32, "timestep": np.float32}})()
    )
    for change in (
        lambda: pipeline.transformer.enable_forward_chunking(1, 1),
        lambda: pipeline.transformer.set_attn_processor(AttnProcessor()),
        pipeline.transformer.fuse_qkv_projections,
    ):
        with pytest.raises(TdqError, match="would not change with it"):
            change()


def test_the_setting_of_an_attention_processor_is_noticed_at_the_next_call(swapped: Any) -> None:
    """`set_ip_adapter_scale` changes the processors one by one, past every method of the model."""
    attention = swapped.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.processor.scale = [1.0]
    pipeline = tdq.swap_denoiser(swapped, _Zeros("encoder_hidden_states"))
    _run(pipeline)
    next(p for p in pipeline.unet.attn_processors.values() if hasattr(p, "scale")).scale[0] = 0.3
    with pytest.raises(TdqError, match=r"attn1\.processor.*would not change with it"):
        _run(pipeline)


def test_it_can_be_asked_for_everything_that_changes_nothing(swapped: Any, tmp_path: Path) -> None:
    unet, original = swapped.unet, swapped.unet.original
    assert isinstance(unet, ModelMixin)
    assert isinstance(unet, tdq.EngineDenoiser)
    assert type(copy.deepcopy(unet)) is tdq.EngineDenoiser
    assert unet.config is original.config
    assert unet.conv_in is original.conv_in
    assert unet.num_parameters() == original.num_parameters()
    assert unet.load_config is not None  # a class method
    assert not hasattr(unet, "no_such_method")
    for dtype in (torch.float16, torch.float32):
        swapped.to(dtype)
        assert swapped.unet.dtype == dtype
    unet.save_pretrained(tmp_path / "unet")
    loaded = type(original).from_pretrained(tmp_path / "unet")
    assert torch.equal(loaded.conv_in.weight, original.conv_in.weight)


def test_a_swapped_pipeline_is_saved_with_its_torch_denoiser(tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(MODELS["unet"].make().eval(), DDIMScheduler())
    original = pipeline.unet
    tdq.swap_denoiser(pipeline, _Zeros()).save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.unet.conv_in.weight, original.conv_in.weight)


def test_context_managers_work() -> None:
    family = FAMILIES["wan"]
    pipeline = family.tiny()
    inputs = {"hidden_states": np.float32, "timestep": np.float32, "encoder_hidden_states": np.float32}
    tdq.swap_denoiser(pipeline, type("Session", (_Zeros,), {"inputs": inputs})())
    with pipeline.transformer.cache_context("cond"):
        pass
    pipeline.transformer._reset_stateful_cache()


def test_the_way_back(swapped: Any) -> None:
    original, expected = swapped.unet.original, _run(FAMILY.tiny())[0]
    assert _run(swapped)[0].abs().max() != expected.abs().max()
    assert tdq.restore_denoiser(swapped) is swapped
    assert swapped.unet is original
    assert torch.equal(_run(swapped)[0], expected)
    swapped.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not torch.equal(_run(swapped)[0], expected)
    with pytest.raises(TdqError, match="it is the torch denoiser"):
        tdq.restore_denoiser(swapped)


def test_weights_that_were_dropped_do_not_come_back() -> None:
    pipeline = tdq.swap_denoiser(FAMILY.tiny(), _Zeros("encoder_hidden_states"), free=True)
    with pytest.raises(TdqError, match=r"were dropped.*pipeline\.unet = model"):
        tdq.restore_denoiser(pipeline)
    pipeline.unet = FAMILY.tiny().unet
    assert torch.equal(_run(pipeline)[0], _run(FAMILY.tiny())[0])
