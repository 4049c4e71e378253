"""Data sets of images, and loaders of their augmented views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastrm.data.augmentation import SUPERVISED, Augmentation, View
from fastrm.data.called import Augment
from fastrm.data.dali import dali_problem, decodes_on
from fastrm.data.dali_loader import DaliLoader
from fastrm.data.encoded import EncodedImages
from fastrm.data.eval_loader import EvalLoader
from fastrm.data.formats import PixelFormat
from fastrm.data.items import ItemImages
from fastrm.data.kept import keep, keep_few
from fastrm.data.loader import Batch, Loader
from fastrm.data.memory_loader import MemoryLoader, of_one_size
from fastrm.data.opening import located, open_source
from fastrm.data.settling import PixelOptions, settled
from fastrm.data.sources import ArrayImages, Images, Source
from fastrm.data.torch_loader import TorchLoader
from fastrm.data.views import augmentation_of
from fastrm.errors import UsageError
from fastrm.machine.distributed import on_this_machine
from fastrm.settings.config import check_value

__all__ = [
    "SUPERVISED",
    "Augmentation",
    "Batch",
    "EvalLoader",
    "Loader",
    "PixelFormat",
    "PixelOptions",
    "Source",
    "View",
    "augmentation_of",
    "eval_loader",
    "located",
    "make_loader",
    "open_source",
]


def make_loader(
    data: Any,
    *,
    method: Any,
    image_size: int,
    batch_size: int,
    device: str | torch.device,
    workers: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    loader: str = "auto",
    crop_min: float = 0.2,
    data_root: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    pixels: PixelOptions | None = None,
    epochs: float = 1,
) -> Loader:
    """Return a loader of augmented views.

    Args:
        data: anything that :func:`open_source` takes.
        method: augmentation to use. Pass the name of a method, a subclass of :class:`fastrm.methods.Method`, an
            :class:`Augmentation` (:func:`augmentation_of` reads one), or a callable that maps one image to a tuple of
            views.

            The callable receives the items of a Dataset. For files and named sets it receives a PIL image; for 16-bit
            gray files, and for arrays with deeper pixels or other bands, it receives a tensor [C, H, W]. A view is a
            PIL image or a tensor [C, H, W]. Float views are used as they are; uint8 and PIL views are normalised with
            ImageNet's mean and standard deviation. All views at one position must have one shape, which may differ
            from ``image_size``. The global generators of torch (CPU), NumPy and Python are seeded around Dataset and
            callable by seed, epoch and index, and restored.
        image_size: side of the views, in pixels.
        batch_size: images per batch of this process. The remainder at the end of an epoch is dropped; it differs from
            epoch to epoch.
        device: device of the views.
        workers: loader processes; 0 loads in this process.
        seed: seed of the views, which are the same for any number of workers.
        dtype: dtype of the views. The dtype in which the network computes saves a conversion.
        loader: ``"memory"`` keeps named sets and uint8 arrays on the device, and on a GPU also files of one size;
            other images are kept in host memory once decoded, shrunk if memory does not suffice. ``"dali"`` reads
            files with DALI. ``"torch"`` uses worker processes. ``"auto"`` is memory for named sets and arrays; for
            files, dali on a GPU where it is installed, otherwise torch, which is faster than dali on a CPU. If the
            images are read in more than one epoch and take at most 3 % of the memory, torch keeps what it decodes,
            with the same views.
        crop_min: smallest fraction of the image area that a crop covers, in the augmentation of a method.
        data_root: folder of a named set.
        rank, world_size: number of this process, and of all processes. Together they see every image once per epoch.
        pixels: channels, value range, mean, std and pages of the images; None detects them, see
            :func:`fastrm.data.settling.settled`.
        epochs: number of times that the images will be read.

    Returns:
        A :class:`Loader`. One iteration is one epoch of :class:`Batch`, whose ``views`` are (first, second), or as many
        as your augmentation makes, [B, C, H, W] each, channels last, normalised with the mean and standard deviation of
        the images' format, which are ImageNet's for RGB. ``len`` is the number of batches per epoch.

    Raises:
        UsageError: the data cannot be opened or holds less than a batch, or an argument is of the wrong kind or
            unknown.
    """
    whole = {"image_size": image_size, "batch_size": batch_size, "workers": workers, "seed": seed}
    for name, number in {**whole, "rank": rank, "world_size": world_size}.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise UsageError(f"{name} is {number!r:.80}; it must be a whole number")
    for name in ("image_size", "workers", "seed"):
        check_value(name, whole[name])
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is out of range; it must be at least 1")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} is out of range; it must be at least 0 and below world_size {world_size}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype {dtype} cannot hold views; it must be torch.float32 or another floating one")
    check_value("crop_min", crop_min)
    recipe: Augmentation | Augment
    if isinstance(method, Augmentation) or (callable(method) and not isinstance(method, type)):
        recipe = method
    else:
        recipe = augmentation_of(method, crop_min, image_size=image_size)
    place = _device(device)
    check_value("loader", loader)
    source = settled(open_source(data, data_root), pixels, workers=workers)
    wanted = batch_size * world_size
    if wanted > len(source.train):
        raise UsageError(
            f"--batch-size {wanted} is more than the {len(source.train)} images of {source.name}; "
            f"it must be at most {len(source.train)}"
        )
    common: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": batch_size,
        "device": place,
        "dtype": dtype,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
    }
    kind = _kind(loader, source.train, recipe, place)
    if isinstance(recipe, Augmentation):
        if isinstance(source.train, ItemImages) and source.train.items.unseen is not None:
            raise UsageError(f"data: {source.train.items.unseen}; a callable as augmentation may take it")
        if kind == "memory" and _held_whole(source.train, place):
            assert isinstance(source.train, ArrayImages | EncodedImages)
            return MemoryLoader(source.train, recipe, workers=workers, **common)
        if kind == "dali":
            assert isinstance(source.train, EncodedImages)
            return DaliLoader(source.train, recipe, workers=workers, **common)
    images, notes = source.train, []
    here = on_this_machine(world_size)
    if kind == "memory" and not isinstance(images, ArrayImages):
        views = recipe.views if isinstance(recipe, Augmentation) else (View(),)
        images, said = keep(images, views, image_size, processes=here)
        notes.append(said)
    elif (
        loader == "auto"
        and epochs > 1
        and isinstance(images, EncodedImages)
        and isinstance(recipe, Augmentation)
        and (few := keep_few(images, processes=here)) is not None
    ):
        images, said = few
        notes.append(said)
    if loader == "auto" and isinstance(images, EncodedImages) and not images.format.rgb and place.type == "cuda":
        notes.append("DALI reads RGB of 8 bits per channel only: worker processes read these images")
    made = TorchLoader(images, recipe, workers=workers, **common)
    made.notes += notes
    return made


def _kind(loader: str, images: Images, recipe: Augmentation | Augment, device: torch.device) -> str:
    """The kind of loader that ``make_loader`` builds."""
    held, files = isinstance(images, ArrayImages), isinstance(images, EncodedImages)
    called = not isinstance(recipe, Augmentation)
    if loader == "auto":
        if called or not (held or files):
            return "torch"
        if isinstance(images, ArrayImages) and images.format.bytes and _fits(images, device):
            return "memory"
        return "dali" if _decoded_there(images, device) else "torch"
    if loader == "dali" and called:
        raise UsageError("--loader dali has the built-in augmentations only; for a callable give torch or auto")
    if loader == "memory" and isinstance(images, ItemImages) and not images.items.fixed():
        raise UsageError(
            f"--loader memory keeps images, but the items of {images.items.name} change when they are read again; "
            "for such a Dataset give torch or auto"
        )
    if loader == "dali" and not files:
        other = "a named set give memory, torch or auto" if held else "a Dataset give torch or auto"
        raise UsageError(f"--loader dali reads files only; for {other}")
    if loader == "dali" and not images.format.rgb:
        raise UsageError("--loader dali reads RGB of 8 bits per channel only; for other values give torch or auto")
    if loader == "dali" and (problem := dali_problem()):
        raise UsageError(f"--loader dali cannot be used: {problem}")
    return loader


def _decoded_there(images: Images, device: torch.device) -> bool:
    """Whether DALI decodes these images on this GPU by default."""
    files = isinstance(images, EncodedImages) and images.format.rgb
    return files and device.type == "cuda" and decodes_on(device)


def _held_whole(images: Images, device: torch.device) -> bool:
    """Whether to keep all images on the device as one array, and make all views there."""
    if isinstance(images, ArrayImages):
        return images.format.bytes
    return device.type == "cuda" and isinstance(images, EncodedImages) and of_one_size(images)


def _fits(images: ArrayImages, device: torch.device) -> bool:
    """Whether an array takes at most half of a GPU's memory."""
    return device.type != "cuda" or 2 * images.arrays.nbytes <= torch.cuda.get_device_properties(device).total_memory


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device {device!r:.80} is unknown; it must be cpu, cuda, or one GPU such as cuda:0") from None


def eval_loader(
    images: Images,
    *,
    image_size: int,
    batch_size: int,
    workers: int,
    device: str | torch.device = "cpu",
    loader: str = "auto",
    rank: int = 0,
    world_size: int = 1,
) -> EvalLoader:
    """Return a loader of the images in order, for evaluation: batches of one view per image, float32 [B, C, H, W].

    Unreadable images are left out with a warning; the ``indices`` of a batch say which images it holds. The loader's
    ``broken`` has the files that were left out, and why; more than a tenth of them raises a :class:`UsageError`.
    Process ``rank`` gets every ``world_size``-th batch. If ``device`` is a GPU for which :func:`make_loader` would use
    ``"dali"``, DALI decodes on it and the views stay there; otherwise ``workers`` processes decode.
    """
    place = _device(device)
    return EvalLoader(
        images,
        image_size=image_size,
        batch_size=batch_size,
        workers=workers,
        dali=place if loader in ("auto", "dali") and _decoded_there(images, place) else None,
        rank=rank,
        world_size=world_size,
    )
