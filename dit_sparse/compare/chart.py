"""Drawings of lines, markers and text that are written as PNG and as SVG alike, and axes for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

from dit_sparse.partials import replacing

__all__ = ["INK", "MARKERS", "Axes", "Drawing", "text_width", "ticks"]

Point = tuple[float, float]

INK, FAINT, PAPER = "#232323", "#dddddd", "#ffffff"
MARKERS = ("circle", "square", "triangle", "diamond", "down", "plus", "cross", "hexagon")
_SCALE = 3
"""A PNG is drawn larger and made smaller, which smooths its edges."""


@dataclass(frozen=True)
class _Line:
    points: tuple[Point, ...]
    colour: str
    width: float
    dashed: bool = False
    closed: bool = False
    fill: str | None = None


@dataclass(frozen=True)
class _Text:
    at: Point
    text: str
    size: float
    anchor: str
    colour: str
    turned: bool


@dataclass
class Drawing:
    """Shapes on white, in pixels from the upper left corner."""

    width: int
    height: int
    title: str
    shapes: list[_Line | _Text] = field(default_factory=list)

    def line(self, points: Sequence[Point], colour: str = INK, width: float = 1, *, dashed: bool = False) -> None:
        """A line through `points`; fewer than two make none."""
        if len(points) > 1:
            self.shapes.append(_Line(tuple(points), colour, width, dashed))

    def box(self, corner: Point, other: Point, colour: str) -> None:
        """The outline of a rectangle."""
        (x, y), (u, v) = corner, other
        self.shapes.append(_Line(((x, y), (u, y), (u, v), (x, v)), colour, 1, closed=True))

    def marker(self, at: Point, shape: str, colour: str, radius: float = 5) -> None:
        """One of `MARKERS`, with a white rim that sets it off from others."""
        if shape in ("plus", "cross"):
            turn = 0 if shape == "plus" else math.pi / 4
            for angle in (turn, turn + math.pi / 2):
                dx, dy = radius * math.cos(angle), radius * math.sin(angle)
                self.line([(at[0] - dx, at[1] - dy), (at[0] + dx, at[1] + dy)], colour, 2.5)
            return
        corners, turn = _CORNERS[shape]
        # Few corners cover little.
        radius *= 1.3 if corners == 3 else 1.1 if corners == 4 else 1
        angles = (turn + 2 * math.pi * corner / corners for corner in range(corners))
        points = tuple((at[0] + radius * math.cos(a), at[1] + radius * math.sin(a)) for a in angles)
        self.shapes.append(_Line(points, PAPER, 1, closed=True, fill=colour))

    def text(
        self, at: Point, text: str, size: float = 12, anchor: str = "start", colour: str = INK, *, turned: bool = False
    ) -> None:
        """A line of text whose start, middle or end is at `at`, half its height above it; turned, it runs upwards."""
        self.shapes.append(_Text(at, text, size, anchor, colour, turned))

    def save_png(self, path: Path) -> None:
        """Write a PNG, through a temporary name."""
        size = (self.width * _SCALE, self.height * _SCALE)
        image = Image.new("RGB", size, PAPER)
        pen = ImageDraw.Draw(image)
        for shape in self.shapes:
            if isinstance(shape, _Text):
                _draw_text(image, pen, shape)
            else:
                _draw_line(pen, shape)
        small = image.resize((self.width, self.height), Image.Resampling.LANCZOS)
        with replacing(path) as partial:
            small.save(partial, format="PNG", optimize=True)

    def save_svg(self, path: Path) -> None:
        """Write an SVG, through a temporary name."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
        head += f'viewBox="0 0 {self.width} {self.height}" role="img" font-family="Helvetica, Arial, sans-serif">'
        lines = [head, f"<title>{escape(self.title)}</title>", f'<rect width="100%" height="100%" fill="{PAPER}"/>']
        lines += [_svg_text(shape) if isinstance(shape, _Text) else _svg_line(shape) for shape in self.shapes]
        with replacing(path) as partial:
            partial.write_text("\n".join([*lines, "</svg>"]) + "\n", "utf-8")


_CORNERS = {
    "circle": (24, 0.0),
    "square": (4, math.pi / 4),
    "triangle": (3, -math.pi / 2),
    "diamond": (4, 0.0),
    "down": (3, math.pi / 2),
    "hexagon": (6, 0.0),
}


