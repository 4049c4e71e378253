"""What augmentation is, described as data; each loader carries out this one description."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class View:
    """The random operations of one view, in the order of the fields; probabilities are per image.

    Parameters are drawn uniformly, the crop's aspect ratio uniformly in its logarithm.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the picture's area that is cropped."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    interpolation: Interpolation = "bilinear"
    """Resampling of the crop to the view's size, always with antialiasing."""
    jitter_probability: float = 0.8
    """Of the four colour changes together, which come in random order."""
    brightness: float = 0.4
    """The factor is drawn from 1 ± this; so for contrast and saturation."""
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """The shift is drawn from ± this share of the colour circle, at most a third."""
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the Gaussian, in pixels of a view of 224; smaller views are blurred in proportion."""
    solarize_probability: float = 0.0
    """Inverts values of 128 and above (of 255)."""
    flip_probability: float = 0.5
    """Left to right."""

    def __post_init__(self) -> None:
        if self.interpolation not in get_args(Interpolation):
            known = " or ".join(get_args(Interpolation))
            raise ValueError(f"View: interpolation is {self.interpolation!r}; it must be {known}")
        for name in ("jitter", "grayscale", "blur", "solarize", "flip"):
            _check_numbers(self, f"{name}_probability", high=1)
        for name in ("brightness", "contrast", "saturation"):
            _check_numbers(self, name)
        _check_numbers(self, "hue", high=1 / 3)
        _check_numbers(self, "crop_scale", count=2, above=True, high=1)
        _check_numbers(self, "crop_ratio", count=2, above=True)
        _check_numbers(self, "blur_sigma", count=2, above=True)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The views of an image and what follows them."""

    views: tuple[View, ...]
    """Two for pre-training, one for training with labels."""
    mean: tuple[float, ...] | None = None
    """Subtracted per channel, after scaling to [0, 1]; None: the data's, which are ImageNet's for RGB."""
    std: tuple[float, ...] | None = None
    """Divided by per channel; None: as for ``mean``."""

    def __post_init__(self) -> None:
        if not isinstance(self.views, tuple | list) or not self.views:
            raise ValueError(f"Augmentation: views is {self.views!r:.80}; it must be a tuple of one View or more")
        for view in self.views:
            if not isinstance(view, View):
                raise ValueError(f"Augmentation: views has a {type(view).__name__} in it; each must be a View")
        if self.mean is not None:
            _check_numbers(self, "mean", count=len(self.mean), low=-math.inf, rising=False)
        if self.std is not None:
            _check_numbers(self, "std", count=len(self.std), above=True, rising=False)


def _check_numbers(
    of: View | Augmentation,
    name: str,
    *,
    count: int = 1,
    low: float = 0,
    high: float = math.inf,
    above: bool = False,
    rising: bool = True,
) -> None:
    """Raise a ValueError unless a field holds so many finite numbers in a range, and pairs in rising order."""
    given = getattr(of, name)
    values = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    right = len(values) == count and (count == 1) == (values is not given)
    for value in values:
        number = isinstance(value, Real) and not isinstance(value, bool)
        right = right and number and math.isfinite(value) and value <= high and (value > low if above else value >= low)
    if right and (not rising or list(values) == sorted(values)):
        return
    wanted = "a number" if count == 1 else f"{count} numbers"
    if low > -math.inf:
        wanted += f" {'above' if above else 'from'} {low:g}"
    if high < math.inf:
        wanted += f" {'up ' * above}to {'a third' if high == 1 / 3 else f'{high:g}'}"
    order = ", the lower one first" if count > 1 and rising else ""
    raise ValueError(f"{type(of).__name__}: {name} is {given!r:.80}; it must be {wanted}{order}")


SUPERVISED = Augmentation(
    views=(View(crop_scale=(0.08, 1.0), jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0),)
)
"""A crop and a flip: what networks are customarily trained with where there are labels."""
