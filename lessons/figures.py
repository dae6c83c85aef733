"""Figures of the lessons: one style, colours that colour-blind readers can tell apart, and the same bytes each time.

    figure, axes = figures.new(8, 3)
    ...
    figures.save(figure, "02_pages-1")          writes img/02_pages-1.svg beside the lessons

A lesson shows the picture in the next Markdown cell, as `![a description](img/02_pages-1.svg)`.
NANOKV_LESSONS_IMG names another folder, so that a check can draw without overwriting the pictures in img/.
"""

from __future__ import annotations

import os
import re
from io import StringIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

# Okabe and Ito 2008: eight colours that remain distinct under every common form of colour blindness.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PINK = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, PALE = "#8A8A8A", "#ECECEC"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY)

HASHED_ID = re.compile(r'(?<=[#"])\w*[0-9a-f]{10}\b')
"""An id that matplotlib has made of a random hash, where it is defined and where it is used."""
_DARK = {BLACK, BLUE, RED, GREEN, GREY}

matplotlib.rcParams.update(
    {
        "svg.fonttype": "path",  # letters are outlines: the reader's machine needs no font
        "font.family": "DejaVu Sans",  # part of matplotlib
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.grid": False,
        "legend.frameon": False,
        "figure.facecolor": "white",
    }
)


def new(width: float, height: float, panels: int = 1, **subplots) -> tuple[Figure, Axes]:
    """A figure, with width and height in inches, and its axes: one, or an array of `panels` side by side."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, panels, **subplots)


def save(figure: Figure, name: str) -> Path:
    """Writes img/NAME.svg without a date or a version, and with numbers for ids, so that an unchanged lesson leaves an
    unchanged file. (With a fixed salt, ids would still be hashes of coordinates, whose last bits depend on the CPU.)
    """
    folder = Path(os.environ.get("NANOKV_LESSONS_IMG") or Path(__file__).parent / "img")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.svg"
    drawn, ids = StringIO(), {}
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    numbered = HASHED_ID.sub(lambda found: ids.setdefault(found[0], f"id{len(ids)}"), drawn.getvalue())
    path.write_text(numbered, "utf-8")
    return path


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    colour: str,
    text: object = "",
    size: float = 8,
) -> None:
    """A filled rectangle with its lower left corner at (x, y), and a text in its middle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1))
    if text != "":
        ink = "white" if colour in _DARK else "black"
        axes.text(x + width / 2, y + height / 2, str(text), ha="center", va="center", color=ink, fontsize=size)


def card(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str, size: float = 9) -> None:
    """A rounded box for a node of a tree: (x, y) is its middle."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=colour, edgecolor=BLACK, linewidth=0.8,
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", color="white" if colour in _DARK else "black", fontsize=size)


def bare(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Turns a plot into a drawing: no frame, no ticks, and the limits `x` and `y`."""
    axes.set(xlim=x, ylim=y, xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
