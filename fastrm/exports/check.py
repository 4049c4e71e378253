"""Loads an export with the library that it is for, and compares the features with those of the network."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrm.data import open_source
from fastrm.data.decode import BROKEN
from fastrm.data.eval_view import eval_view
from fastrm.data.measuring import spread_over
from fastrm.data.scan import require_readable
from fastrm.data.settling import formatted
from fastrm.data.sources import Images
from fastrm.errors import UsageError, first_line
from fastrm.exports.base import Network, Subject, Target
from fastrm.machine.memory import exhausted
from fastrm.models import Backbone
from fastrm.packages import failure

IMAGES = 8
"""Number of images that are compared."""
LARGEST = 1e-4
"""Largest difference, as a part of the largest absolute value. Orders of summation differ by about 1e-6."""
_MADE = ("digits", "synthetic")  # named sets that need no files


class Seen(NamedTuple):
    """Images for the comparison."""

    images: Tensor
    """float32 [B, C, size, size], normalised."""
    words: str
    """Their origin."""


def given(subject: Subject, paths: Sequence[Path]) -> Seen:
    """Up to 8 images from files of the user.

    Raises:
        UsageError: a file cannot be read, or has other bands than the network takes.
    """
    images = formatted(open_source([*paths], keep=False), subject.pixels).train
    require_readable("--images", images, spread_over(len(images), IMAGES))
    if (found := of_images(subject, images, "from --images")) is None:
        raise UsageError(f"--images {paths[0]}: the network takes no images, but views that a callable made of them")
    return found


def of_run(subject: Subject) -> Seen:
    """Up to 8 images of the run, if they are on this machine, or else :func:`made`. Nothing is downloaded."""
    then = subject.settings or {}
    data = then.get("data") or subject.about["data"]
    place = data.removeprefix("@").removeprefix("hf:")
    if data in _MADE or (then and os.path.exists(place)):
        image, label = (then.get(name) for name in ("image_column", "label_column"))
        try:
            source = formatted(open_source(data, image_column=image, label_column=label, keep=False), subject.pixels)
        except UsageError:  # a folder may have changed since
            return made(subject)
        return of_images(subject, source.train, "of the run") or made(subject)
    return made(subject)


def of_images(subject: Subject, images: Images, words: str) -> Seen | None:
    """Up to 8 images, spread over the set; None if none can be read."""
    views = []
    if subject.pixels.limits:
        for index in spread_over(len(images), IMAGES):
            try:
                views.append(eval_view(images.pixels(index), subject.image_size, subject.pixels))
            except BROKEN:
                continue
    return Seen(torch.stack(views), f"{len(views)} images {words}") if views else None


def made(subject: Subject) -> Seen:
    """8 random images with the spectrum of photographs: amplitude 1/f, mean 0 and standard deviation 1."""
    size, shape = subject.image_size, (IMAGES, subject.backbone.channels)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    noise = np.random.default_rng(0).normal(size=(*shape, size, size))
    images = torch.from_numpy(np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(size, size))).float()
    return Seen(
        images / images.std(dim=(2, 3), keepdim=True), f"{IMAGES} made images, with the spectrum of photographs"
    )


def outputs(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Features [B, D] of a backbone, and the map or tokens that they are pooled from, if it gives them."""
    try:
        features, found = backbone.encode(images)
    except UsageError:  # a module that gives no map
        return {"features": backbone(images)}
    return {"features": features, **({"map": found} if isinstance(found, Tensor) else {})}


def compared(target: Target, subject: Subject, path: Path, seen: Callable[[Subject], Seen]) -> str:
    """Load an export and compare it with the network.

    Args:
        target: the format.
        subject: the network.
        path: the file or folder.
        seen: returns the images; not called if the library is not installed.

    Returns:
        A sentence with the largest absolute differences, or with the reason why nothing was compared.

    Raises:
        UsageError: the library cannot load the file, or the features differ.
    """
    library = target.library
    if (error := failure(library)) is not None:
        if find_spec(library) is None:
            return f"not checked: {library} is not installed"
        return f"not checked: {library} cannot be imported: {first_line(error)}"
    images = seen(subject)
    with torch.random.fork_rng(devices=[]):  # libraries draw first weights
        try:
            network, by = target.load(subject, path)
            told = same(subject, network, library, images)
        except ImportError as lack:
            return f"not checked: {library} cannot be imported: {first_line(lack)}"
        except UsageError:
            raise
        except Exception as fault:  # the library decides what it raises
            if exhausted(fault):
                raise
            raise UsageError(f"{library} cannot load the export of {subject.name}: {first_line(fault)}") from None
    version = getattr(importlib.import_module(library), "__version__", "")
    loader = f"{library} {version}".strip() + (by and f" ({by})")
    return f"{loader} loads it: largest difference of {told} on {images.words}"


@torch.no_grad()
def same(subject: Subject, network: Network, library: str, seen: Seen | None = None) -> str:
    """Compare a network with the one that is exported, and return the largest absolute differences in words.

    Args:
        subject: the network that is exported.
        network: the other one.
        library: the library that it is of.
        seen: the images; None means those of :func:`made`.

    Raises:
        UsageError: the features or the maps differ.
    """
    images = (seen or made(subject)).images
    ours, theirs = outputs(subject.backbone, images), network(images)
    return " and ".join(
        _difference(name, ours[name], theirs[name], f"the export of {subject.name} is another network in {library}")
        for name in ours
        if name in theirs
    )


def _difference(name: str, ours: Tensor, theirs: Tensor, failed: str) -> str:
    words = {"features": "the features", "map": "the map"}[name]
    if ours.ndim == 4 and theirs.shape != ours.shape:
        theirs = theirs.permute(0, 3, 1, 2)  # timm's Swin gives [B, h, w, C]
    if ours.shape != theirs.shape:
        raise UsageError(f"{failed}: {words} are {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
    difference, scale = (ours - theirs).abs().max().item(), ours.abs().max().item()
    if not difference <= LARGEST * scale:
        raise UsageError(f"{failed}: {words} differ by up to {difference:.1e}; the largest value is {scale:.1e}")
    return f"{words} {difference:.0e}".replace("e-0", "e-").replace("e+00", "")
