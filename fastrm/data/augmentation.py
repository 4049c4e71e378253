"""The augmentation of every method, described once as data; each loader carries out this one description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class View:
    """The random operations of one view, in the order of the fields; probabilities are per image.

    Parameters are drawn uniformly, the crop's aspect ratio uniformly in its logarithm.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the picture's area that is cropped."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
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
        if not 0 <= self.hue <= 1 / 3:
            raise ValueError(f"View: hue is {self.hue}; it must be from 0 to a third")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The views of an image and what follows them."""

    views: tuple[View, ...]
    """Two for pre-training, one for training with labels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted a channel, after scaling to [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divided by a channel."""


SUPERVISED = Augmentation(
    views=(View(crop_scale=(0.08, 1.0), jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0),)
)
"""A crop and a flip: what networks are customarily trained with where there are labels."""


def augmentation(method: str, *, crop_min: float) -> Augmentation:
    """Return the published augmentation of a method.

    MoCo-v2 and DenseCL treat both views alike; BYOL, and MoCo-v3 after it, blur the first always and solarize only
    the second.

    Args:
        method: ``"mocov3"``, ``"mocov2"``, ``"byol"`` or ``"densecl"``.
        crop_min: smallest share of the area that a crop takes.
    """
    scale = (crop_min, 1.0)
    if method in ("mocov2", "densecl"):
        view = View(crop_scale=scale)
        return Augmentation(views=(view, view))
    interpolation: Literal["bilinear", "bicubic"] = "bicubic" if method == "byol" else "bilinear"
    first = View(crop_scale=scale, saturation=0.2, interpolation=interpolation, blur_probability=1.0)
    second = View(
        crop_scale=scale,
        saturation=0.2,
        interpolation=interpolation,
        blur_probability=0.1,
        solarize_probability=0.2,
    )
    return Augmentation(views=(first, second))
