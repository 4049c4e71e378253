"""The parameters of the views of a batch, one row per image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dispatch import check_strided

OP = "augment_views"
_HIGH = 1e6
_LEAST = {"factors": (0.0, 0.0, 0.0, -1 / 3), "sigma": (0.0,)}
_MOST = {"factors": (_HIGH, _HIGH, _HIGH, 1 / 3), "sigma": (_HIGH,)}
_KINDS = {
    "box": "integers", "flip": "bool", "jitter": "bool", "factors": "numbers", "order": "integers", "gray": "bool",
    "sigma": "numbers", "solarize": "bool",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """The operations of :func:`augment_views` on each of B images, in the order of the fields; None skips an operation.

    All tensors are on the CPU, so that the images of each operation are known without synchronising with the device.
    """

    box: Tensor | None = None
    """Top, left, height and width of the crop in pixels, integers [B, 4]; None if the images are crops already."""
    flip: Tensor | None = None
    """Whether to flip the crop horizontally, bool [B]."""
    jitter: Tensor | None = None
    """Whether to apply the four colour changes, bool [B]; None means to all images if ``factors`` are given."""
    factors: Tensor | None = None
    """Factors of brightness, contrast and saturation, each at least 0, and the shift of the hue as a fraction of the
    colour circle, at most a third; float32 [B, 4]."""
    order: Tensor | None = None
    """Columns of ``factors`` in the order of execution, integers [B, 4]; None means 0, 1, 2, 3."""
    gray: Tensor | None = None
    """Whether to convert to grayscale, bool [B]."""
    sigma: Tensor | None = None
    """Standard deviation of the blur in pixels of the view, float32 [B]; 0 means no blur."""
    solarize: Tensor | None = None
    """Whether to invert values of 128 and above (of 255), bool [B]."""

    def after_the_crop(self) -> ViewParameters:
        """These parameters without crop and flip, for images that were cropped and flipped elsewhere."""
        names = ("jitter", "factors", "order", "gray", "sigma", "solarize")
        return ViewParameters(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Drawn(ViewParameters):
    """View parameters with all fields set, except that ``box`` may be None."""

    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    gray: Tensor
    sigma: Tensor
    solarize: Tensor

    def unchanged(self) -> bool:
        """Whether the images only need normalisation."""
        done = (self.flip, self.jitter, self.gray, self.sigma > 0, self.solarize)
        return self.box is None and not any(bool(some.any()) for some in done)


def completed(given: ViewParameters, count: int) -> Drawn:
    """Check the parameters of ``count`` images, and fill in those that are None.

    Raises:
        TypeError, ValueError: a field is wrong; the message names it, its value and what is allowed.
    """
    if not isinstance(given, ViewParameters):
        raise TypeError(f"{OP}: parameters is a {type(given).__name__}; it must be a ViewParameters")
    none = torch.zeros(count, dtype=torch.bool, device="cpu")
    found: dict[str, Any] = {
        "box": None,
        "flip": none,
        "jitter": none if given.factors is None else ~none,
        # These change nothing.
        "factors": torch.tensor((1.0, 1.0, 1.0, 0.0), dtype=torch.float32, device="cpu").expand(count, 4),
        "order": torch.arange(4, device="cpu").expand(count, 4),
        "gray": none,
        "sigma": torch.zeros(count, dtype=torch.float32, device="cpu"),
        "solarize": none,
    }
    for name, kind in _KINDS.items():
        value = getattr(given, name)
        if value is not None:
            _check(name, value, kind, count)
            found[name] = value.float() if kind == "numbers" else value
    return Drawn(**found)


def _check(name: str, value: Tensor, kind: str, count: int) -> None:
    check_strided(OP, name, value)
    shape = (count, 4) if name in ("box", "factors", "order") else (count,)
    if tuple(value.shape) != shape:
        raise ValueError(f"{OP}: {name} has shape {tuple(value.shape)}; it must be {list(shape)}")
    if value.device.type != "cpu":
        raise ValueError(f"{OP}: {name} is on {value.device}; parameters must be on the CPU")
    right = {
        "bool": value.dtype == torch.bool,
        "numbers": value.dtype in (torch.float32, torch.float64),
        "integers": not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool),
    }
    if not right[kind]:
        raise TypeError(f"{OP}: {name} is {value.dtype}; it must be {kind}")
    array = value.detach().numpy()
    if kind == "numbers":
        low, high = (np.array(limits[name]) for limits in (_LEAST, _MOST))
        if not ((array >= low - 1e-6) & (array <= high + 1e-6)).all():
            raise ValueError(f"{OP}: {name} has a number outside its limits, {_LEAST[name]} to {_MOST[name]}")
    if name == "order" and not (np.sort(array, axis=1) == np.arange(4)).all():
        raise ValueError(f"{OP}: each row of order must have each of 0, 1, 2 and 3 once")
