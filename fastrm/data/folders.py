"""Detects the layout of a folder of images: training images, labels and validation images."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastrm.data import folder_index
from fastrm.data.index import Table
from fastrm.data.indexed import images
from fastrm.data.listing import Folder, listed
from fastrm.data.paths import within
from fastrm.data.shards import open_shards
from fastrm.data.sources import LOOKED_FOR, TRAIN, VALIDATION, Source, natural, passed_over, without_validation
from fastrm.errors import UsageError

_SUFFIX = re.compile(r"[\W_]*(\d+|images?|imgs?|data|set|split)$")
_PICTURES = frozenset({"images", "image", "imgs", "img", "jpegimages", "rgb", "photos"})
_TARGETS = frozenset(
    {"masks", "mask", "labels", "label", "annotations", "annotation", "segmentation", "segmentations", "depth", "gt"}
    | {"segmentationclass", "segmentationobject", "groundtruth", "ground_truth"}
)


def open_folder(path: Path, *, keep: bool = True) -> Source:
    """Open a folder with ``train/CLASS/…`` and optional ``val/CLASS/…``, ``CLASS/…``, images at any depth, or tar
    shards.

    Args:
        path: the folder.
        keep: whether to cache the result for the next start.

    Raises:
        UsageError: it has no images, cannot be read, or is ambiguous.
    """
    begin, found = time.time_ns(), folder_index.find(path)
    table = found.table
    if table is None:
        listing = listed(path)
        root = listing.top
        if not root.holds_images and (shards := sorted((shard for f in root for shard in f.shards), key=natural)):
            return _shards(root, shards, keep=keep)
        plan = _plan(root)
        table = folder_index.make(listing, begin, plan.parts, plan.labels)
        table.about |= plan.said
        if keep:
            folder_index.keep(table, path, found)
    return _source(table, path)


@dataclass
class _Plan:
    """The use of the images in a folder."""

    parts: list[Folder]
    """The training folder, and optionally the validation folder."""
    labels: dict[Folder, int] | None
    about: str
    """Description of the images, with a NUL character in place of the data folder."""
    passed: Counter[str]
    why: str = "there is no val folder"
    """Why there are no validation images."""

    @property
    def said(self) -> dict[str, Any]:
        """The texts and counts to cache with the index."""
        return {name: getattr(self, name) for name in ("about", "passed", "why")}


def _plan(root: Folder) -> _Plan:
    """Decide what the images in a folder are used for."""
    layout = _layout(root)
    train = layout.train
    if not train.holds_images:
        said = passed_over(root.all_passed())
        raise UsageError(f"--data {root.path} holds no image{said}; looked below {train.path} for {LOOKED_FOR}")
    labels, classes, notes = _labelled(train)
    notes += _parts_below(root) if train is root else []
    about = "; ".join([f"{train.total:,} images in {train.shown}", *notes, *layout.notes])
    passed = train.all_passed() + (root.passed if train is not root else Counter())
    if count := sum(len(folder.shards) for folder in root):
        passed[".tar (give them as '*.tar')"] += count
    plan = _Plan([train], labels, about, passed)
    if layout.validation is None:
        return plan
    if labels is None:
        plan.about += f"; {layout.validation.name}/ is not used, since the training images have no labels"
        return plan
    tested, problem = _validation(layout.validation, classes)
    if tested is None:
        plan.why = problem
        return plan
    plan.parts.append(layout.validation)
    labels |= tested
    plan.passed += layout.validation.all_passed()
    plan.about += (
        f"; {len(classes)} classes; {layout.validation.total:,} for validation in {layout.validation.shown}{problem}"
    )
    return plan


def _source(table: Table, path: Path) -> Source:
    """Build the data set of a folder from its index."""
    about, name = _said(table.about["about"], path), path.resolve().name or "data"
    passed: Counter[str] = Counter(table.about["passed"])
    train, *tested = (images(table, str(path), part) for part in range(len(table.about["parts"])))
    if not tested:
        return without_validation(name, train, about, passed, why=table.about["why"])
    return Source(name=name, train=train, bank=train, test=tested[0], about=about + passed_over(passed))


def _said(text: str, path: Path) -> str:
    """Replace the NUL characters in a cached text by the current path of the data folder."""
    before = {"\0": str(path), "\0" + os.sep: within(str(path), "")}
    return re.sub(f"\0(?:{re.escape(os.sep)})?", lambda found: before[found[0]], text)


class _Layout(NamedTuple):
    train: Folder
    validation: Folder | None
    notes: list[str]


def _part(folder: Folder) -> str:
    """The name of a folder without common suffixes, such as ``train`` for ``Train_2017``."""
    name = folder.name.casefold()
    while (shorter := _SUFFIX.sub("", name)) != name and shorter:
        name = shorter
    return name


def _layout(root: Folder) -> _Layout:
    """Find the training folder and the validation folder by name."""
    train = [folder for folder in root.folders if _part(folder) in TRAIN]
    aside = sorted(
        (folder for folder in root.folders if _part(folder) in VALIDATION),
        key=lambda folder: (not folder.holds_images, VALIDATION.index(_part(folder))),
    )
    others = [f for f in root.folders if f not in train and f not in aside and f.holds_images]
    if not train:
        if aside and not others and not root.names and any(folder.holds_images for folder in aside):
            names = " and ".join(f"{folder.name}/" for folder in aside)
            raise UsageError(f"--data {root.path} holds {names} and no train/; give {aside[0].path} to train on it")
        return _Layout(root, None, _taken_for_classes([f for f in aside if f.holds_images] if others else []))
    if len(train) > 1:
        names = " and ".join(str(folder.path) for folder in train)
        raise UsageError(f"--data {root.path}: {names} may both be the training set; give one of them")
    if others and not aside:
        parts = [train[0], *others]
        if len(others) > 1 and all(part.names and not _tops(part) for part in parts):
            return _Layout(root, None, _taken_for_classes(train))
        raise UsageError(
            f"--data {root.path}: {train[0].name}/ may be the training set, or a class beside {others[0].name}/; "
            f"give {train[0].path} for the first, and rename the folder for the second"
        )
    notes = [f"{f.total:,} images in {f.name}/ are not used" for f in [*aside[1:], *others] if f.holds_images]
    if root.names:
        notes.append(f"{root.count:,} images beside {train[0].name}/ are not used")
    return _Layout(train[0], aside[0] if aside else None, notes)


def _parts_below(root: Folder) -> list[str]:
    """Messages about validation images in deeper folders, which are used for training like all others.

    Raises:
        UsageError: one such folder holds all the images.
    """

    def has(folder: Folder, names: Sequence[str]) -> bool:
        return any(_part(inner) in names and inner.holds_images for inner in folder.folders)

    found = [folder for folder in root if folder is not root and has(folder, TRAIN) and has(folder, VALIDATION)]
    if len(found) == 1 and found[0].total == root.total:
        raise UsageError(
            f"--data {root.path} holds training and validation images in {found[0].path}; give that folder"
        )
    return [f"{folder.shown} holds validation images, which are used for training too" for folder in found[:3]]


def _taken_for_classes(folders: Sequence[Folder]) -> list[str]:
    return [f"{folder.name}/ is used as a class, like the folders beside it" for folder in folders]


def _tops(folder: Folder) -> list[Folder]:
    return [inner for inner in folder.folders if inner.holds_images]


def _check_classes(tops: Sequence[Folder], at: Path) -> None:
    """Raise a UsageError if the folders look like images and their targets, such as masks, instead of classes."""
    pictures = [top for top in tops if top.name.casefold() in _PICTURES]
    targets = [top for top in tops if top.name.casefold() in _TARGETS]
    if pictures and targets:
        raise UsageError(
            f"--data: {pictures[0].name}/ and {targets[0].name}/ in {at} look like images and their targets, not like "
            f"classes; give {pictures[0].path}"
        )


def _labelled(folder: Folder) -> tuple[dict[Folder, int] | None, list[str], list[str]]:
    """(labels, classes, notes): the classes are the subfolders, if at least two of them hold all the images."""
    tops, notes = sorted(_tops(folder), key=lambda top: natural(top.name)), []
    _check_classes(tops, folder.path)
    if len(tops) < 2 or folder.names:
        if tops and folder.names:
            notes.append(f"{folder.count:,} of them not in its subfolders (first {folder.first})")
        return None, [], notes
    if empty := [inner for inner in folder.folders if not inner.holds_images]:
        names = ", ".join(
            f"{inner.name}{passed_over(inner.all_passed()).replace('; skipped:', ':')}" for inner in empty[:3]
        )
        notes.append(f"{len(empty)} folders hold no image in a supported format ({names})")
    classes = [top.name for top in tops]
    for name, count in Counter(map(str.casefold, classes)).items():
        if count > 1:
            alike = " and ".join(other for other in classes if other.casefold() == name)
            notes.append(f"the classes {alike} differ only in case")
    return {inner: label for label, top in enumerate(tops) for inner in top}, classes, notes


def _validation(folder: Folder, classes: Sequence[str]) -> tuple[dict[Folder, int] | None, str]:
    """The labels of the validation images and a note about them; or None, and why they are not used."""
    tops, places = _tops(folder), {name: label for label, name in enumerate(classes)}
    known = [top for top in tops if top.name in places]
    if not tops and not folder.names:
        return None, f"{folder.name}/ holds no image{passed_over(folder.all_passed())}"
    if folder.names:
        return None, f"{folder.count:,} of {folder.total:,} images in {folder.name}/ are in no class folder"
    if len(tops) == 1 and not known:
        return None, f"{folder.total:,} images in {folder.name}/ are not in class folders, but in {tops[0].name}/"
    if unknown := [top.name for top in tops if top.name not in places]:
        folded = {name.casefold() for name in classes}
        case = " (case counts)" if unknown[0].casefold() in folded else ""
        raise UsageError(
            f"--data: {folder.path} has classes that the training images lack: {', '.join(sorted(unknown))}{case}"
        )
    met = {top.name for top in known}
    missing = [name for name in classes if name not in met]
    said = f" without {len(missing)} of the classes ({', '.join(missing[:3])})" if missing else ""
    return {inner: places[top.name] for top in known for inner in top}, said


def _shards(root: Folder, shards: Sequence[Path], *, keep: bool) -> Source:
    """Open a folder that holds tar files instead of images."""
    if any(shard.parent != root.path for shard in shards):
        folders = sorted({str(shard.parent) for shard in shards}, key=natural)
        raise UsageError(
            f"--data {root.path} holds no image, but tar files in {', '.join(folders[:3])}; give the training "
            f"files, as in '{folders[0]}/*.tar'"
        )
    return open_shards(shards, str(root.path), passed=root.all_passed(), keep=keep)
