"""The plots of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastrm.reports.runs import Run, differing, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, which colour-blind readers tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


class Plot(NamedTuple):
    """One figure: curves of some metrics over the epochs."""

    name: str
    title: str
    caption: str
    panels: tuple[tuple[str, tuple[str, ...]], ...]
    """For each panel its axis and its metrics; a second metric is dashed, a third dotted."""


PLOTS = (
    Plot(
        "loss",
        "Loss",
        "The whole loss, the method's own part, and the residual term before its weight.",
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
        "Student solid, teacher dashed; on images that are not trained on.",
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
        "Images a second between logged steps, evaluations and checkpoints left out.",
        (("images a second", ("images_per_second",)),),
    ),
)


def draw(plot: Plot, runs: Sequence[Run]) -> Figure | None:
    """The figure, with a panel for each axis that any run has recorded something for; None without any."""
    from matplotlib.figure import Figure

    panels = [(axis, metrics) for axis, metrics in plot.panels if any(r.series(m)[0] for r in runs for m in metrics)]
    if not panels:
        return None
    figure = Figure(figsize=(4.6 * len(panels) + 0.6, 3.4), layout="constrained")
    names = differing(runs)
    for place, (axis, metrics) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for run, colour in zip(runs, COLOURS * len(runs), strict=False):
            for metric, style in zip(metrics, ("-", "--", ":"), strict=False):
                epochs, values = run.series(metric)
                text = label(run, names) if metric == metrics[0] else None
                marker = "." if len(epochs) < 30 else None
                axes.plot(epochs, values, color=colour, linestyle=style, marker=marker, label=text)
        axes.set_xlabel("epoch")
        axes.set_ylabel(axis)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(runs) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 2), frameon=False)
    return figure
