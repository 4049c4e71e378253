"""The layout of a folder of images: what is trained on, what the labels are, and what is for validation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrm.data.encoded import FileImages
from fastrm.data.listing import Folder, listed
from fastrm.data.shards import open_shards
from fastrm.data.sources import LOOKED_FOR, TRAIN, VALIDATION, Source, natural, passed_over, without_validation
from fastrm.errors import UsageError

_SUFFIX = re.compile(r"[\W_]*(\d+|images?|imgs?|data|set|split)$")
_PICTURES = frozenset({"images", "image", "imgs", "img", "jpegimages", "rgb", "photos"})
_TARGETS = frozenset(
    {"masks", "mask", "labels", "label", "annotations", "annotation", "segmentation", "segmentations", "depth", "gt"}
    | {"segmentationclass", "segmentationobject", "groundtruth", "ground_truth"}
)


def open_folder(path: Path) -> Source:
    """Open a folder: ``train/CLASS/…`` and perhaps ``val/CLASS/…``, ``CLASS/…``, images at any depth, or tar shards.

    Raises:
        UsageError: it holds no image or cannot be read, or what is in it can be taken in two ways.
    """
    root = listed(path)
    if not root.below() and (shards := sorted((shard for f in root for shard in f.shards), key=natural)):
        return _shards(root, shards)
    layout = _layout(root)
    train = layout.train
    images, classes, notes = _labelled(train)
    if len(images) == 0:
        said = passed_over(root.all_passed())
        raise UsageError(f"--data {path} holds no image{said}; looked below {train.path} for {LOOKED_FOR}")
    notes += _parts_below(root) if train is root else []
    about = "; ".join([f"{len(images):,} images in {train.path}", *notes, *layout.notes])
    passed = train.all_passed() + (root.passed if train is not root else Counter())
    if count := sum(len(folder.shards) for folder in root):
        passed[".tar (give them as '*.tar')"] += count
    name = path.resolve().name or "data"
    if layout.validation is None or not classes:
        if layout.validation is not None:
            about += f"; {layout.validation.name}/ is not used, since the images to train on have no labels"
        return without_validation(name, images, about, passed)
    test, problem = _validation(layout.validation, classes)
    if test is None:
        return without_validation(name, images, about, passed, why=problem)
    passed += layout.validation.all_passed()
    about += f"; {len(classes)} classes; {len(test):,} for validation in {layout.validation.path}{problem}"
    return Source(name=name, train=images, bank=images, test=test, about=about + passed_over(passed))


class _Layout(NamedTuple):
    train: Folder
    validation: Folder | None
    notes: list[str]


def _part(folder: Folder) -> str:
    """The name of a part of a data set, without what is often added: ``train`` of ``Train_2017``."""
    name = folder.name.casefold()
    while (shorter := _SUFFIX.sub("", name)) != name and shorter:
        name = shorter
    return name


def _layout(root: Folder) -> _Layout:
    """Which folder is trained on, and which is for validation."""
    train = [folder for folder in root.folders if _part(folder) in TRAIN]
    aside = sorted(
        (folder for folder in root.folders if _part(folder) in VALIDATION),
        key=lambda folder: (not folder.holds_images, VALIDATION.index(_part(folder))),
    )
    others = [f for f in root.folders if f not in train and f not in aside and f.holds_images]
    if not train:
        if aside and not others and not root.images and any(folder.holds_images for folder in aside):
            names = " and ".join(f"{folder.name}/" for folder in aside)
            raise UsageError(f"--data {root.path} holds {names} and no train/; give {aside[0].path} to train on it")
        return _Layout(root, None, _taken_for_classes([f for f in aside if f.holds_images] if others else []))
    if len(train) > 1:
        names = " and ".join(str(folder.path) for folder in train)
        raise UsageError(f"--data {root.path}: {names} can both be what is to be trained on; give one of them")
    if others and not aside:
        parts = [train[0], *others]
        if len(others) > 1 and all(part.images and not _tops(part) for part in parts):
            return _Layout(root, None, _taken_for_classes(train))
        raise UsageError(
            f"--data {root.path}: {train[0].name}/ can be all that is to be trained on, or a class beside "
            f"{others[0].name}/; give {train[0].path} for the one, and rename it for the other"
        )
    notes = [f"{len(f.below()):,} images in {f.name}/ are not used" for f in [*aside[1:], *others] if f.holds_images]
    if root.images:
        notes.append(f"{len(root.images):,} images beside {train[0].name}/ are not used")
    return _Layout(train[0], aside[0] if aside else None, notes)


def _parts_below(root: Folder) -> list[str]:
    """Say that folders deeper down hold images for validation, which are trained on with the others.

    Raises:
        UsageError: one of them holds all the images.
    """

    def has(folder: Folder, names: Sequence[str]) -> bool:
        return any(_part(inner) in names and inner.holds_images for inner in folder.folders)

    found = [folder for folder in root if folder is not root and has(folder, TRAIN) and has(folder, VALIDATION)]
    if len(found) == 1 and len(found[0].below()) == len(root.below()):
        raise UsageError(
            f"--data {root.path} holds images to train on and for validation in {found[0].path}; give that"
        )
    return [f"{folder.path} holds images for validation, which are trained on too" for folder in found[:3]]


def _taken_for_classes(folders: Sequence[Folder]) -> list[str]:
    return [f"{folder.name}/ is taken for a class, as the folders beside it are" for folder in folders]


def _tops(folder: Folder) -> list[Folder]:
    return [inner for inner in folder.folders if inner.holds_images]


def _check_classes(tops: Sequence[Folder], at: Path) -> None:
    """Raise a UsageError if folders are pictures and what belongs to them, rather than classes."""
    pictures = [top for top in tops if top.name.casefold() in _PICTURES]
    targets = [top for top in tops if top.name.casefold() in _TARGETS]
    if pictures and targets:
        raise UsageError(
            f"--data: {pictures[0].name}/ and {targets[0].name}/ in {at} look like images and their targets, not like "
            f"classes; give {pictures[0].path}"
        )


def _labelled(folder: Folder) -> tuple[FileImages, list[str], list[str]]:
    """(images, classes, notes): labelled by subfolders if two or more of them hold all the images."""
    tops, notes = sorted(_tops(folder), key=lambda top: natural(top.name)), []
    _check_classes(tops, folder.path)
    if len(tops) < 2 or folder.images:
        if tops and folder.images:
            notes.append(f"{len(folder.images):,} of them beside its folders (first {folder.images[0].name})")
        return FileImages(folder.below(), None, folder.path), [], notes
    if empty := [inner for inner in folder.folders if inner not in tops]:
        names = ", ".join(
            f"{inner.name}{passed_over(inner.all_passed()).replace('; passed over:', ':')}" for inner in empty[:3]
        )
        notes.append(f"{len(empty)} folders hold no image that is read here ({names})")
    classes = [top.name for top in tops]
    for name, count in Counter(map(str.casefold, classes)).items():
        if count > 1:
            alike = " and ".join(other for other in classes if other.casefold() == name)
            notes.append(f"the classes {alike} differ in case alone")
    labels = {top.name: label for label, top in enumerate(tops)}
    found = [(path, labels[top.name]) for top in folder.folders if top in tops for path in top.below()]
    return (
        FileImages([path for path, _ in found], np.array([label for _, label in found], dtype=np.int64), folder.path),
        classes,
        notes,
    )


def _validation(folder: Folder, classes: Sequence[str]) -> tuple[FileImages | None, str]:
    """The labelled images for validation, and what is to be said of them; or None, and why they cannot be used."""
    tops = _tops(folder)
    known = [top for top in tops if top.name in classes]
    total = len(folder.below())
    if total == 0:
        return None, f"{folder.name}/ holds no image{passed_over(folder.all_passed())}"
    if folder.images:
        return None, f"{len(folder.images):,} of {total:,} images in {folder.name}/ are in no class folder"
    if len(tops) == 1 and not known:
        return None, f"{total:,} images in {folder.name}/ are not in class folders, but in {tops[0].name}/"
    if unknown := [top.name for top in tops if top not in known]:
        folded = {name.casefold() for name in classes}
        case = " (case counts)" if unknown[0].casefold() in folded else ""
        raise UsageError(
            f"--data: {folder.path} has classes that the training images have not: {', '.join(sorted(unknown))}{case}"
        )
    missing = [name for name in classes if name not in {top.name for top in known}]
    said = f" without {len(missing)} of the classes ({', '.join(missing[:3])})" if missing else ""
    found = [(path, classes.index(top.name)) for top in known for path in top.below()]
    return FileImages(
        [path for path, _ in found], np.array([label for _, label in found], dtype=np.int64), folder.path
    ), said


def _shards(root: Folder, shards: Sequence[Path]) -> Source:
    """A folder that holds tar files instead of images."""
    if any(shard.parent != root.path for shard in shards):
        folders = sorted({str(shard.parent) for shard in shards}, key=natural)
        raise UsageError(
            f"--data {root.path} holds no image, and tar files in {', '.join(folders[:3])}; give those to train on, as "
            f"in '{folders[0]}/*.tar'"
        )
    return open_shards(shards, str(root.path), passed=root.all_passed())