@dataclass(frozen=True)
class Axes:
    """A plot's rectangle on a drawing, and the values at its edges.

    Args:
        drawing: what is drawn on.
        left, top, right, bottom: of the rectangle, in pixels.
        x, y: least and largest value.
    """

    drawing: Drawing
    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> Point:
        """Where the values `x` and `y` are, in pixels."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def frame(self, title: str, x_label: str, y_label: str, x_form: str = "{:g}") -> None:
        """Draw the rectangle, a grid with numbers, and the labels."""
        for value in ticks(*self.x):
            place, _ = self.at(value, self.y[0])
            self.drawing.line([(place, self.top), (place, self.bottom)], FAINT)
            self.drawing.text((place, self.bottom + 14), x_form.format(value), 12, "middle")
        for value in ticks(*self.y):
            _, place = self.at(self.x[0], value)
            self.drawing.line([(self.left, place), (self.right, place)], FAINT)
            self.drawing.text((self.left - 8, place), f"{value:g}", 12, "end")
        self.drawing.box((self.left, self.top), (self.right, self.bottom), INK)
        middle = (self.left + self.right) / 2
        self.drawing.text((middle, self.top - 16), title, 14, "middle")
        self.drawing.text((middle, self.bottom + 36), x_label, 13, "middle")
        self.drawing.text((self.left - 44, (self.top + self.bottom) / 2), y_label, 13, "middle", turned=True)


def ticks(least: float, largest: float, about: int = 6) -> list[float]:
    """Round numbers from `least` to `largest`, `about` as many."""
    rough = (largest - least) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(least / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(largest / step + 1e-9) + 1)]


def text_width(text: str, size: float) -> float:
    """Pixels that `text` takes."""
    return _font(size).getlength(text)


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_line(pen: ImageDraw.ImageDraw, line: _Line) -> None:
    points = [(x * _SCALE, y * _SCALE) for x, y in line.points]
    width = max(1, round(line.width * _SCALE))
    if line.fill is not None:
        pen.polygon(points, fill=line.fill)
    if line.closed:
        points.append(points[0])
    for piece in _dashes(points, 5 * _SCALE) if line.dashed else [points]:
        pen.line(piece, fill=line.colour, width=width, joint="curve")


def _dashes(points: Sequence[Point], length: float) -> list[list[Point]]:
    """Every other stretch of `length` of each part of a line."""
    pieces = []
    for (x, y), (u, v) in pairwise(points):
        whole = math.hypot(u - x, v - y)
        for start in range(0, math.ceil(whole / length), 2):
            ends = (start * length / whole, min(1.0, (start + 1) * length / whole))
            pieces.append([(x + (u - x) * share, y + (v - y) * share) for share in ends])
    return pieces


def _draw_text(image: Image.Image, pen: ImageDraw.ImageDraw, text: _Text) -> None:
    font, at = _font(text.size * _SCALE), (text.at[0] * _SCALE, text.at[1] * _SCALE)
    if not text.turned:
        pen.text(at, text.text, text.colour, font, anchor={"start": "lm", "middle": "mm", "end": "rm"}[text.anchor])
        return
    size = (math.ceil(font.getlength(text.text)) + 4, round(text.size * _SCALE * 1.6))
    own = Image.new("RGB", size, PAPER)
    ImageDraw.Draw(own).text((size[0] / 2, size[1] / 2), text.text, text.colour, font, anchor="mm")
    own = own.rotate(90, expand=True)
    image.paste(own, (round(at[0] - own.width / 2), round(at[1] - own.height / 2)))


def _svg_line(line: _Line) -> str:
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in line.points)
    dash = ' stroke-dasharray="5"' if line.dashed else ""
    kind = "polygon" if line.closed else "polyline"
    look = f'fill="{line.fill or "none"}" stroke="{line.colour}" stroke-width="{line.width:g}" stroke-linejoin="round"'
    return f'<{kind} points="{points}" {look}{dash}/>'


def _svg_text(text: _Text) -> str:
    x, y = text.at
    turn = f' transform="rotate(-90 {x:.2f} {y:.2f})"' if text.turned else ""
    place = f'x="{x:.2f}" y="{y:.2f}" text-anchor="{text.anchor}" dominant-baseline="central"'
    return f'<text {place} font-size="{text.size:g}" fill="{text.colour}"{turn}>{escape(text.text)}</text>'
