"""Images in files through NVIDIA DALI: decoding and the two crops there, on the GPU or the CPU.

What follows the crop is :mod:`fastrm.data.batched` on the same device, so that colours are torchvision's: DALI turns a
hue in YIQ, not in HSV. Order and parameters come from :mod:`fastrm.data.draws`, which makes ``seek`` exact.
"""

from __future__ import annotations

import importlib
import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastrm.data import batched
from fastrm.data.augmentation import Augmentation, View
from fastrm.data.draws import BatchSampler, Draws, Sample, as_sizes, batch_generator, blur_radius, draw
from fastrm.data.sources import FileImages, decode

_ORIENTATION = 0x0112
# How a file ends that was not cut off: one that was would stop DALI, without its name.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}

_AHEAD = 2  # batches that are read and cropped while one is in use

_Cropped = list[tuple[Tensor, Draws]]


@cache
def dali_problem() -> str | None:
    """Why DALI cannot be used here; None where it can."""
    try:
        importlib.import_module("nvidia.dali.fn")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            return "DALI is not installed; on Linux: pip install nvidia-dali-cuda130 (or -cuda120)"
        return f"DALI cannot be imported ({error})"
    return None


class Encoded(NamedTuple):
    """A file as DALI gets it."""

    content: NDArray[np.uint8]
    size: tuple[int, int]
    """Height and width, upright."""


def encoded(path: Path) -> Encoded:
    """Read a file; what DALI might show otherwise than :func:`fastrm.data.sources.decode`, or not at all, is decoded
    here and passed on as an uncompressed picture.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: it is no picture, or a broken one.
    """  # fmt: skip
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
        plain = (
            image.mode in ("RGB", "L")
            and image.format in _ENDS
            and content.endswith(_ENDS[image.format])
            and "transparency" not in image.info
            and (orientation == 1 or image.format == "JPEG")
        )
        width, height = image.size
    if not plain:
        upright = decode(path)
        width, height = upright.size
        content = b"P6\n%d %d\n255\n" % upright.size + upright.tobytes()
    elif orientation in (5, 6, 7, 8):
        width, height = height, width
    return Encoded(np.frombuffer(content, dtype=np.uint8), (height, width))


class DaliLoader:
    """Pairs of views of images in files; each pass over the loader is the next epoch.

    A batch depends on the seed and its place (epoch, batch, rank) alone, so that ``seek`` gives the same one anywhere.
    The next batches are read, decoded and cropped while one is in use.
    """

    def __init__(
        self,
        images: FileImages,
        augmentation: Augmentation,
        *,
        image_size: int,
        batch_size: int,
        device: torch.device,
        workers: int,
        seed: int,
        rank: int,
        world_size: int,
        regions: bool = False,
    ) -> None:
        self._images, self._augmentation, self._device = images, augmentation, device
        self._size, self._seed = image_size, seed
        self._sampler = BatchSampler(len(images), batch_size, seed, rank, world_size)
        threads = max(1, workers)
        self._threads = ThreadPoolExecutor(threads)
        self._reader = ThreadPoolExecutor(1)  # one batch after the other
        self._pipeline = _pipeline(augmentation, image_size, batch_size, device, threads, regions=regions)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._sampler)

    def seek(self, batch: int) -> None:
        """Go on from this batch, counted from the start of the run."""
        self._sampler.epoch, self._sampler.skip = divmod(batch, len(self))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        submitted: deque[Future[_Cropped]] = deque()
        try:
            for number, batch in enumerate(self._sampler, start=self._sampler.skip):
                submitted.append(self._reader.submit(self._crop, batch, number))
                if len(submitted) > _AHEAD:
                    yield self._finish(submitted.popleft().result())
            while submitted:
                yield self._finish(submitted.popleft().result())
        finally:
            for unused in submitted:  # left before the end
                unused.cancel()
        self._sampler.epoch, self._sampler.skip = self._sampler.epoch + 1, 0

    def _crop(self, batch: list[Sample], number: int) -> _Cropped:
        """Read the files of a batch, draw its views, and let DALI crop them."""
        files = list(self._threads.map(lambda sample: self._images.read(sample[1], encoded), batch))
        generator = batch_generator(self._seed, batch[0][0], number, self._sampler.rank)
        sizes = as_sizes([file.size for file in files])
        drawn = [draw(view, *sizes, self._size, generator) for view in self._augmentation.views]
        inputs: dict[str, Any] = {"encoded": [file.content for file in files]}
        for name, draws in zip(("first", "second"), drawn, strict=True):
            inputs |= {f"{name}_box": draws.box.int().numpy(), f"{name}_flip": draws.flip.int().numpy()}
        outputs = self._pipeline.run(**inputs)
        return [(self._copied(crops), draws) for crops, draws in zip(outputs, drawn, strict=True)]

    def _finish(self, cropped: _Cropped) -> tuple[Tensor, Tensor]:
        """Carry out what follows the crop."""
        first, second = (
            self._recoloured(crops, draws, view)
            for (crops, draws), view in zip(cropped, self._augmentation.views, strict=True)
        )
        return first, second

    def _copied(self, output: Any) -> Tensor:
        """A copy of our own, uint8 [B, S, S, 3]: DALI writes into its buffers again."""
        if self._device.type == "cpu":
            return torch.from_numpy(np.array(output.as_tensor()))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        copy = torch.empty((len(output), self._size, self._size, 3), dtype=torch.uint8, device=self._device)
        feed_ndarray(output.as_tensor(), copy, cuda_stream=torch.cuda.current_stream(self._device))
        return copy

    def _recoloured(self, crops: Tensor, draws: Draws, view: View) -> Tensor:
        images = (crops.permute(0, 3, 1, 2).float() / 255).contiguous()
        batched.recolour_(images, draws, blur_radius=blur_radius(view, self._size))
        return batched.normalise(images, self._augmentation.mean, self._augmentation.std)


def _pipeline(
    augmentation: Augmentation, size: int, batch_size: int, device: torch.device, threads: int, *, regions: bool
) -> Any:
    """Files and boxes in, two crops out, uint8 [B, S, S, 3]; ``device`` is the only difference between GPU and CPU.

    ``regions`` decodes the two boxes; otherwise the picture is decoded once and the boxes are taken from it.
    """
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"
    filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

    @pipeline_def(  # type: ignore[untyped-decorator, unused-ignore]
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1,  # batches ahead are this loader's business: inputs are given with each run
    )
    def crops() -> tuple[Any, ...]:
        decoder = "mixed" if gpu else "cpu"
        file = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        whole = None if regions else fn.decoders.image(file, device=decoder, output_type=types.RGB)
        views = []
        for name, view in zip(("first", "second"), augmentation.views, strict=True):
            box = fn.external_source(name=f"{name}_box", dtype=types.INT32, ndim=1)
            flip = fn.external_source(name=f"{name}_flip", dtype=types.INT32, ndim=0)
            start, shape = box[0:2], box[2:4]
            if regions:
                picture = fn.decoders.image_slice(file, start, shape, axes=(0, 1), device=decoder)
            else:
                picture = fn.slice(whole, start, shape, axes=(0, 1))
            resized = fn.resize(
                picture, resize_x=size, resize_y=size, interp_type=filters[view.interpolation], antialias=True
            )
            views.append(fn.flip(resized, horizontal=flip, vertical=0))
        return tuple(views)

    pipeline = crops()
    pipeline.build()
    return pipeline
