"""The settings that say what the images are and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastrm.settings.kinds import Range

Channels = Literal["auto"] | Annotated[int, Range(at_least=1, at_most=256)]
CropMin = Annotated[float, Range(above=0, at_most=1)]
ImageSize = Annotated[int, Range(at_least=8, at_most=4096)]
Numbers = tuple[float, ...]
Pages = Literal["auto", "first", "bands", "images"]
Positive = tuple[Annotated[float, Range(above=0)], ...]
Workers = Annotated[int, Range(at_least=0, at_most=256)]


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """The images and how they are read."""

    data: str = ""
    """Images to train on. A named set may be digits, fashion-mnist, cifar10, cifar100, stl10, photo-patches (of
    scikit-image) or synthetic. A folder may be train/CLASS/… with optional val/CLASS/…, or CLASS/…, or images at any
    depth without labels. WebDataset shards are a folder of tar files, or a quoted pattern such as
    '/shards/train-{0000..0146}.tar'. A list of paths is @paths.txt. A table is a .csv, .tsv or .parquet file. An array
    is a .npy, .h5 or .hdf5 file. A Hugging Face dataset is hf:PATH or hf:owner/name. Shards, tables or arrays at a URL
    are copied to ~/.cache/fastrm once."""
    image_column: str | None = None
    """Column with the images in a table or a Hugging Face dataset, or their array in an HDF5 file.
    If not given, the column of encoded images, or the one called image, path, file or the like."""
    label_column: str | None = None
    """Column or array with the labels, which may be numbers or text. If not given, label or class."""
    data_root: Path | None = None
    """Folder to read a named set from, or to download it to. If not given, ~/.cache/fastrm.
    For fashion-mnist, a folder with the four IDX files, plain or gzip."""
    image_size: ImageSize = 224
    """Side of the square views, in pixels."""
    crop_min: CropMin = 0.2
    """Smallest fraction of the image area that a random crop covers."""
    augmentation: str | None = None
    """How views are made. If not given, as in the publication of the method.
    Either the numbers and sizes of the views, such as 2x224,8x96, or a TOML file with changes to the method's
    augmentation (docs/tutorial.md), or the config.json of a run, to use its views."""
    batch_size: Annotated[int, Range(at_least=2)] | None = None
    """Images per optimizer step over all processes. If not given, 256 per process."""
    loader: Literal["auto", "dali", "torch", "memory"] = "auto"
    """What reads and augments the images. memory keeps named sets on the device, and decodes other images once, shrunk
    if memory does not suffice. dali uses a GPU, torch worker processes. auto is memory for named sets; for files, dali
    on a GPU where it is installed, otherwise torch, which keeps the images of a set that takes at most 3 % of the
    memory."""
    scan: bool = True
    """Before the run, find broken files in a folder, leave them out, and list them in skipped.txt. Without it,
    unreadable files are left out when they are read, and DALI uses some damaged JPEGs that are otherwise left out."""
    channels: Channels = "auto"
    """Number of bands that the network gets.
    auto is 3 if any image is RGB or all are 8-bit gray, otherwise the bands of the images."""
    value_range: Numbers | None = None
    """Pixel values that become black and white, such as 0,4095. If not given, 0 and 255 for uint8; for another dtype
    the 0.1 and 99.9 percentiles of each band, measured once; for a mix of dtypes, a range for each."""
    mean: Numbers | None = None
    """Mean per channel, where black is 0 and white is 1. If not given, for 8-bit RGB that of the start weights or of
    ImageNet, else measured."""
    std: Positive | None = None
    """Standard deviation per channel. If not given, for 8-bit RGB that of the start weights or of ImageNet, else
    measured."""
    pages: Pages = "auto"
    """How TIFF and other files with several pages are read.
    first reads the first page; bands reads all pages as the bands of one image; images reads each page as an image.
    auto is bands if all files have the same number of gray pages of one size, otherwise first."""
    workers: Workers | None = None
    """Loader processes per training process, 0 for none. If not given, its share of the cores, at most 8."""
