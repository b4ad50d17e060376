"""Kinds of layers, and on which backends each has a low-precision kernel: the one table that everything else reads.

The presets quantize what has kernels on most backends, exports name what has none on some, engine builders say what to
leave out, and :func:`modelopt_tdq.coverage` reports all of it. What stands here was seen in the kernels that each
backend chose for a layer of that kind in a ``ratio`` graph (``tests/test_kinds.py``); of TensorRT, which cannot be
installed everywhere, it is what its documentation says and TensorRT-RTX does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelopt.torch.quantization.nn import QuantModule
from torch import nn

__all__ = [
    "ATTENTION_PRODUCT",
    "BACKENDS",
    "CONVOLUTION",
    "EMBEDDING",
    "KINDS",
    "LINEAR",
    "TRANSPOSED_CONVOLUTION",
    "Kind",
    "kind_of",
    "kind_of_operator",
    "number_format",
    "title",
    "without_kernel",
]

#: Backends that run an exported graph.
BACKENDS = ("onnxruntime", "openvino", "tensorrt_rtx", "tensorrt")

_TITLES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt_rtx": "TensorRT-RTX",
    "tensorrt": "TensorRT",
}

_CPU_HAS_NO_FP8 = {
    "onnxruntime": "computes FP8 in floating point on a CPU",
    "openvino": "computes FP8 in floating point on a CPU",
}

_CONVOLUTIONS_ARE_FLOAT = {"onnxruntime": "computes all convolutions in floating point"}

_NO_KERNEL = "has no low-precision kernel for ConvTranspose and computes it in floating point"

_NO_PRODUCT = dict.fromkeys(BACKENDS, "reads rows of it, which multiplies nothing")


@dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
        name: In the singular.
        classes: Of its layers, in ``torch.nn``; none of a product of two activations.
        weight_axis: Of the output channels, along which weights have their scales.
        operators: Of ONNX.
        by_default: Whether the presets quantize it.
        why_not: Why they do not.
        missing: Backends without a low-precision kernel for it, each with what it does instead, per number format.
    """

    name: str
    classes: tuple[type[nn.Module], ...]
    weight_axis: int
    operators: tuple[str, ...]
    by_default: bool
    why_not: str = ""
    missing: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def rules(self) -> dict[str, int]:
        """``parent_class`` of a ``quant_cfg`` rule to the axis of the weight's channels."""
        return {f"nn.{layer.__name__}": self.weight_axis for layer in self.classes}

    def runs_in_low_precision(self, backend: str, number_format: str) -> bool:
        """Whether a backend computes it in ``int8`` or ``fp8``; below 8 bits, codes travel in INT8."""
        return backend not in self.missing.get(number_format, {})


LINEAR = Kind("linear layer", (nn.Linear,), 0, ("MatMul", "Gemm"), True, missing={"fp8": _CPU_HAS_NO_FP8})

CONVOLUTION = Kind(
    "convolution",
    (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    0,
    ("Conv",),
    True,
    missing={"int8": _CONVOLUTIONS_ARE_FLOAT, "fp8": _CPU_HAS_NO_FP8},
)

TRANSPOSED_CONVOLUTION = Kind(
    "transposed convolution",
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    1,
    ("ConvTranspose",),
    False,
    "OpenVINO alone has a low-precision kernel; make_config(conv_transpose=True) quantizes it all the same",
    missing={
        "int8": {**_CONVOLUTIONS_ARE_FLOAT, "tensorrt_rtx": _NO_KERNEL, "tensorrt": _NO_KERNEL},
        "fp8": {**_CPU_HAS_NO_FP8, "tensorrt_rtx": _NO_KERNEL, "tensorrt": _NO_KERNEL},
    },
)

EMBEDDING = Kind(
    "embedding",
    (nn.Embedding,),
    0,
    ("Gather",),
    False,
    "its rows are read, not multiplied: no backend has anything to compute in low precision",
    missing={"int8": _NO_PRODUCT, "fp8": _NO_PRODUCT},
)

ATTENTION_PRODUCT = Kind(
    "attention product",
    (),
    0,
    ("MatMul",),
    False,
    "the presets quantize products with weights; rules for *_bmm_quantizer and softmax_quantizer quantize these, with "
    "a plain attention processor",
    missing={"fp8": _CPU_HAS_NO_FP8},
)

#: All of them. What is in none of them is not multiplied, or not by a kernel that could read codes.
KINDS = (LINEAR, CONVOLUTION, TRANSPOSED_CONVOLUTION, EMBEDDING, ATTENTION_PRODUCT)


def title(backend: str) -> str:
    """What the makers of a backend call it."""
    return _TITLES[backend]


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer with weights, quantized by ModelOpt or not."""
    own = layer.original_cls if isinstance(layer, QuantModule) else type(layer)
    return next((kind for kind in KINDS if issubclass(own, kind.classes)), None)


def kind_of_operator(operator: str) -> Kind | None:
    """The kind of the layers that an ONNX operator with weights stands for."""
    return next((kind for kind in KINDS if operator in kind.operators), None)


def number_format(num_bits: object) -> str:
    """``int8`` or ``fp8``: what the codes of a quantizer travel in; a name of its own for any other format."""
    if isinstance(num_bits, int) and num_bits <= 8:
        return "int8"
    return "fp8" if num_bits == (4, 3) else str(num_bits)


def without_kernel(operator: str, number_format: str = "int8") -> dict[str, str]:
    """Engine builders that have no low-precision kernel for an ONNX operator, with what they do instead.

    ONNX Runtime is left out: it runs what it is given, and no one builds an engine for its speed.
    """
    kind = kind_of_operator(operator)
    missing = {} if kind is None else kind.missing.get(number_format, {})
    return {backend: what for backend, what in missing.items() if backend != "onnxruntime"}
