"""What torch's exporter cannot do: which operator or line of code, where, and whether quantization is to blame."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from modelopt_tdq.core.installed import outdated
from modelopt_tdq.errors import TdqError

__all__ = ["ExportError", "cannot_export", "failed_operator", "first_line", "quiet"]

#: Lines of code that a message names.
_READS_SHOWN = 2


class ExportError(Exception):
    """Torch's exporter failed.

    Args:
        cause: Its error.
        program: What torch.export made; None if it failed itself.
        reads: Where the model's code reads numbers that are not known while it is traced.
    """

    def __init__(self, cause: Exception, program: Any, reads: Sequence[str] = ()) -> None:
        super().__init__(str(cause))
        self.cause, self.program, self.reads = cause, program, tuple(reads)


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings that torchvision is not installed and that torch uses old parts of torch."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """Of its message; the error itself if there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def failed_operator(error: BaseException, program: Any) -> tuple[str, str]:
    """The operator that an error of the exporter is about, and the path of its layer; "" for what is not known.

    Args:
        error: Of the exporter, with what caused it.
        program: What torch.export made; None if it failed.
    """
    text = "\n".join(map(str, _causes(error)))
    found = re.search(r"OpOverload\(op='([\w.:]+)'(?:, overload='(\w+)')?\)", text)
    if found is None:
        return "", ""
    operator, overload = found.group(1).replace("::", "."), found.group(2)
    nodes = [] if program is None else [node for node in program.graph.nodes if node.op == "call_function"]
    targets = {node: str(node.target).split(".") for node in nodes}
    wanted = [*operator.split("."), *([overload] if overload else [])]
    exact = [node for node, target in targets.items() if target[: len(wanted)] == wanted]
    same = [node for node, target in targets.items() if target[:2] == wanted[:2]]
    # what torch reports may be the part of a decomposition: prims.zeta of aten.special_zeta
    whole = [node for node, target in targets.items() if len(target) > 1 and target[1].endswith(f"_{wanted[1]}")]
    for node in [*exact, *same, *whole][:1]:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [str(entry[0]).replace("L['self'].", "").removeprefix("model.") for entry in stack.values()]
        return str(node.target), next((path for path in reversed(paths) if path), "")
    return operator, ""


def _causes(error: BaseException) -> list[BaseException]:
    """An error, what caused it, what caused that, ..."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def cannot_export(model: nn.Module, failure: ExportError, plain_fails: Callable[[], bool]) -> TdqError:
    """Name what is in the way, where in the model it is as far as torch tells, and whether quantization is to blame.

    Args:
        model: With markers.
        failure: Of the exporter.
        plain_fails: Whether the model cannot be exported without any quantizer either.
    """
    operator, path = failed_operator(failure.cause, failure.program)
    what = f"operator {operator} in '{path or type(model).__name__}'" if operator else "the model"
    problem = f"{what} cannot be exported to ONNX: {first_line(_causes(failure.cause)[-1])}"
    reads = [] if operator else failure.reads
    if reads:
        problem += (
            f"; its code reads numbers that are computed from the inputs, which a graph does not have before it runs, "
            f"in {' and '.join(reads[:_READS_SHOWN])}"
        )
    old = outdated("onnx")
    if old:
        cure = f"Install versions that this package takes: {', '.join(old)}"
    elif plain_fails():
        problem += "; nor can the model in full precision, so quantization has nothing to do with it"
        cure = "Replace the operator in the model, or try another version of torch and onnxscript"
        if reads:
            cure = (
                "If they follow from an input that is the same in every call, such as a mask, name it in "
                "`constants`; otherwise replace this code in the model"
            )
    else:
        rule = f"{{'quantizer_name': '{path or '<layer>'}*', 'enable': False}}"
        cure = f"In full precision the model can be exported: leave the layer out with the quant_cfg rule {rule}"
    return TdqError("model", type(model).__name__, problem, cure)
