"""Patches of the photographs in scikit-image's wheel, real images for a demo of a minute without a download.

The label of a patch is its photograph. Training patches come from the left part of each photograph, test patches from
the rest.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastrm.data.decode import BROKEN, reason
from fastrm.data.sources import ArrayImages
from fastrm.errors import UsageError

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg"),
    "text.png",
)
"""All photographs in the wheel, in the order of their labels."""
SHORT = 400  # shorter side of the resized photograph, in pixels
TRAIN, TEST = 120, 30  # patches per photograph
LEFT = 0.65  # fraction of the width for training patches
SMALLEST, LARGEST = 40, 64  # side of a patch in the photograph, in pixels
SIDE = 32  # side of the resized patch, in pixels


def photo_patches() -> tuple[ArrayImages, ArrayImages]:
    """Training and test patches, uint8 [N, 32, 32, 3], labelled by photograph; the same ones each time.

    Raises:
        UsageError: scikit-image is not installed, or has other photographs.
    """
    rng = np.random.default_rng(0)
    train: list[NDArray[np.uint8]] = []
    test: list[NDArray[np.uint8]] = []
    for name in PHOTOGRAPHS:
        photograph = _photograph(name)
        split = round(LEFT * photograph.width)
        train += [_patch(photograph, rng, 0, split) for _ in range(TRAIN)]
        test += [_patch(photograph, rng, split, photograph.width) for _ in range(TEST)]
    labels = np.arange(len(PHOTOGRAPHS))
    return (
        ArrayImages(np.stack(train), labels.repeat(TRAIN).astype(np.int64)),
        ArrayImages(np.stack(test), labels.repeat(TEST).astype(np.int64)),
    )


def _photograph(name: str) -> Image.Image:
    found = importlib.util.find_spec("skimage")  # its own functions may download
    if found is None or found.origin is None:
        raise UsageError(
            "--data photo-patches needs the photographs in scikit-image; pip install '.[demo]' in fastrm's folder"
        )
    path = Path(found.origin).parent / "data" / name
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except BROKEN as error:
        raise UsageError(f"--data photo-patches: {path} cannot be read: {reason(error)}") from None
    scale = SHORT / min(image.size)
    return image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.LANCZOS)


def _patch(photograph: Image.Image, rng: np.random.Generator, left: int, right: int) -> NDArray[np.uint8]:
    """A square of random size from a random place between two columns, resized."""
    side = int(rng.integers(SMALLEST, LARGEST, endpoint=True))
    x = int(rng.integers(left, right - side, endpoint=True))
    y = int(rng.integers(0, photograph.height - side, endpoint=True))
    patch = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return np.asarray(patch)
