"""Score a pre-trained backbone, student and teacher side by side.

python -m fastrm.evaluate runs/digits --data digits --knn --gap
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import nn

from fastrm import own
from fastrm.data import Source, sheets
from fastrm.data.scan import counted, scan, unreadable
from fastrm.data.sent import Opened, opened_once
from fastrm.data.settling import formatted
from fastrm.errors import UsageError
from fastrm.evaluated import EVALUATION, rows
from fastrm.files import check_folder, read_json, write_json, writing
from fastrm.machine.device import choose_device
from fastrm.machine.distributed import on_this_machine, own_device, processes, started_first, world
from fastrm.machine.joined import ordinary
from fastrm.machine.meeting import together
from fastrm.machine.memory import enough
from fastrm.methods import LinearProtocol, find, names
from fastrm.pretrained import Pretrained, open_pretrained
from fastrm.probes import Estimate, gap, nearest, picture
from fastrm.probes.features import BATCH, Setting
from fastrm.probes.scored import Scores, scored
from fastrm.settings import command_line
from fastrm.settings.inputs import Workers
from fastrm.settings.kinds import Range, checked
from fastrm.settings.of_run import OfRunAndImages
from fastrm.terminal import shell
from fastrm.version import __version__


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(OfRunAndImages):
    """Score the student and the teacher of a run side by side, beside an untrained network, the weights that the run
    started from, and the raw pixels."""

    eval_images: Annotated[int, Range(at_least=1)] | None = None
    """Largest number of images to build classifiers from, and to test them on.
    From a larger set this many are drawn at random, the same ones each time. If not given, all images."""
    knn: bool = False
    """Weighted kNN accuracy (cosine, temperature 0.07) for k 10, 20, 100 and 200."""
    linear: bool = False
    """Train a linear classifier on the frozen backbone with random crops and flips, as published with the method.
    For methods with a queue, SGD with learning rate 30 for 100 epochs;
    otherwise 0.1 x batch / 256 with batches of 1024 for 90 epochs."""
    linear_quick: bool = False
    """Train a linear classifier on features that are computed once, with the best of six learning rates."""
    linear_epochs: Annotated[int, Range(at_least=1)] | None = None
    """Epochs of --linear. If not given, as published."""
    semi: Annotated[float, Range(above=0, at_most=1)] | None = None
    """Fine-tune the whole network on this fraction of the labels, such as 0.01 or 0.1."""
    transfer: str | None = None
    """Another set of images, on which the quick linear classifier is fitted and scored."""
    gap: bool = False
    """1 - mean cosine between student and teacher on the same image, layer by layer."""
    neighbours: Path | None = None
    """Image file to draw.
    Each row has a test image, and the five nearest images of the bank by the student's features.
    Those of the same class have a green frame."""
    out: Path | None = None
    """JSON file that the scores are added to.
    If not given, evaluation.json beside the checkpoint, or in this folder for timm:NAME and hf:OWNER/NAME."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to compute on. auto is the GPU if there is one."""
    workers: Workers = 2
    """Processes that read the images."""


def evaluate(options: EvaluateConfig, *, arch: nn.Module | None = None) -> dict[str, Any]:
    """Compute the scores in the options, and add them to ``evaluation.json``.

    Processes that torchrun started share the images and, for ``linear`` and ``semi``, the networks. The scores are
    those of a single process.

    Args:
        options: networks, images and scores.
        arch: for a run with a module of yours, another module that is built alike.

    Returns:
        A dict per data set. ``scores`` has an :class:`fastrm.probes.Estimate` per network and score, and ``gap`` one
        per place. ``left_out`` is the number of unreadable files. ``bank`` and ``test`` are the numbers of images that
        classifiers are built from and tested on.

    Raises:
        UsageError: the checkpoint or the data cannot be used, or the options name no score.
    """
    options = checked(options)
    _check(options)
    device = own_device(choose_device(options.device))

    def asked() -> str:
        linear = f"; --linear takes {LinearProtocol.batch_size}" if options.linear else ""
        return f"an evaluation of {options.path}, {BATCH} images at a time{linear}"

    lower = "Lower --workers, or score on fewer images" + ("; or give --device cpu" if device.type == "cuda" else "")
    with ordinary(device), processes(device), together(), enough(device, asked, f"{lower}. Nothing was written"):
        return _evaluate(options, device, arch)


