"""Writing an ONNX file: tensor by tensor, checked, and moved into place with the file of its weights.

Graph and weights are written apart, and ONNX's checker reads the graph alone: of a file that holds the weights it would
make two copies in memory. Up to 1 GiB, graph and weights are then joined, piece by piece; larger weights stay beside.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from modelopt_tdq.core.files import replacing
from modelopt_tdq.errors import TdqError, require

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["EXTERNAL_DATA_ABOVE", "STAYS_IN_GRAPH", "write_onnx"]

#: A protobuf file ends at 2 GiB; larger weights go into a file beside it.
EXTERNAL_DATA_ABOVE = 1 << 30

#: Bytes of a tensor that stays in the graph: the checker has to know numbers that are sizes.
STAYS_IN_GRAPH = 1 << 16

#: Bytes that are copied at a time.
_PIECE = 1 << 24


def write_onnx(model: ir.Model, target: Path, *, apart: bool = False) -> None:
    """Write a graph, which stays as it is. The files appear when they are complete and ONNX's checker has passed them.

    Args:
        model: The graph. One of its weights at a time is in memory, where they are lazy or read from files.
        target: The ONNX file; weights of more than 1 GiB lie beside it, in ``<name>.data``.
        apart: Leave smaller ones there, too.

    Raises:
        TdqError: The graph does not pass the checker.
    """
    ir, onnx = require("onnx_ir", "onnx"), require("onnx", "onnx")
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data, graph = target.with_name(f"{target.name}.data"), target.with_name(f"{target.name}.graph")
    with replacing(data, graph, target) as (weights, partial, complete):
        ir.save(model, partial, external_data=data.name, size_threshold_bytes=STAYS_IN_GRAPH)
        try:
            onnx.checker.check_model(str(partial), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise TdqError(
                "path", str(target), f"the graph did not pass ONNX's checker ({error})", "Report this"
            ) from error
        if apart or size > EXTERNAL_DATA_ABOVE:
            partial.rename(complete)
        else:
            with complete.open("wb") as file:
                _join(onnx.load(str(partial), load_external_data=False), weights, file)
            for part in (partial, weights):
                part.unlink(missing_ok=True)


def _join(model: onnx.ModelProto, weights: Path, file: IO[bytes]) -> None:
    """Write ``model`` with its external tensors inside: protobuf has messages in messages, each behind its length."""
    onnx: Any = require("onnx", "onnx")
    heads, places = [], []
    for tensor in model.graph.initializer:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        place = (int(facts.get("offset", 0)), int(facts["length"])) if facts else None
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        head = tensor.SerializeToString()
        if place is not None:
            head += _start(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, place[1])
        heads.append(_start(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + (place or (0, 0))[1]) + head)
        places.append(place)
    model.graph.ClearField("initializer")
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    size = len(graph) + sum(map(len, heads)) + sum(place[1] for place in places if place is not None)
    file.write(model.SerializeToString() + _start(onnx.ModelProto.GRAPH_FIELD_NUMBER, size) + graph)
    for head, place in zip(heads, places, strict=True):
        file.write(head)
        if place is not None:
            _copy(weights, place, file)


def _start(field: int, length: int) -> bytes:
    """What stands in front of a field of protobuf that has a length."""
    return _varint(field << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _copy(source: Path, place: tuple[int, int], file: IO[bytes]) -> None:
    offset, left = place
    with source.open("rb") as opened:
        opened.seek(offset)
        while left and (piece := opened.read(min(left, _PIECE))):
            file.write(piece)
            left -= len(piece)
