"""Plots what a run of examples/cifar10.py learns per hour of processor time.

    python -m benchmarks.learning runs/cifar10

Writes the points of its kNN curve, and draws them with the raw pixels and the untrained network as baselines. If the
run is not complete, the baselines are scored here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks._study import ROOT, curve, made, save
from examples.cifar10 import SmallResNet
from fastrm.data import open_source
from fastrm.data.settling import settled
from fastrm.files import read_json, write_json
from fastrm.pretrained import open_pretrained
from fastrm.probes import Pixels, frozen_scores
from fastrm.probes.features import Setting
from fastrm.reports.plots import COLOURS
from fastrm.run.results import SUMMARY
from fastrm.terminal import shell

BESIDE = {"pixels": "the raw pixels", "untrained": "the untrained network"}


def beside(run: Path) -> dict[str, float]:
    """kNN accuracy of the raw pixels and of the untrained network, on the images of a run."""
    if (run / SUMMARY).exists():
        summary = read_json(run / SUMMARY)
        return {name: summary[f"knn_{name}"] for name in BESIDE}
    trained = open_pretrained(run, torch.device("cpu"), arch=SmallResNet())
    assert trained.settings is not None
    networks: dict[str, nn.Module] = {"pixels": Pixels(), "untrained": trained.untrained()}
    source, setting = (
        settled(open_source(trained.settings["data"])),
        Setting(trained.image_size, torch.device("cpu"), 0),
    )
    found = frozen_scores(networks, source, setting, knn=True)
    return {name: scores["knn20"].value for name, scores in found.items()}


def learned(run: Path) -> dict[str, Any]:
    """The length of a run, and its evaluations: steps, epochs, hours of processor time, kNN of student and teacher."""
    hours = dict(zip(*curve(run, "cpu_hours"), strict=True))
    steps, students = curve(run, "knn_student")
    epochs, teachers = curve(run, "knn_teacher", by="epoch")
    rows = zip(steps, epochs, students, teachers, strict=True)
    names = ("step", "epoch", "cpu_hours", "knn_student", "knn_teacher")
    points = [dict(zip(names, (step, epoch, round(hours[step], 3), *knn), strict=True)) for step, epoch, *knn in rows]
    return {"epochs": read_json(run / "config.json")["epochs"], "points": points, **beside(run)}


def figure(found: Mapping[str, Any]) -> Figure:
    """Accuracy over the hours."""
    drawn = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = drawn.add_subplot()
    for name, colour in zip(("student", "teacher"), COLOURS, strict=False):
        values = [100 * point[f"knn_{name}"] for point in found["points"]]
        axes.plot([point["cpu_hours"] for point in found["points"]], values, ".-", color=colour, label=name)
    for (name, label), style in zip(BESIDE.items(), ("--", ":"), strict=True):
        axes.axhline(100 * found[name], color="black", linestyle=style, label=label)
    axes.set(
        xlabel="hours of one core", ylabel="kNN accuracy, k = 20, %", title="CIFAR-10, without labels", xlim=(0, None)
    )
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "study" / "cifar10.json", help="for the points")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "images" / "cifar10.svg", help="for the figure")
    options = parser.parse_args(argv)
    found = learned(options.run)
    write_json(options.json, {**found, **made()})
    save(figure(found), options.svg)


if __name__ == "__main__":
    shell.run(main)
