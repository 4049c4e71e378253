"""The plots of a report."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastrm.reports.maps import Map
from fastrm.reports.runs import Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Okabe and Ito's palette, which colour-blind readers can distinguish.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES = (("solid", "circle"), ("dash", "diamond-open"), ("dot", "x"))
"""Line and marker of the first metric of a panel, of the second and of the third."""
_MARKS = tuple(product(("circle", "diamond", "x"), COLOURS))
"""Symbol and colour of each label of a map; further labels use these again."""
_NAME = 60
"""Last characters of an image's name that are shown."""
FEW = 30
"""Points below which a curve shows each of them."""


class Plot(NamedTuple):
    """One figure: metrics over the epochs."""

    name: str
    title: str
    caption: str
    panels: tuple[tuple[str, tuple[str, ...]], ...]
    """The axis of each panel, and its metrics."""


PLOTS = (
    Plot(
        "loss",
        "Loss",
        "The whole loss, the method's own part, and the residual term before its weight. With a queue "
        "(MoCo-v2, DenseCL) the loss rises at first: the random keys in a new queue are easier than real ones.",
        (("loss", ("loss",)), ("method's own", ("contrastive",)), ("residual", ("residual",))),
    ),
    Plot(
        "gap",
        "Gap between student and teacher",
        "1 - mean cosine between student and teacher on the same view.",
        (("gap", ("gap",)),),
    ),
    Plot(
        "knn",
        "kNN accuracy",
        "Student: solid line, filled dots. Teacher: dashed line, open diamonds. On images that are not trained on.",
        (
            ("accuracy, k = 20", ("knn_student", "knn_teacher")),
            ("accuracy, k = 200", ("knn200_student", "knn200_teacher")),
        ),
    ),
    Plot(
        "online",
        "Online linear classifier",
        "Trained along on the student's detached features: on the training views, and on the test images.",
        (("training accuracy", ("online_accuracy",)), ("test accuracy", ("linear_student",))),
    ),
    Plot(
        "schedule",
        "Learning rate and teacher momentum",
        "What the optimizer and the teacher were given at each logged step.",
        (("learning rate", ("lr",)), ("teacher momentum", ("teacher_momentum",))),
    ),
    Plot(
        "collapse",
        "Collapse watch",
        "Spread of the student's features (near 0 when all images look the same) and their effective rank.",
        (("feature spread", ("feature_std",)), ("effective rank", ("effective_rank",))),
    ),
    Plot(
        "throughput",
        "Throughput",
        "Images per second between logged steps, evaluations and checkpoints left out.",
        (("images per second", ("images_per_second",)),),
    ),
)


def draw(plot: Plot, runs: Sequence[Run]) -> list[Figure]:
    """A chart for each panel that any run has recorded something for."""
    import plotly.graph_objects as go

    charts = []
    for axis, metrics in plot.panels:
        chart = go.Figure()
        for run, colour in zip(runs, COLOURS * len(runs), strict=False):
            for metric, (dash, symbol) in zip(metrics, STYLES, strict=False):
                epochs, values = run.series(metric)
                if not epochs:
                    continue
                chart.add_scatter(
                    x=epochs,
                    y=values,
                    mode="lines+markers" if len(epochs) < FEW else "lines",
                    line={"color": colour, "dash": dash, "width": 1.8},
                    marker={"symbol": symbol, "size": 6},
                    name=html.escape(metric if len(runs) == 1 else f"{run.name}, {metric}"),
                )
        if chart.data:
            chart.update_layout(
                template="plotly_white",
                height=320,
                margin={"l": 60, "r": 10, "t": 10, "b": 45},
                showlegend=False,
                hovermode="x unified",
                xaxis_title="epoch",
                yaxis_title=axis,
            )
            charts.append(chart)
    return charts


def draw_map(shown: Map) -> Figure:
    """A chart of the images as points: a curve per label, which a click in the legend hides."""
    import plotly.graph_objects as go

    chart = go.Figure()
    labels = np.zeros(len(shown.points), dtype=np.int64) if shown.labels is None else shown.labels
    names = np.array([html.escape(name[-_NAME:]) for name in shown.names], dtype=object)
    label = "" if shown.labels is None else "<br>label %{customdata}"
    known, ranks = np.unique(labels, return_inverse=True)
    for group in np.unique(ranks % len(_MARKS)):
        rows = ranks % len(_MARKS) == group
        symbol, colour = _MARKS[group]
        chart.add_scatter(
            x=shown.points[rows, 0],
            y=shown.points[rows, 1],
            text=names[rows],
            customdata=labels[rows],
            hovertemplate=f"%{{text}}{label}<extra></extra>",
            mode="markers",
            marker={"symbol": symbol, "color": colour, "size": 5, "opacity": 0.7},
            name=f"{labels[rows][0]}",
        )
    chart.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 10, "t": 10, "b": 45},
        showlegend=shown.labels is not None and len(known) <= len(_MARKS),
        legend={"orientation": "h", "yref": "container", "y": 0, "title": "label", "itemsizing": "constant"},
        hovermode="closest",
        xaxis_title=shown.axes[0],
        yaxis={"title": shown.axes[1], "scaleanchor": "x"},
    )
    return chart
