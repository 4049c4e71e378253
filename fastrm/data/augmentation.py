"""The augmentation as data; every loader implements this description."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from fastrm.settings.inputs import ImageSize
from fastrm.settings.kinds import problem

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["bilinear", "bicubic"]
_TOLD = 3  # differences that are listed


@dataclass(frozen=True, kw_only=True)
class View:
    """The random operations of one view, in the order of the fields; probabilities are per image.

    Parameters are drawn uniformly, the crop's aspect ratio uniformly in its logarithm.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Fraction of the image area that the crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    interpolation: Interpolation = "bilinear"
    """Resampling of the crop to the view's size, always with antialiasing."""
    jitter_probability: float = 0.8
    """Probability of the four colour changes together, which come in random order."""
    brightness: float = 0.4
    """The factor is drawn from 1 ± this value; contrast and saturation work in the same way."""
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """The shift is drawn from ± this fraction of the colour circle, at most a third."""
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the Gaussian, in pixels of a view of 224; smaller views are blurred in proportion."""
    solarize_probability: float = 0.0
    """Inverts values of 128 and above (of 255)."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    size: int | None = None
    """Side of the square view, in pixels; None means ``--image-size``."""

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
        _check_numbers(self, "blur_sigma", count=2, above=True, high=64)  # beyond, the kernel is wider than the view
        if (wrong := problem(self.size, ImageSize | None)) is not None:
            raise ValueError(f"View: size {wrong}")

    def side(self, image_size: int) -> int:
        """The side of the view in pixels, in a run with this image size."""
        return image_size if self.size is None else self.size


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The views of an image, and their normalisation."""

    views: tuple[View, ...]
    """Two for pre-training, one for training with labels."""
    mean: tuple[float, ...] | None = None
    """Mean per channel to subtract after scaling to [0, 1]; None takes that of the data, which is ImageNet's for
    RGB."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel to divide by; None as for ``mean``."""

    def __post_init__(self) -> None:
        if not isinstance(self.views, tuple | list) or not self.views:
            raise ValueError(f"Augmentation: views is {self.views!r:.80}; it must be a tuple of one View or more")
        for view in self.views:
            if not isinstance(view, View):
                raise ValueError(f"Augmentation: views has a {type(view).__name__} in it; each must be a View")
        if self.mean is not None:
            _check_numbers(self, "mean", count=None, low=-math.inf, rising=False)
        if self.std is not None:
            _check_numbers(self, "std", count=None, above=True, rising=False)
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(
                f"Augmentation: mean has {len(self.mean)} numbers and std {len(self.std)}; it must be one per channel"
            )

    def sizes(self, image_size: int) -> tuple[tuple[int, int], ...]:
        """Height and width of each view, in a run on images of this size."""
        return tuple((view.side(image_size),) * 2 for view in self.views)

    @classmethod
    def read(cls, given: str | Path, *, base: Augmentation | None = None, image_size: int = 224) -> Augmentation:
        """Read what ``--augmentation`` takes: a TOML file, a run's ``config.json``, or views such as ``2x224,8x96``.

        Args:
            given: the changes to the base.
            base: augmentation with the values that are not given, such as a method's; None means two views of
                ``View()``.
            image_size: size of views without one, in pixels.

        Raises:
            UsageError: it cannot be read, or a value is unknown or out of range.
        """
        from fastrm.data.views import read_augmentation

        return read_augmentation(given, base or cls(views=(View(), View())), image_size)

    def plain(self) -> dict[str, Any]:
        """Every value of every view, JSON-compatible, as stored in a run's ``config.json`` and checkpoints."""
        found = asdict(self)
        found["view"] = found.pop("views")
        return {name: _plain(value) for name, value in found.items()}

    def difference(self, then: Mapping[str, Any]) -> str:
        """The differences to another augmentation, as returned by :meth:`plain`, in one line; empty if there are
        none."""
        now, usual = self.plain(), Augmentation(views=(View(),)).plain()["view"][0]
        if len(then["view"]) != len(now["view"]):
            return f"there were {len(then['view'])} views, and are {len(now['view'])}"
        found = []
        for i, (old, new) in enumerate(zip(then["view"], now["view"], strict=True), start=1):
            old = {**usual, **old}  # values that are newer than the record
            found += [f"{name} of view {i} was {old[name]}, is {new[name]}" for name in new if old[name] != new[name]]
        found += [f"{name} was {then[name]}, is {now[name]}" for name in ("mean", "std") if then[name] != now[name]]
        return "; ".join(found[:_TOLD]) + (f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else "")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int) else float(value)


def _check_numbers(
    of: View | Augmentation,
    name: str,
    *,
    count: int | None = 1,
    low: float = 0,
    high: float = math.inf,
    above: bool = False,
    rising: bool = True,
) -> None:
    """Raise a ValueError unless a field holds so many finite numbers in a range, and pairs in rising order.

    A count of None stands for one number per channel.
    """
    given = getattr(of, name)
    values = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    right = len(values) == (count or max(1, len(values))) and (count == 1) == (values is not given)
    for value in values:
        number = isinstance(value, Real) and not isinstance(value, bool)
        right = right and number and math.isfinite(value) and value <= high and (value > low if above else value >= low)
    if right and (not rising or list(values) == sorted(values)):
        return
    wanted = "a number" if count == 1 else f"{count} numbers" if count else "a number per channel"
    if low > -math.inf:
        wanted += f" {'above' if above else 'from'} {low:g}"
    if high < math.inf:
        wanted += f" {'up ' * above}to {'a third' if high == 1 / 3 else f'{high:g}'}"
    order = ", the lower one first" if count != 1 and rising else ""
    raise ValueError(f"{type(of).__name__}: {name} is {given!r:.80}; it must be {wanted}{order}")


SUPERVISED = Augmentation(
    views=(View(crop_scale=(0.08, 1.0), jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0),)
)
"""A crop and a flip, the usual augmentation for training with labels."""
