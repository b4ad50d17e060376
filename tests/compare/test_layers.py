from pathlib import Path

import numpy as np
import onnx
import pytest
from support.models import FAMILIES, quantized

from modelopt_tdq.compare.layers import GIVEN, code_tensors, given_codes, with_given_codes
from modelopt_tdq.export import export_onnx
from modelopt_tdq.runtime.onnxruntime import OnnxRuntimeSession

DATA = FAMILIES["plain"].data()
FEED = {name: tensor.numpy() for name, tensor in DATA[0].items()}


@pytest.mark.parametrize("bits", [8, (4, 3)], ids=["int8", "fp8"])
def test_a_layer_sees_the_given_codes_and_answers_with_its_own(tmp_path: Path, bits: object) -> None:
    path = export_onnx(quantized(weight_bits=bits, activation_bits=bits), tmp_path / "m.onnx", DATA[0]).path
    graph = onnx.load(path)
    tensors = code_tensors(graph)
    assert list(tensors) == [f"{layer}.input_quantizer/codes" for layer in ("conv1", "mix", "conv2")]
    assert set(tensors.values()) == {bits == (4, 3)}
    own = OnnxRuntimeSession(graph, codes=True)(FEED)
    cut = OnnxRuntimeSession(with_given_codes(graph), codes=True)

    def answer(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return cut({**FEED, **{name + GIVEN: codes for name, codes in given.items()}})

    first, second, third = tensors
    given = {name: own[name] for name in tensors}
    same = answer(given)
    for name in (*tensors, "output"):
        np.testing.assert_array_equal(same[name], own[name])
    changed = answer({**given, second: np.zeros_like(own[second])})
    np.testing.assert_array_equal(changed[first], own[first])
    np.testing.assert_array_equal(changed[second], own[second])
    assert not np.array_equal(changed[third], own[third])
    assert len(graph.graph.input) == 2  # the original is untouched


def test_given_codes_keep_the_padding_that_is_the_layers_own() -> None:
    reference = {"a": np.ones((1, 1, 2, 2)), "c": np.ones(3)}
    own = {"a": np.full((1, 1, 4, 4), -5.0), "b": np.zeros(2)}
    given = given_codes(reference, own)
    np.testing.assert_array_equal(given["a"][0, 0], np.pad(np.ones((2, 2)), 1, constant_values=-5))
    np.testing.assert_array_equal(given["b"], own["b"])
    assert set(given) == {"a", "b"}
    assert (own["a"] == -5).all()
