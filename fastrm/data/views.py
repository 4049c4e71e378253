"""Reads the changes to a method's augmentation that a user gives as TOML or as ``2x224,8x96``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

from fastrm.data.augmentation import Augmentation, View
from fastrm.errors import UsageError
from fastrm.settings.config_file import VIEWS, read_table
from fastrm.settings.fields import methods
from fastrm.settings.kinds import Range, problem
from fastrm.settings.near import near

GLOBAL: Mapping[str, Any] = {"crop_scale": (0.4, 1.0)}
LOCAL: Mapping[str, Any] = {"crop_scale": (0.05, 0.4), "blur_probability": 0.5, "solarize_probability": 0.0}
"""Multi-crop as in DINO (arXiv 2104.14294, and the defaults of its code): large and small views."""
_LOCAL_SIDE = 96 / 224

_SHORT = re.compile(r"\s*\d{1,4}x\d{1,4}\s*(,\s*\d{1,4}x\d{1,4}\s*)*")
_COUNT = Annotated[int, Range(at_least=1, at_most=64)]
_OF_A_VIEW = tuple(field.name for field in fields(View))
_OF_ALL = ("mean", "std")


def augmentation_of(
    method: Any, crop_min: float, given: str | Path | None = None, image_size: int = 224, multiple: int = 2
) -> Augmentation:
    """The augmentation of a method, with the user's changes.

    Args:
        method: a name, or a subclass of :class:`fastrm.methods.Method`.
        crop_min: smallest fraction of the image area that a crop covers, in the method's own augmentation.
        given: value of ``--augmentation``; see :func:`read_augmentation`.
        image_size: image size of the run, in pixels.
        multiple: divisor of the side of the method's local views, such as the side of a ViT's patches.

    Raises:
        UsageError: the method is unknown, or the changes are invalid.
    """
    if not isinstance(method, str | type):
        raise UsageError(
            f"method is a {type(method).__name__}; it must be one of {', '.join(methods().names())}, a "
            "fastrm.data.Augmentation, or a callable from one image to a tuple of views"
        )
    kind = methods().find(method)
    own: Augmentation = kind.augmentation(crop_min)
    if local := kind.local_views(crop_min):
        side = local_side(image_size, multiple)
        own = replace(own, views=(*own.views, *(replace(view, size=side) for view in local)))
    if given is None:
        kind.check_views(len(own.views))
        return own
    return read_augmentation(given, own, image_size)


def local_side(image_size: int, multiple: int) -> int:
    """Side of local views in pixels: 96/224 of ``image_size``, as in DINO, rounded to a multiple of ``multiple``.

    Raises:
        UsageError: the result is not below ``image_size``.
    """
    side = max(1, round(_LOCAL_SIDE * image_size / multiple)) * multiple
    if side >= image_size:
        raise UsageError(
            f"--image-size {image_size} is too small for local views, whose side is a multiple of {multiple}; "
            f"--augmentation 2x{image_size} makes none"
        )
    return side


def read_augmentation(given: str | Path, base: Augmentation, image_size: int) -> Augmentation:
    """Read an augmentation that is given by its differences from ``base``.

    Args:
        given: one of

            - ``2x224,8x96``, that is two views of 224 pixels and eight of 96;
            - a TOML file, whose top-level fields of :class:`View` apply to all views. Each table ``[[view]]`` describes
              ``count`` views (1 if not given), and ``views = "2x224,8x96"`` is short for such tables;
            - a run's ``config.json``, for the views of that run.

        base: augmentation with the values that are not given. View n starts from its view n, or from its first ones
            again if it has fewer. Without tables, there are as many views as in the base. If the new views have several
            sizes and the base has one, the largest also get the values of ``GLOBAL``, and the others those of
            ``LOCAL``. If the base has several sizes itself, large views start from its large views, and small ones from
            its small views.
        image_size: image size of the run, in pixels; the size of views that have none.

    Raises:
        UsageError: the value is invalid; the message names the file and the field.
    """
    try:
        return _made(_written(given), base, image_size)
    except (UsageError, ValueError) as error:
        raise UsageError(f"--augmentation {' '.join(str(given).split())[:200]}: {error}") from None


def _written(given: str | Path) -> Mapping[str, Any]:
    """The given changes in the form of a TOML table."""
    if isinstance(given, str) and _SHORT.fullmatch(given):
        return {"views": given}
    path = Path(given)
    if path.suffix not in (".toml", ".json"):
        raise UsageError("it must be views, such as 2x224,8x96, or a file that ends in .toml, or a run's config.json")
    table = read_table(path)
    if path.suffix == ".toml":
        return table
    if not isinstance(table.get(VIEWS), dict):
        raise UsageError("it has no views; the config.json of a run has them, unless a callable made the views")
    found: Mapping[str, Any] = table[VIEWS]
    return found


def _made(table: Mapping[str, Any], base: Augmentation, image_size: int) -> Augmentation:
    groups = _groups(table, base.views)
    _check_names(table, (*_OF_A_VIEW, "views", "view", *_OF_ALL))
    common = {name: _pair(table[name]) for name in _OF_A_VIEW if name in table}
    _view(View(), common, "")
    each = [group for group in groups for _ in range(group.get("count", 1))]
    sides = [{**common, **group}.get("size") or image_size for group in each]
    of_base = base.sizes(image_size)
    pairs = list(zip(base.views, of_base, strict=True))
    if len(set(of_base)) > 1:
        large = cycle([view for view, size in pairs if size == max(of_base)])
        small = cycle([view for view, size in pairs if size < max(of_base)])
    else:
        large = small = cycle(base.views)
    views = []
    for i, group in enumerate(each):
        part: Mapping[str, Any] = {}
        if large is small and len(set(sides)) > 1:
            part = GLOBAL if sides[i] == max(sides) else LOCAL
        said = {name: _pair(value) for name, value in group.items() if name != "count"}
        start = next(large if sides[i] == max(sides) else small)
        views.append(_view(start, {**part, **common, **said}, f"view {i + 1}: "))
    normal = {name: _pair(table[name]) for name in _OF_ALL if name in table}
    return replace(base, views=tuple(views), **normal)


def _groups(table: Mapping[str, Any], own: Sequence[View]) -> Sequence[Mapping[str, Any]]:
    """The tables of views that share their settings, each with its ``count``."""
    short, tables = table.get("views"), table.get("view")
    if short is not None and tables is not None:
        raise UsageError("views and [[view]] both set the number of views; give one of them")
    if short is not None:
        if not isinstance(short, str) or not _SHORT.fullmatch(short):
            raise UsageError(f'views is {short!r:.80}; it must be a number of views and their size, as "2x224,8x96"')
        parts = (part.split("x") for part in short.split(","))
        tables = [{"count": int(count), "size": int(size)} for count, size in parts]
    if tables is None:
        return [{} if view.size is None else {"size": view.size} for view in own]
    if not isinstance(tables, list) or not tables or not all(isinstance(group, dict) for group in tables):
        raise UsageError("view must be tables: [[view]]")
    for i, group in enumerate(tables, start=1):
        _check_names(group, (*_OF_A_VIEW, "count"), f"[[view]] {i}: ")
        for name, kind in (("count", _COUNT), ("size", int | None)):
            if name in group and (wrong := problem(group[name], kind)) is not None:
                raise UsageError(f"[[view]] {i}: {name} {wrong}")
    return tables


def _check_names(table: Mapping[str, Any], known: Iterable[str], place: str = "") -> None:
    names = list(known)
    for name in table:
        if name not in names:
            meant = near(name, names)
            hint = f"did you mean {meant}?" if meant else f"there are {', '.join(names)}"
            raise UsageError(f"{place}{name!r:.80} is unknown; {hint}")


def _view(base: View, changes: Mapping[str, Any], place: str) -> View:
    try:
        return replace(base, **changes)
    except ValueError as error:
        raise UsageError(place + str(error).removeprefix("View: ")) from None


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
