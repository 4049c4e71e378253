"""Views that a callable of the user makes in worker processes."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastrm.data.decode import BROKEN, BrokenImage, reason
from fastrm.data.draws import BatchSampler, Request
from fastrm.data.pixels import values_in
from fastrm.data.scan import readable
from fastrm.data.seeding import seeded
from fastrm.data.sources import Images
from fastrm.data.workers import Loaded, sent
from fastrm.errors import UsageError

Augment = Callable[[Any], Any]
"""Maps one image to a tuple of views."""


class _Kind(NamedTuple):
    """Shape and dtype that all views at one position share."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} of {str(self.dtype).removeprefix('torch.')}"


class CalledViews(Dataset[Loaded]):
    """Batches of views that a callable makes.

    Args:
        images: images that the callable receives.
        augment: the callable.
        sampler: sampler of the requests.

    Attributes:
        kinds: kinds of the first image's views; all other views must match.
        channels: channels of its views; those of the images if all views are gray.
        same: whether some images get the same views each time under the same random numbers.

    Raises:
        UsageError: the callable raises, or does not return views.
    """

    def __init__(self, images: Images, augment: Augment, sampler: BatchSampler) -> None:
        self.images, self.augment, self.sampler = images, augment, sampler
        self.kinds: tuple[_Kind, ...] = ()
        first, views = readable(images, 0, partial(self._views, 0), {})
        self.kinds = tuple(map(_kind, views))
        several = [kind.shape[0] for kind in self.kinds if kind.dtype != torch.uint8 or kind.shape[0] > 1]
        self.channels = several[0] if several else images.format.channels
        self.same = all(map(self._repeats, {first, len(images) // 2, len(images) - 1}))

    def _repeats(self, index: int) -> bool:
        try:
            once, again = (self._views(0, index) for _ in range(2))
        except BROKEN:
            return True
        return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(once, again, strict=True))

    def __getitem__(self, request: Request) -> Loaded:
        faults: dict[int, str] = {}
        try:
            made = [readable(self.images, at, partial(self._views, request.epoch), faults) for at in request.images]
        except UsageError as error:
            return Loaded([], (), faults, str(error))
        views = zip(*(views for _, views in made), strict=True)
        return Loaded([index for index, _ in made], tuple(sent(torch.stack(view)) for view in views), faults)

    def _views(self, epoch: int, index: int) -> list[Tensor]:
        """The views of an image in an epoch."""
        name = self.images.name(index)
        with seeded(self.sampler.seed, epoch, index):
            image = self.images.given(index)
            try:
                made = self.augment(image)
            except Exception as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(at.filename).name}, line {at.lineno}"
                raise UsageError(f"augmentation: {reason(error)} ({where}), called with {name}") from error
        views = _checked(made, name, self.images.format.channels)
        for position, (kind, first) in enumerate(zip(map(_kind, views), self.kinds, strict=False)):
            if kind != first:
                raise UsageError(
                    f"augmentation: view {position} of {name} is {kind}, and that of the first image is {first}; all "
                    "must have one shape and dtype"
                )
        if self.kinds and len(views) != len(self.kinds):
            raise UsageError(f"augmentation: {name} got {len(views)} views, and the first image {len(self.kinds)}")
        return views


def _kind(view: Tensor) -> _Kind:
    return _Kind(tuple(view.shape), view.dtype)


def _checked(made: Any, name: str, channels: int) -> list[Tensor]:
    """The output of a callable as tensors."""
    wanted = "it must give a tuple of views, each a tensor [C, H, W] of floats or uint8, or a PIL image"
    if not isinstance(made, tuple | list) or not made:
        shape = f" of shape {list(made.shape)}" if isinstance(made, Tensor | np.ndarray) else ""
        raise UsageError(f"augmentation gave a {type(made).__name__}{shape} for {name}; {wanted}")
    return [
        _view(view, f"augmentation gave for view {position} of {name}", wanted, channels)
        for position, view in enumerate(made)
    ]


def _view(view: Any, gave: str, wanted: str, channels: int) -> Tensor:
    if isinstance(view, Image.Image):
        try:
            view = torch.from_numpy(values_in(view).transpose(2, 0, 1).copy())
        except BrokenImage as error:
            raise UsageError(f"{gave} a PIL image that is none of RGB: {error}") from None
    if not isinstance(view, Tensor):
        shape = f" of shape {list(view.shape)}" if isinstance(view, np.ndarray) else ""
        raise UsageError(f"{gave} a {type(view).__name__}{shape}; {wanted}")
    view = view.detach().as_subclass(Tensor)
    met = f"{gave} a tensor {_kind(view)}"
    if view.ndim != 3 or 0 in view.shape or not (view.is_floating_point() or view.dtype == torch.uint8):
        raise UsageError(f"{met}; {wanted}")
    if view.dtype == torch.uint8 and len(view) not in (1, 3, channels):
        raise UsageError(
            f"{met}; uint8 views are normalised by the data's mean and std, or ImageNet's, and need 1, 3 or "
            f"{channels} channels"
        )
    if view.device.type != "cpu":
        raise UsageError(f"{met} on {view.device}; views are made on the CPU, and moved to the device together")
    return view
