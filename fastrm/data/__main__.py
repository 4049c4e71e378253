"""Draw a contact sheet of the network's input: one row per image, with the image and its views.

python -m fastrm.data --data digits --image-size 32 --out views.png
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from torch import Tensor

from fastrm.data import augmentation_of, make_loader, open_source, sheets
from fastrm.data.items import ItemImages
from fastrm.data.loader import normalising
from fastrm.data.settling import PixelOptions, settled
from fastrm.data.sources import Images
from fastrm.machine.memory import enough
from fastrm.settings import command_line
from fastrm.settings.config import check_limits, defaults
from fastrm.settings.fields import Seed
from fastrm.settings.inputs import Channels, CropMin, ImageSize, Numbers, Pages, Positive
from fastrm.settings.kinds import Range, checked
from fastrm.terminal import shell


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw some images with their views."""

    data: str
    """Images, as for fastrm.train, such as a folder, the name of a set, a list, a table or shards."""
    out: Path
    """Image file to write."""
    data_root: Path | None = None
    """Folder of a named set."""
    image_column: str | None = None
    """As for fastrm.train."""
    label_column: str | None = None
    """As for fastrm.train."""
    method: str = field(default_factory=lambda: defaults().method.method)
    """Method whose augmentation is drawn."""
    augmentation: str | None = None
    """Changes to that augmentation, as for fastrm.train, such as 2x224,8x96, a TOML file, or a run's config.json."""
    crop_min: CropMin | None = None
    """Smallest fraction of the image area that a random crop covers. If not given, that of the method."""
    image_size: ImageSize = 224
    """Side of the views, in pixels."""
    loader: str = "auto"
    """Loader that makes the views. One of auto, dali, torch or memory."""
    channels: Channels = "auto"
    """Number of bands that the network gets, as for fastrm.train."""
    value_range: Numbers | None = None
    """Pixel values that become black and white, as for fastrm.train."""
    mean: Numbers | None = None
    """Mean per channel to subtract."""
    std: Positive | None = None
    """Standard deviation per channel to divide by."""
    pages: Pages = "auto"
    """How files with several pages are read, as for fastrm.train."""
    images: Annotated[int, Range(at_least=1)] = 8
    """Number of images to draw."""
    seed: Seed = 0
    """Seed of the views."""


def contact_sheet(options: Options) -> None:
    """Write the sheet.

    Raises:
        UsageError: the data cannot be opened, or the sheet cannot be written.
    """
    options = checked(options)
    sheets.check("--out", options.out)
    check_limits(options.value_range)
    crop_min = defaults(method=options.method).input.crop_min if options.crop_min is None else options.crop_min
    recipe = augmentation_of(options.method, crop_min, options.augmentation, options.image_size)
    opened = open_source(
        options.data, options.data_root, image_column=options.image_column, label_column=options.label_column
    )
    source = settled(opened, PixelOptions.of(options))
    count = min(options.images, len(source.train))
    loader = make_loader(
        source,
        method=recipe,
        image_size=options.image_size,
        batch_size=count,
        device="cpu",
        workers=0,
        seed=options.seed,
        loader=options.loader,
    )
    views, indices = next(iter(loader))
    mean, std = normalising(recipe, source.train.format)
    seen = [[sheets.enlarged(picture) for picture in shown(batch, mean, std)] for batch in views]
    side = max(picture.height for column in seen for picture in column)
    rows = []
    for i, at in enumerate(indices):
        picture = source.train.picture(at)
        about = f"{picture.width} x {picture.height} pixels{_label(source.train, at)}"
        tiles = [sheets.Tile(sheets.whole(picture, side)), *(sheets.Tile(column[i]) for column in seen)]
        rows.append(sheets.Row(source.train.name(at), about, tiles))
    titles = ["original", *(f"view {number}\n{_size(batch)}" for number, batch in enumerate(views, start=1))]
    sheets.save("--out", options.out, sheets.draw(rows, titles=titles))
    print(f"data       {source.about}")
    bands, several = _bands(len(mean)), "s" * (count > 1)
    print(f"{options.out}: {count} image{several} of {source.name}, and beside each its {len(views)} views{bands}")


def shown(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Iterator[Image.Image]:
    """Images of normalised views [B, C, H, W], from their first three bands, or from one."""
    by, to = (torch.tensor(values).view(1, -1, 1, 1) for values in (std, mean))
    bands = (views * by + to)[:, : 3 if len(mean) >= 3 else 1]
    pixels = bands.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).squeeze(-1)
    return map(Image.fromarray, pixels.numpy())


def _bands(channels: int) -> str:
    """Which channels are drawn, if not all are."""
    if channels in (1, 3):
        return ""
    return f"; of {channels} bands " + (
        "the first three as red, green and blue" if channels > 3 else "the first as gray"
    )


def _size(views: Tensor) -> str:
    side = views.shape[-1]
    larger = sheets.times(side)
    return f"{side} pixels" + (f", drawn {larger}x" if larger > 1 else "")


def _label(images: Images, index: int) -> str:
    """The label of an image, if it is known without reading all items of a Dataset."""
    labels = None if isinstance(images, ItemImages) else images.labels
    return "" if labels is None else f", label {labels[index]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = command_line.parse(Options, argv, prog="python -m fastrm.data")
    asked = f"the views of {options.images} images of {options.image_size} pixels"
    with enough(torch.device("cpu"), lambda: asked, "Lower --images or --image-size"):
        contact_sheet(options)


if __name__ == "__main__":
    shell.run(main)
