"""Exports of the student at the end of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastrm.data.formats import PixelFormat
from fastrm.data.sources import Images
from fastrm.errors import TrainingError, UsageError
from fastrm.exports import claim, place, write
from fastrm.exports.base import Subject
from fastrm.exports.check import Seen, made, of_images
from fastrm.hooks.base import Hook
from fastrm.machine.distributed import gather_objects, world
from fastrm.models import Backbone
from fastrm.models.weights import BACKBONE, load_weights, metadata, read_weights

if TYPE_CHECKING:
    from fastrm.run.run import Run


class Exports(Hook):
    """Exports the student when the run is complete.

    The constructor, which all processes call, exports the untrained network to a temporary folder, so that a format
    that cannot hold the network, or a missing package, is reported before the run.

    Args:
        formats: keys of :data:`fastrm.exports.TARGETS`.
        out: the run folder.
        untrained: builds the backbone.
        settings: settings of the run by name.
        pixels: conversion from images to the input of the network.
        images: images of the run, on which the exports are compared with the network.

    Raises:
        UsageError: a format cannot hold the network, or a file in the run folder is not fastrm's.
    """

    def __init__(
        self,
        formats: Sequence[str],
        out: Path,
        untrained: Callable[[], Backbone],
        *,
        settings: Mapping[str, Any],
        pixels: PixelFormat,
        images: Images,
    ) -> None:
        self._formats, self._untrained, self._images, self._pixels = formats, untrained, images, pixels
        problem = None
        if world().rank == 0:
            try:
                self._try_out(out, settings)
            except UsageError as error:
                problem = str(error)
        if (problem := gather_objects(problem)[0]) is not None:
            raise UsageError(problem)

    def _try_out(self, out: Path, settings: Mapping[str, Any]) -> None:
        subject = self._subject(self._untrained(), out, settings)
        for kind in self._formats:
            claim(place(out, kind), "--export")
            with tempfile.TemporaryDirectory(prefix="fastrm-export-") as folder, torch.random.fork_rng(devices=[]):
                try:
                    write(lambda: subject, kind, place(Path(folder), kind), self._seen)
                except UsageError as error:
                    raise UsageError(f"--export {kind}: {error}") from None

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        """Export the student from the file in the run folder.

        Raises:
            TrainingError: an export failed.
        """
        if run.rank:
            return
        backbone, path = self._untrained(), run.out / BACKBONE
        load_weights(backbone, read_weights(path).tensors, source=str(path))
        subject = self._subject(backbone, run.out, run.config.flat(), run.step)
        for kind in self._formats:
            out = place(run.out, kind)
            try:
                written = write(lambda: subject, kind, out, self._seen, "--export")
            except UsageError as error:
                raise TrainingError(
                    f"--export {kind}: {error}; the run is complete, with its weights in {path}"
                ) from None
            run.say(f"export     {out}")
            run.say(f"           {written.checked}")

    def _subject(
        self, backbone: Backbone, folder: Path, settings: Mapping[str, Any], step: int | None = None
    ) -> Subject:
        about = metadata(settings, "student", self._pixels)
        return Subject(
            backbone=backbone.eval(), about=about, pixels=self._pixels, folder=folder, settings=settings, step=step
        )

    def _seen(self, subject: Subject) -> Seen:
        return of_images(subject, self._images, "of the run") or made(subject)
