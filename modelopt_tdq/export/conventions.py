"""Programs of NVIDIA's that load engines of denoisers: what they call the tensors of each kind of model.

Facts of their sources, of the versions named. What is not named here, as the sizes of a profile, a program reads from
the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["DEMO_DIFFUSION", "DIFFUSION_TRT", "PROGRAMS", "RTX_DEMO", "Convention"]

#: Shape of an input, from the model's config and the tensors of a call by name.
_Shape = Callable[[Any, Mapping[str, Tensor]], tuple[int, ...]]


@dataclass(frozen=True)
class Convention:
    """How a program calls the tensors of one kind of denoiser.

    Attributes:
        of: Models that it serves, for messages; one of each name in a program.
        inputs: Their names, by the model's own, in the order in which the program passes them.
        axes: Names of open sizes, by the program's name of an input or output and the number of the dimension.
        optional: Of ``inputs``, by the model's own name: those that some of these models do not take.
        output: Name of the only output.
        time: Shape of the time: one for the batch [1], or one of each sample [B].
        dtypes: By the model's own names, of inputs that have not the dtype of the model's first input.
        zeros: By the model's own names, inputs that the program always passes and pipelines of diffusers do not: zeros
            of this shape.
    """

    of: str
    inputs: Mapping[str, str]
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    output: str = "latent"
    time: Literal["[1]", "[B]"] = "[1]"
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    zeros: Mapping[str, _Shape] = field(default_factory=dict)

    @property
    def batch(self) -> str | None:
        """Name of the open batch; None where the program has a fixed one."""
        first = next(iter(self.inputs.values()))
        return self.axes.get(first, {}).get(0)

    @property
    def batch_axes(self) -> dict[str, int]:
        """Where the batch is, by the model's own names of inputs."""
        called = {new: own for own, new in self.inputs.items()}
        open_axes = [
            (called[name], *axis) for name, axes in self.axes.items() if name in called for axis in axes.items()
        ]
        return {own: axis for own, axis, size in open_axes if self.batch is not None and size == self.batch}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _control_of_sd3(config: Any, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Residuals [19, B, tokens, width], as of the ControlNets of Stable Diffusion 3.5 large."""
    batch, _, height, width = tensors["hidden_states"].shape
    tokens = (height // config.patch_size) * (width // config.patch_size)
    return (19, batch, tokens, config.num_attention_heads * config.attention_head_dim)


_IMAGE = {0: "2B", 2: "H", 3: "W"}
_UNET = {"sample": _IMAGE, "encoder_hidden_states": {0: "2B"}, "latent": _IMAGE}
_SDXL = {"added_cond_kwargs.text_embeds": "text_embeds", "added_cond_kwargs.time_ids": "time_ids"}
_POOLED = {"text_embeds": {0: "2B"}, "time_ids": {0: "2B"}}
_CONTROL = {"images": {1: "2B", 3: "8H", 4: "8W"}}
_TRANSFORMER = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
_FLUX = _same(*_TRANSFORMER, "img_ids", "txt_ids", "guidance")
_FLUX_AXES = {
    "hidden_states": {0: "B", 1: "latent_dim"},
    "encoder_hidden_states": {0: "B"},
    "pooled_projections": {0: "B"},
    "timestep": {0: "B"},
    "img_ids": {0: "latent_dim"},
    "guidance": {0: "B"},
}
_FLUX_DTYPES = dict.fromkeys(("img_ids", "txt_ids", "guidance"), torch.float32)

#: NVIDIA/TensorRT, demo/Diffusion of 11.1.0.106: ``get_input_names``, ``get_output_names``, ``get_dynamic_axes``,
#: ``get_sample_input`` and the shapes of ``get_input_profile`` in demo_diffusion/model/unet.py and
#: diffusion_transformer.py. "2B" is "B" there for a pipeline without classifier-free guidance.
DEMO_DIFFUSION = (
    Convention("the U-Net of Stable Diffusion", _same("sample", "timestep", "encoder_hidden_states"), _UNET),
    Convention(
        "the U-Net of Stable Diffusion with ControlNets in one graph",
        _same("sample", "timestep", "encoder_hidden_states", "images", "controlnet_scales"),
        {**_UNET, **_CONTROL},
    ),
    Convention(
        "the U-Net of SDXL",
        {**_same("sample", "timestep", "encoder_hidden_states"), **_SDXL},
        {**_UNET, **_POOLED},
    ),
    Convention(
        "the U-Net of SDXL with ControlNets in one graph",
        {**_same("sample", "timestep", "encoder_hidden_states", "images", "controlnet_scales"), **_SDXL},
        {**_UNET, **_POOLED, **_CONTROL},
    ),
    Convention(
        "the U-Net of Stable Video Diffusion",
        _same("sample", "timestep", "encoder_hidden_states", "added_time_ids"),
        {
            "sample": {0: "2B", 1: "num_frames", 3: "H", 4: "W"},
            "encoder_hidden_states": {0: "2B"},
            "added_time_ids": {0: "2B"},
        },
        dtypes={"timestep": torch.float32},
    ),
    Convention(
        "the transformer of Stable Diffusion 3.5",
        _same(*_TRANSFORMER, "block_controlnet_hidden_states"),
        {
            "hidden_states": _IMAGE,
            "encoder_hidden_states": {0: "2B"},
            "pooled_projections": {0: "2B"},
            "timestep": {0: "2B"},
            "block_controlnet_hidden_states": {1: "2B", 2: "latent_dim"},
            "latent": _IMAGE,
        },
        time="[B]",
        dtypes={"timestep": torch.float32},
        zeros={"block_controlnet_hidden_states": _control_of_sd3},
    ),
    Convention("the transformer of Flux", _FLUX, _FLUX_AXES, optional=("guidance",), time="[B]", dtypes=_FLUX_DTYPES),
    Convention(
        "the transformer of Wan",
        _same("hidden_states", "timestep", "encoder_hidden_states"),
        output="denoised_latents",
        dtypes={"timestep": torch.int64},
    ),
    Convention(
        "the transformer of Cosmos",
        _same("hidden_states", "timestep", "encoder_hidden_states", "padding_mask", "fps", "condition_mask"),
        {
            "hidden_states": {0: "B", 2: "latent_frames", 3: "latent_H", 4: "latent_W"},
            "timestep": {0: "B"},
            "encoder_hidden_states": {0: "B"},
            "padding_mask": {0: "B", 2: "H", 3: "W"},
            "fps": {0: "B"},
            "condition_mask": {0: "B", 2: "latent_frames", 3: "latent_H", 4: "latent_W"},
        },
        optional=("fps", "condition_mask"),
        time="[B]",
        dtypes={"fps": torch.float32},
    ),
)

_OPEN_IMAGE = {0: "batch_size", 2: "height", 3: "width"}

#: NVIDIA/Model-Optimizer 0.47, examples/diffusers/quantization: diffusion_trt.py, onnx_utils/export.py. The inputs of
#: an engine are filled there by their order, that of the arguments of the model's forward.
DIFFUSION_TRT = (
    Convention(
        "the U-Net of SDXL",
        {**_same("sample", "timestep", "encoder_hidden_states"), **_SDXL},
        {
            "sample": _OPEN_IMAGE,
            "encoder_hidden_states": {0: "batch_size"},
            "text_embeds": {0: "batch_size"},
            "time_ids": {0: "batch_size"},
            "latent": _OPEN_IMAGE,
        },
    ),
    Convention(
        "the transformer of Stable Diffusion 3",
        _same(*_TRANSFORMER),
        {
            "hidden_states": _OPEN_IMAGE,
            "encoder_hidden_states": {0: "batch_size"},
            "pooled_projections": {0: "batch_size"},
            "timestep": {0: "batch_size"},
            "sample": _OPEN_IMAGE,
        },
        output="sample",
        time="[B]",
    ),
    Convention(
        "the transformer of Flux",
        _FLUX,
        {
            "hidden_states": {0: "batch_size", 1: "latent_dim"},
            "encoder_hidden_states": {0: "batch_size"},
            "pooled_projections": {0: "batch_size"},
            "timestep": {0: "batch_size"},
            "img_ids": {0: "latent_dim"},
            "guidance": {0: "batch_size"},
        },
        optional=("guidance",),
        time="[B]",
        dtypes=_FLUX_DTYPES,
    ),
)

#: NVIDIA/TensorRT-RTX 1.5, demo: utils/model_registry.py and flux1.dev/models/flux_model.py.
RTX_DEMO = (Convention("the transformer of Flux", _FLUX, _FLUX_AXES, time="[B]", dtypes=_FLUX_DTYPES),)

#: Presets of names, by the programs' own names.
PROGRAMS: Mapping[str, tuple[Convention, ...]] = {
    "demo-diffusion": DEMO_DIFFUSION,
    "diffusion-trt": DIFFUSION_TRT,
    "rtx-demo": RTX_DEMO,
}
