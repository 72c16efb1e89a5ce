"""Formulas of a page ($...$, $$...$$), drawn in its text when the site is built: no page needs a script for them."""

from __future__ import annotations

import re

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath

SIZE = 100.0  # units of the drawing in an em
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\w$\\])\$(?P<inline>[^\s$](?:[^$]*[^\s$])?)\$(?![\w$])", re.S)
COMMANDS = {Curve.MOVETO: "M", Curve.LINETO: "L", Curve.CURVE3: "Q", Curve.CURVE4: "C", Curve.CLOSEPOLY: "Z"}


def with_formulas(prose: str) -> str:
    """Markdown without code, its formulas drawn. Raises ValueError, which names the formula that can't be."""
    return FORMULA.sub(_drawn, prose)


def _drawn(match: re.Match[str]) -> str:
    formula = " ".join((match["block"] or match["inline"]).split())
    if match["block"]:
        return f'<div class="formula">{svg(formula)}</div>'
    return svg(formula)


def svg(formula: str) -> str:
    """A formula in the colour and size of the text around it, on its line."""
    path = TextPath((0, 0), f"${formula}$", size=SIZE, prop=FontProperties(math_fontfamily="stix"))
    box = path.get_extents().padded(2)
    curve = "".join(_command(points.reshape(-1, 2), int(code)) for points, code in path.iter_segments())
    label = "".join(one if one.isalnum() or one == " " else f"&#{ord(one)};" for one in formula)
    place = f"height: {box.height / SIZE:.3f}em; vertical-align: {box.y0 / SIZE:.3f}em"
    view = f"{box.x0:.0f} {-box.y1:.0f} {box.width:.0f} {box.height:.0f}"
    drawn = f'<path fill="currentColor" d="{curve}"/>'
    return f'<svg role="img" aria-label="{label}" viewBox="{view}" style="{place}">{drawn}</svg>'


def _command(points: np.ndarray, code: int) -> str:
    """A piece of the curve as SVG has it, whose y points down."""
    numbers = "" if code == Curve.CLOSEPOLY else " ".join(f"{x:.0f} {-y:.0f}" for x, y in points)
    return COMMANDS[np.uint8(code)] + numbers
