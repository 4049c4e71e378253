"""Draw a contact sheet of what the network sees: a column for each image, its two views below each other.

python -m fastrm.data --data digits --image-size 32 --out views.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch

from fastrm.data import make_loader, open_source, sheets
from fastrm.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from fastrm.machine.memory import enough
from fastrm.settings import command_line
from fastrm.settings.config import defaults
from fastrm.settings.fields import ImageSize, Seed
from fastrm.settings.kinds import Range, checked
from fastrm.terminal import shell


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw both views of some images."""

    data: str
    """A folder, shards, or the name of a set, as in fastrm.train."""
    out: Path
    """The picture that is written."""
    data_root: Path | None = None
    """Where a named set lies."""
    method: str = field(default_factory=lambda: defaults().method.method)
    """Whose augmentation."""
    image_size: ImageSize = 224
    """Side of the views, in pixels."""
    loader: str = "auto"
    """auto, dali, torch or memory."""
    images: Annotated[int, Range(at_least=1)] = 8
    """How many."""
    seed: Seed = 0
    """Of the views."""


def contact_sheet(options: Options) -> None:
    """Write the sheet.

    Raises:
        UsageError: the data cannot be opened, or the picture cannot be written.
    """
    from PIL import Image
    from torchvision.utils import make_grid

    options = checked(options)
    sheets.check("--out", options.out)
    source = open_source(options.data, options.data_root)
    count = min(options.images, len(source.train))
    loader = make_loader(
        source,
        method=options.method,
        image_size=options.image_size,
        batch_size=count,
        device="cpu",
        workers=0,
        seed=options.seed,
        loader=options.loader,
    )
    views = torch.cat(next(iter(loader)).views)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    grid = make_grid((views * std + mean).clamp(0, 1), nrow=count).mul(255).round().byte().permute(1, 2, 0)
    sheets.save("--out", options.out, Image.fromarray(grid.numpy()))
    print(f"data       {source.about}")
    print(f"{options.out}: {count} images of {source.name}, first views above second ones")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = command_line.parse(Options, argv, prog="python -m fastrm.data")
    asked = f"both views of {options.images} images of {options.image_size} pixels"
    with enough(torch.device("cpu"), lambda: asked, "Lower --images or --image-size"):
        contact_sheet(options)


if __name__ == "__main__":
    shell.run(main)