def _evaluate(options: EvaluateConfig, device: torch.device, arch: nn.Module | None) -> dict[str, Any]:
    trained = open_pretrained(options.path, device, arch=arch or options.arch, **options.of_others)
    if trained.said and world().rank == 0:
        print(f"network    {trained.said}")
    if options.gap and trained.settings is None:
        raise UsageError(f"--gap needs student and teacher, and {options.path} holds one network; give the run")
    if not trained.pixels.limits:
        made = f"views of {trained.pixels.channels} channels, which a callable made of images of others"
        raise UsageError(f"{options.path} was trained on {made}: an evaluation sees the images as they are")
    out = options.out or trained.folder / EVALUATION
    _earlier(out)  # before the work, since a file of the user would be in the way
    setting = Setting(trained.image_size, device, options.workers)
    scoring = options.knn or options.linear or options.linear_quick or options.semi is not None

    def opened(wanted: EvaluateConfig, labelled: bool) -> Opened:
        source = trained.images(wanted)
        if labelled and (source.bank is None or source.test is None):
            raise UsageError(f"{source.name} has no labels, which everything but --gap needs")
        source, broken = scan(source, workers=options.workers * on_this_machine())
        return Opened(_taken(formatted(source, trained.pixels), options), broken, np.empty(0, dtype=np.int64))

    found = [opened_once(lambda: opened(options, scoring or options.neighbours is not None))]
    if options.transfer is not None:
        further = replace(options, data=options.transfer, image_column=None, label_column=None)
        found.append(opened_once(lambda: opened(further, True)))
    scanned = [(each.source, each.broken) for each in found]
    sources = [source for source, _ in scanned]
    for source, broken in scanned if world().rank == 0 else []:
        print(f"data       {source.about}")
        if broken:
            print(f"left out   {counted(broken)}")

    results: dict[str, Any] = {}
    if scoring:
        results[sources[0].name] = {"scores": _scores(options, trained, sources[0], setting)}
    if options.gap:
        images = sources[0].test or sources[0].train
        results.setdefault(sources[0].name, {})["gap"] = gap(trained.method(device), images, setting)
    if options.transfer:
        quick = replace(options, knn=False, linear=False, linear_quick=True, semi=None)
        results.setdefault(sources[1].name, {}).setdefault("scores", {})
        _merge(results[sources[1].name]["scores"], _scores(quick, trained, sources[1], setting))
    for source, broken in scanned:
        if source.name in results:
            results[source.name] |= {"left_out": len(broken | unreadable(source)), **source.scored}
    near = None
    if options.neighbours is not None:
        near = nearest(next(iter(trained.networks.values())), sources[0], setting)
    if world().rank == 0:
        if options.neighbours is not None and near is not None:
            sheets.save("--neighbours", options.neighbours, picture(near, sources[0]))
        _write(out, trained, results)
    return results


def _write(out: Path, trained: Pretrained, results: dict[str, Any]) -> None:
    made_by = {"fastrm": __version__, "torch": torch.__version__, "step": trained.step}
    found = _earlier(out)
    _merge(found, {**made_by, "sets": _plain(results)})
    with writing(out):
        write_json(out, found)


def _taken(source: Source, options: EvaluateConfig) -> Source:
    return source if options.eval_images is None else source.limited(options.eval_images)


def _check(options: EvaluateConfig) -> None:
    asked = (options.knn, options.linear, options.linear_quick, options.semi is not None, options.gap, options.transfer)
    if not any(asked) and options.neighbours is None:
        raise UsageError(
            "say what to score: --knn, --linear, --linear-quick, --semi 0.1, --transfer DATA, --gap, --neighbours X.png"
        )
    if options.neighbours is not None:
        sheets.check("--neighbours", options.neighbours)


def _earlier(out: Path) -> dict[str, Any]:
    """Read the scores of earlier evaluations, which stay; raise a UsageError if the file cannot be written."""
    check_folder("--out", out)
    own.require("--out", out, own.evaluation, what="an evaluation")
    return read_json(out) if out.exists() else {}


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for name, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _plain(results: Any) -> Any:
    if isinstance(results, Estimate):
        return results.json()
    if isinstance(results, int):
        return results
    return {name: _plain(value) for name, value in results.items()}


def _scores(options: EvaluateConfig, trained: Pretrained, source: Source, setting: Setting) -> Scores:
    networks = {**trained.networks, "random": trained.untrained().to(setting.device)}
    start, why = trained.start()
    if start is not None:
        networks["start"] = start.to(setting.device)
    elif why and world().rank == 0:
        print(f"notice     the weights that the run started from are not scored: {why}")
    protocol = None
    if options.linear:
        protocol = _protocol(trained.about.get("method", ""))
        protocol = replace(protocol, epochs=options.linear_epochs or protocol.epochs)
    return scored(
        networks, source, setting, knn=options.knn, quick=options.linear_quick, protocol=protocol, semi=options.semi
    )


def _protocol(method: str) -> LinearProtocol:
    """The linear protocol in the publication of a method, or the default if the method is not registered."""
    if method in names():
        return find(method).linear_protocol
    protocol = LinearProtocol()
    if world().rank == 0:
        words = f"the method {method or 'of the file'} is not known here; trained as for {names()[0]}"
        print(f"notice     --linear: {words}")
    return protocol


def _table(results: dict[str, Any]) -> str:
    lines = []
    for name, parts in results.items():
        if scores := parts.get("scores"):
            for title, *cells in rows(_plain(scores), f"{name}, % right"):
                lines.append(f"{title:26}" + "".join(f"{cell:>15}" for cell in cells))
        if parts["left_out"]:
            lines.append(f"{name}: {parts['left_out']} files that cannot be read are left out")
        if "gap" in parts:
            lines.append(f"{name}: 1 - cosine of student and teacher on the same image")
            lines += [f"{'gap at ' + place:26}{value.value:15.4f}" for place, value in parts["gap"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = command_line.parse(EvaluateConfig, argv, prog="python -m fastrm.evaluate")
    table = _table(evaluate(options))
    if not started_first():
        return
    print(table, end="\n" if table else "")
    if options.neighbours is not None:
        print(f"{options.neighbours}: test images, each with its nearest images by the student's features")


if __name__ == "__main__":
    shell.run(main)
