"""Labels of points in a figure that do not cover one another, and colours and markers that tell codecs apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""
Colour = tuple[float, float, float, float]
Point = tuple[float, float, str, Colour]
MARKERS = {"2": "v", "3": "s", "4": "o", "8": "D", "": "^"}
"""By the digit in a codec's name: its bits."""
POINTS = 8
"""Size of the letters."""


def family(codec: str) -> str:
    """The name without its bits: "tq" of "tq4". A pair is a family of its own."""
    found = re.fullmatch(r"([a-z]+)\d?(-\w+)?", codec)
    return found[1] if found else codec


def colour(codec: str, codecs: Sequence[str]) -> Colour:
    """One colour for a family; the families of `codecs` in their order."""
    from matplotlib import colormaps

    families = list(dict.fromkeys(map(family, codecs)))
    name = family(codec)
    place = families.index(name) if name in families else len(families)
    return colormaps["tab10" if len(families) < 10 else "tab20"](place)


def marker(codec: str) -> str:
    """One marker for codecs of as many bits; a plus for a pair."""
    if "/" in codec:
        return "P"
    digit = re.search(r"\d", codec)
    return MARKERS.get(digit[0] if digit else "", "^")


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], bounds: Box, gap: float = 6
) -> list[tuple[float, float]]:
    """The lower left corner of a label for each point: the nearest place that covers no point and no other label.

    points    in pixels, as everything here
    sizes     width and height of each label
    bounds    no label leaves this box
    gap       between a point and its label
    Returns   corners; a label that finds no free place takes its first one
    """
    dots = [(x - gap, y - gap, x + gap, y + gap) for x, y in points]
    corners = [(0.0, 0.0)] * len(points)
    taken: list[Box] = []
    # The crowded ones choose first.
    for i in sorted(range(len(points)), key=lambda i: (_distance_of_nearest(points, i), i)):
        (x, y), (width, height) = points[i], sizes[i]
        others = [*taken, *(dot for j, dot in enumerate(dots) if j != i)]
        boxes = [(a, b, a + width, b + height) for a, b in _candidates(x, y, width, height, gap)]
        free = (box for box in boxes if _inside(box, bounds) and not any(_overlap(box, other) for other in others))
        chosen = next(free, boxes[0])
        taken.append(chosen)
        corners[i] = chosen[:2]
    return corners


def spread_out(heights: Sequence[float], distance: float) -> list[float]:
    """Heights in the same order, at least `distance` apart: those that are too close move away from their mean."""
    groups: list[list[int]] = []

    def middle(group: list[int]) -> float:
        return sum(heights[i] for i in group) / len(group)

    for i in sorted(range(len(heights)), key=lambda i: (heights[i], i)):
        groups.append([i])
        while len(groups) > 1:
            below, above = groups[-2:]
            if middle(above) - middle(below) >= distance * (len(below) + len(above)) / 2:
                break
            groups[-2:] = [below + above]
    found = [0.0] * len(heights)
    for group in groups:
        for step, i in enumerate(group):
            found[i] = middle(group) + (step - (len(group) - 1) / 2) * distance
    return found


def _candidates(x: float, y: float, width: float, height: float, gap: float) -> Iterator[tuple[float, float]]:
    """Corners around a point, the near ones first: right, left, above, below and between, in growing rings."""
    for ring in range(1, 25):
        far = ring * gap
        for across, up in ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1)):
            left = x + far if across > 0 else x - far - width if across < 0 else x - width / 2
            bottom = y + far if up > 0 else y - far - height if up < 0 else y - height / 2
            yield left, bottom


def _distance_of_nearest(points: Sequence[tuple[float, float]], i: int) -> float:
    x, y = points[i]
    return min((abs(x - a) + abs(y - b) for j, (a, b) in enumerate(points) if j != i), default=0.0)


def _inside(box: Box, bounds: Box) -> bool:
    return bounds[0] <= box[0] and bounds[1] <= box[1] and box[2] <= bounds[2] and box[3] <= bounds[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def label_points(axes: Axes, points: Sequence[Point], in_column: bool = False) -> list[Box]:
    """Writes labels beside their points, with a line to those further off. The layout must be done.

    points      (x, y, label, colour), x and y in the data's units
    in_column   the labels stand on the right of the points, which have one x, in their order
    Returns     the boxes of the labels, in pixels
    """
    scale = axes.figure.dpi / 72
    gap, height = 6 * scale, 1.2 * POINTS * scale
    pixels = [tuple(axes.transData.transform((x, y))) for x, y, _, _ in points]
    sizes = [(0.62 * POINTS * scale * len(label), height) for _, _, label, _ in points]
    if in_column:
        heights = spread_out([y for _, y in pixels], height)
        corners = [(x + 4 * gap, middle - height / 2) for (x, _), middle in zip(pixels, heights, strict=True)]
    else:
        frame = axes.get_window_extent()
        corners = place(pixels, sizes, (frame.x0, frame.y0, frame.x1, frame.y1), gap)
    boxes = []
    for (x, y, label, shade), pixel, (left, bottom), (width, _) in zip(points, pixels, corners, sizes, strict=True):
        right, middle = left + width, bottom + height / 2
        far = max(left - pixel[0], pixel[0] - right, abs(middle - pixel[1]) - height / 2) > 1.5 * gap
        line = {"arrowstyle": "-", "color": shade, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            label, (x, y), ((left - pixel[0]) / scale, (middle - pixel[1]) / scale), textcoords="offset points",
            va="center", fontsize=POINTS, color="0.1", arrowprops=line if far else None,
        ).set_in_layout(False)  # fmt: skip
        boxes.append((left, bottom, right, bottom + height))
    return boxes
