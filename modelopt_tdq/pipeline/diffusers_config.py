"""``diffusers_config``: the quantizers of a TDQ config, put in by diffusers' own ``from_pretrained``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from modelopt_tdq.errors import require

__all__ = ["diffusers_config"]


class _Rules(list[dict[str, Any]]):
    """ModelOpt's list of rules, which also takes a rule the way diffusers adds one: ``rules[glob] = {...}``."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            self.append({"quantizer_name": key, **value})
        else:
            super().__setitem__(key, value)


def diffusers_config(config: Mapping[str, Any], modules_to_not_convert: Sequence[str] = ()) -> Any:
    """The ``quantization_config`` of ``from_pretrained`` for a config of ``mtq.quantize``.

    diffusers calibrates while it loads, one layer at a time, when there is no model to run yet. So the model comes with
    its quantizers in place and uncalibrated; :func:`~modelopt_tdq.quantize_pipeline` or ``mtq.quantize``, with the same
    config, then calibrate it::

        unet = UNet2DConditionModel.from_pretrained(
            model, subfolder="unet", quantization_config=tdq.diffusers_config(tdq.TDQ_CONFIG)
        )
        pipe = StableDiffusionPipeline.from_pretrained(model, unet=unet)
        tdq.quantize_pipeline(pipe, tdq.TDQ_CONFIG, prompts)

    Saved with ModelOpt's ``enable_huggingface_checkpointing``, it is loaded calibrated, without any of this.

    Args:
        config: As :data:`modelopt_tdq.TDQ_CONFIG`. It is not changed.
        modules_to_not_convert: Parts of module names, as in diffusers: what holds one stays in high precision. The
            calibration sets all rules anew, so its config needs them too, as
            ``{"quantizer_name": "*proj_out*", "enable": False}`` at the end of its ``quant_cfg``.

    Returns:
        A ``diffusers.NVIDIAModelOptConfig``.

    Raises:
        MissingExtraError: diffusers is not installed.
    """
    kind = require("diffusers", "diffusers").NVIDIAModelOptConfig
    rules = _Rules(copy.deepcopy(list(config["quant_cfg"])))
    # the quantization type is only a label here: the rules say everything
    return kind("INT8_INT8", list(modules_to_not_convert), modelopt_config={"quant_cfg": rules, "algorithm": None})
