"""``python graphs.py reference.onnx ratio.onnx``: the two graphs for the comparison layer by layer.

Writes reference_codes.onnx, which also returns the codes of every quantizer, and ratio_layers.onnx, whose layers
compute with codes that they are given, and return their own.
"""

import sys
from pathlib import Path

import onnx

from modelopt_tdq.compare import returning_codes, with_given_codes

reference, lowered = (Path(name) for name in sys.argv[1:])
onnx.save(returning_codes(onnx.load(reference)), reference.with_name(f"{reference.stem}_codes.onnx"))
cut = with_given_codes(onnx.load(lowered), onnx.load(reference))
onnx.save(cut, lowered.with_name(f"{lowered.stem}_layers.onnx"))
