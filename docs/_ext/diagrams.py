"""Diagrams of the pages: inline SVG in the text's own colour, so that they follow light and dark."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

_SIZE = 13
_LINE = 17
_ACCENT = "#0a7d5a"


@dataclass
class Box:
    """Of a diagram: its text, lines separated by a line break, and where it stands (left, top, width)."""

    text: str
    x: float
    y: float
    width: float
    accent: bool = False
    dashed: bool = False
    height: float = field(init=False)

    def __post_init__(self) -> None:
        self.height = _LINE * (self.text.count("\n") + 1) + 16

    def draw(self) -> str:
        stroke = _ACCENT if self.accent else "currentColor"
        dash = ' stroke-dasharray="4 3"' if self.dashed else ""
        lines = "".join(
            f'<text x="{self.x + self.width / 2:g}" y="{self.y + 8 + _LINE * (i + 0.76):g}" text-anchor="middle">'
            f"{escape(line)}</text>"
            for i, line in enumerate(self.text.split("\n"))
        )
        fill = f' fill="{_ACCENT}" fill-opacity="0.12"' if self.accent else ' fill="none"'
        return (
            f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="6"{fill} '
            f'stroke="{stroke}" stroke-width="1.4"{dash}/>{lines}'
        )


def _arrow(x1: float, y1: float, x2: float, y2: float, accent: bool = False) -> str:
    colour = _ACCENT if accent else "currentColor"
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="1.4" '
        f'marker-end="url(#{"tip-accent" if accent else "tip"})"/>'
    )


def _note(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-style="italic" opacity="0.85">{escape(text)}</text>'


def _picture(title: str, description: str, width: float, height: float, parts: Sequence[str]) -> str:
    tips = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 10 5 0 10z" fill="{colour}"/></marker>'
        for name, colour in (("tip", "currentColor"), ("tip-accent", _ACCENT))
    )
    return (
        f'<div class="diagram"><svg role="img" aria-label="{escape(title)}. {escape(description)}" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" xmlns="http://www.w3.org/2000/svg" '
        f'font-family="system-ui, sans-serif" font-size="{_SIZE}" '
        f'fill="currentColor"><defs>{tips}</defs>{"".join(parts)}</svg></div>'
    )


def _chain(
    texts: Sequence[tuple[str, float, bool]], y: float, gap: float = 26, x: float = 4
) -> tuple[list[Box], list[str]]:
    boxes: list[Box] = []
    for text, width, accent in texts:
        boxes.append(Box(text, x, y, width, accent))
        x += width + gap
    middle = y + max(box.height for box in boxes) / 2
    for box in boxes:
        box.y = middle - box.height / 2
    arrows = [
        _arrow(a.x + a.width, a.y + a.height / 2, b.x - 1, b.y + b.height / 2) for a, b in itertools.pairwise(boxes)
    ]
    return boxes, [box.draw() for box in boxes] + arrows


def flow() -> str:
    """From the torch model to the engine."""
    _, parts = _chain(
        [
            ("torch model", 100, False),
            ("mtq.quantize\ncalibrates over time", 150, False),
            ("ScaleTable\n[K times × Q quantizers]", 180, True),
            ("ONNX graph\nreference", 100, False),
            ("lowering\nratio or plugin", 120, False),
            ("engine,\nOpenVINO", 84, False),
        ],
        20,
    )
    return _picture(
        "The way of a model",
        "A torch model is quantized by ModelOpt's call, which ends in a ScaleTable; the exported reference graph is "
        "lowered and built.",
        880,
        90,
        parts,
    )


def lookup() -> str:
    """One row of the table, looked up by the time, serves all quantizers of a call."""
    parts: list[str] = []
    columns, x0, y0 = ("q₁", "q₂", "q₃", "…"), 150, 34
    for row, time in enumerate(("0", "50", "…", "500", "…", "950")):
        chosen = time == "500"
        y = y0 + 24 * row
        parts.append(f'<text x="{x0 - 14}" y="{y + 16}" text-anchor="end">{time}</text>')
        for column in range(4):
            fill = f' fill="{_ACCENT}" fill-opacity="0.3"' if chosen else ' fill="none"'
            parts.append(f'<rect x="{x0 + 46 * column}" y="{y}" width="46" height="24"{fill} stroke="currentColor"/>')
    parts += [
        f'<text x="{x0 + 46 * i + 23}" y="{y0 - 8}" text-anchor="middle">{name}</text>'
        for i, name in enumerate(columns)
    ]
    time = Box("t = 487", 4, y0 + 24 * 3 - 4, 76, accent=True)
    parts += [time.draw(), _note(x0 - 14, y0 - 8, "time", "end"), _arrow(82, y0 + 84, x0 - 44, y0 + 84, accent=True)]
    right = x0 + 46 * 4
    for index, name in enumerate(("layer 1", "layer 2", "layer 3")):
        box = Box(f"{name}: s(t), s(t)/s_ref", right + 90, y0 + 48 * index, 190)
        parts += [box.draw(), _arrow(right + 2, y0 + 84, box.x - 2, box.y + box.height / 2, accent=True)]
    parts.append(
        _note(4, y0 + 172, "The nearest row; one lookup per call of the model, whatever the number of quantizers.")
    )
    return _picture(
        "The lookup",
        "A table with a row per time and a column per quantizer; the row nearest to the time of the call is read once "
        "and serves every layer.",
        630,
        220,
        parts,
    )


def ratio() -> str:
    """The reference graph of a layer, and what the ratio lowering makes of it."""
    parts = [_note(4, 16, "reference: what it means (ONNX Runtime; other backends fall back to float here)")]
    first = [
        ("x", 34, False),
        ("Quantize\nscale s(t)", 96, True),
        ("Dequantize\nscale s(t)", 100, True),
        ("Conv or MatMul\nweights Dequantize", 150, False),
        ("Add\nbias", 60, False),
    ]
    _, drawn = _chain(first, 28)
    parts += drawn
    parts.append(_note(4, 126, "ratio: the same codes, constant quantize scales, so that INT8 and FP8 kernels stay"))
    second = [
        ("x", 34, False),
        ("Div\ns(t)", 60, True),
        ("Quantize\nscale 1", 80, False),
        ("Dequantize\nscale s_ref", 96, False),
        ("Conv or MatMul\nno bias", 124, False),
        ("Mul\ns(t) / s_ref", 90, True),
        ("Add\nbias", 60, False),
    ]
    boxes, drawn = _chain(second, 138, gap=22)
    parts += drawn
    left, right = boxes[2].x - 8, boxes[4].x + boxes[4].width + 8
    parts.append(
        f'<rect x="{left:g}" y="130" width="{right - left:g}" height="66" rx="8" fill="none" stroke="currentColor" '
        'stroke-dasharray="5 4" opacity="0.7"/>'
    )
    parts.append(_note((left + right) / 2, 214, "one low-precision kernel, as in the static graph", "middle"))
    return _picture(
        "The ratio lowering",
        "Instead of quantizing with the scale of the time, the input is divided by it, quantized with scale one, "
        "dequantized with a constant reference scale; behind the product the result is multiplied by the ratio of the "
        "two scales.",
        720,
        224,
        parts,
    )


def offset() -> str:
    """Asymmetric quantization with zero points of zero."""
    texts = [
        ("x", 34, False),
        ("Pad\nwith 0", 62, False),
        ("Sub\no(t)", 56, True),
        ("Div\ns(t)", 56, True),
        ("Quantize 1\nDequantize s_ref", 124, False),
        ("Conv\nno padding", 88, False),
        ("Mul\ns(t) / s_ref", 90, True),
        ("Add  bias\n+ o(t)·Σw", 84, True),
    ]
    _, parts = _chain(texts, 10, gap=20)
    return _picture(
        "An offset",
        "The input is padded explicitly, the offset of the time is subtracted before the division, and what it "
        "contributes to every output channel is added with the bias.",
        750,
        70,
        parts,
    )


def svg(name: str) -> str:
    """A diagram by its name."""
    return {"flow": flow, "lookup": lookup, "ratio": ratio, "offset": offset}[name]()
