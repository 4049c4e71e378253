"""Maps of images: files that fastrm.embed writes, as a picture, or as points that the report draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastrm import own
from fastrm.errors import UsageError
from fastrm.files import check_folder, read_json, write_json, writing
from fastrm.version import __version__

POINTS = ".json"
"""Ending of a file with the points of a map; other endings are those of pictures."""
_LEGEND = 20
"""Largest number of labels that a picture names."""


class Map(NamedTuple):
    """M images as points in a plane, near each other if the network takes them for similar."""

    about: str
    """Which images they are, and by which features."""
    axes: tuple[str, str]
    points: NDArray[np.float64]
    """[M, 2], finite."""
    names: list[str]
    """A name per image."""
    labels: NDArray[np.int64] | None
    """[M]; None without labels."""


def check(flag: str, path: Path) -> None:
    """Raise a UsageError if a map cannot be written to this file, or would replace a file of the user's."""
    from fastrm.data import sheets  # which a report, that only reads, need not wait for

    if path.suffix != POINTS:
        if path.suffix.lower() not in own.SHEET_FORMATS:
            endings = ", ".join(own.SHEET_FORMATS)
            raise UsageError(f"{flag} {path} must end in {endings}, or in {POINTS} for the report")
        return sheets.check(flag, path)
    check_folder(flag, path)
    own.require(flag, path, own.points, what="a map")
    return None


def save(flag: str, path: Path, shown: Map) -> None:
    """Write a map, whole: as a picture, or as points.

    Raises:
        UsageError: it cannot be written.
    """
    from fastrm.data import sheets

    check(flag, path)
    if path.suffix != POINTS:
        return sheets.save(flag, path, _picture(shown))
    x, y = ([float(f"{value:.5g}") for value in column] for column in shown.points.T)
    labels = None if shown.labels is None else shown.labels.tolist()
    content = {"about": shown.about, "axes": shown.axes, "names": shown.names, "labels": labels, "x": x, "y": y}
    with writing(path, flag):
        write_json(path, {own.MARK: __version__, own.MAP: content})
    return None


def read(path: Path) -> Map:
    """Read the points that :func:`save` wrote.

    Raises:
        UsageError: the file was changed or damaged.
    """
    try:
        found: dict[str, Any] = read_json(path)[own.MAP]
        points = np.array([found["x"], found["y"]], dtype=np.float64).T
        labels = None if found["labels"] is None else np.array(found["labels"], dtype=np.int64)
        names, (first, second) = [str(name) for name in found["names"]], map(str, found["axes"])
        if not len(points) == len(names) == len(points if labels is None else labels):
            raise ValueError("columns of different lengths")
        return Map(str(found["about"]), (first, second), points, names, labels)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as a map: {error}; move it away") from None


def _picture(shown: Map) -> Image.Image:
    """The map as a picture, coloured by label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    if shown.labels is None:
        axes.scatter(shown.points[:, 0], shown.points[:, 1], s=6, linewidths=0)
    else:
        drawn = axes.scatter(shown.points[:, 0], shown.points[:, 1], s=6, linewidths=0, c=shown.labels, cmap="tab20")
        labels = np.unique(shown.labels)
        if len(labels) <= _LEGEND:
            keys = drawn.legend_elements(num=labels)
            axes.legend(*keys, title="label", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel=shown.axes[0], ylabel=shown.axes[1], aspect="equal")
    figure.suptitle(shown.about, wrap=True, fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
