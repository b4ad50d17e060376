"""The model families of the examples: the tiny random pipelines that tests use are theirs."""

from __future__ import annotations

from trt_examples.dit import dit
from trt_examples.flux import flux
from trt_examples.pixart import pixart
from trt_examples.sd3 import sd3
from trt_examples.sdxl import sdxl
from trt_examples.stable_diffusion import stable_diffusion
from trt_examples.wan import wan

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (dit, flux, pixart, sd3, sdxl, stable_diffusion, wan)}
