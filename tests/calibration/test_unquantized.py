"""One warning at the end of a calibration names what was meant to be quantized and is not, with the right reason."""

from __future__ import annotations

import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from support.models import TinyDenoiser, calls, fast_config, loop
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.model.unquantized import unquantized_layers


class _Other(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1


class _Derived(nn.Linear):
    pass


class _Model(TinyDenoiser):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)
        self.other = _Other(8, 8)
        self.derived = _Derived(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor | float, context: Tensor | None = None) -> Tensor:
        return super().forward(sample, timestep, context) + self.derived(self.other(torch.ones(1, 8))).sum()


def _warned(model: nn.Module, config: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mtq.quantize(model, config, loop(calls()))
    return [str(w.message) for w in caught if w.category is tdq.TdqWarning]


def test_each_layer_has_its_own_reason_in_one_warning() -> None:
    model, config = _Model().eval(), fast_config()
    config["quant_cfg"] += [{"quantizer_name": "blocks.*.to_q.input_quantizer", "cfg": {"num_bits": 8, "axis": None}}]
    (text,) = _warned(model, config)
    assert "3 layers" in text
    assert "spare (never ran in forward_loop)" in text
    assert f"other (ModelOpt does not quantize its class {_Other.__module__}._Other)" in text
    assert f"derived (its class {_Derived.__module__}._Derived is not what the rule's parent_class names" in text
    assert "does not have: blocks.*.to_q.input_quantizer" in text
    assert set(unquantized_layers(model)) == {"spare", "other", "derived"}
    assert not model.spare.weight_quantizer.is_enabled


def test_nothing_is_said_where_all_is_quantized_or_left_out_by_a_rule() -> None:
    assert _warned(TinyDenoiser().eval(), fast_config()) == []
    config = fast_config()
    config["quant_cfg"] += [
        {"quantizer_name": f"{name}.*", "enable": False} for name in ("spare", "other", "derived", "conv1")
    ]
    assert _warned(_Model().eval(), config) == []


def test_torchs_own_attention_does_not_run_its_last_layer() -> None:
    class Attending(TinyDenoiser):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, sample: Tensor, timestep: Tensor | float, context: Tensor | None = None) -> Tensor:
            tokens = torch.ones(len(sample), 4, 8)
            return super().forward(sample, timestep, context) + self.attention(tokens, tokens, tokens)[0].sum()

    found = unquantized_layers(mtq.quantize(Attending().eval(), fast_config(), loop(calls())))
    assert found == {"attention.out_proj": "torch.nn.MultiheadAttention computes with its weights without running it"}
