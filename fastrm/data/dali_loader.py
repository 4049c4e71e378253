"""Images in files through NVIDIA DALI: decoding and the crops there, on the GPU or the CPU.

What follows the crop is :mod:`fastrm.data.batched` on the same device, so that colours are torchvision's: DALI turns a
hue in YIQ, not in HSV. Order and parameters come from :mod:`fastrm.data.draws`, which makes ``seek`` exact.
"""

from __future__ import annotations

import importlib
import io
import re
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastrm.data import batched
from fastrm.data.augmentation import Augmentation, View
from fastrm.data.draws import Draws, Request, blur_radius, draw_views
from fastrm.data.encoded import EncodedImages
from fastrm.data.loader import Batch, Loader, normalising
from fastrm.data.scan import report
from fastrm.data.stored import as_rgb, header
from fastrm.errors import first_line

_MET = "encountered:"
"""Behind this an error of DALI's says what it is."""
_AHEAD = 2  # batches that are read, decoded and cropped while one is in use
# What a decoder meets that is no fault of a file: numbers are nvImageCodec's, such as of its allocator.
_OF_THE_MACHINE = re.compile(
    r"nvImageCodec failure: '#(1|2|6|8|9|10|11)'|cuda|nvml|driver|device|alloc|memory", re.IGNORECASE
)


class _Read(NamedTuple):
    """A batch before it is decoded."""

    request: Request
    indices: list[int]
    """Of the images that could be read."""
    inputs: dict[str, Any]
    """What DALI is given, by name."""
    drawn: list[Draws]
    """For each view."""


class _Cropped(NamedTuple):
    """A batch before its colours are changed."""

    indices: list[int]
    views: list[tuple[Tensor, Draws]]
    """Crops uint8 [B, S, S, 3] of each view, and what was drawn for the rest."""
    copied: Any
    """CUDA event behind which the crops are there; None on a CPU."""


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


def dali_trial(device: torch.device) -> str | None:
    """Why DALI cannot decode and crop a JPEG on a device; None where it can."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "JPEG")
    inputs = {"encoded": [np.frombuffer(file.getvalue(), dtype=np.uint8)]}
    inputs |= {"box0": [np.array([0, 0, 256, 256], dtype=np.int32)], "flip0": [np.zeros((), dtype=np.int32)]}
    try:
        _pipeline(Augmentation(views=(View(),)), 32, 1, device, 1, regions=False).run(**inputs)
    except Exception as error:  # of whatever kind DALI and its libraries raise
        return f"it is installed, but cannot decode on {device.type}: {_met(error)}"
    return None


class Encoded(NamedTuple):
    """A file as DALI gets it."""

    content: NDArray[np.uint8]
    size: tuple[int, int]
    """Height and width, upright."""


def encoded(content: bytes) -> Encoded:
    """Pass a file's bytes on; what DALI might show otherwise than :func:`fastrm.data.decode.decode`, or not at all, is
    decoded here and passed on as an uncompressed picture.

    Raises:
        BrokenImage: it is no picture, or a broken one.
    """
    found = header(content)
    return Encoded(np.frombuffer(content, dtype=np.uint8), found.size) if found.plain else uncompressed(content)


def uncompressed(content: bytes) -> Encoded:
    """Decode a file here, and pass it on as a PPM picture; raises as :func:`encoded`."""
    picture = as_rgb(content)
    ppm = b"P6\n%d %d\n255\n" % picture.size + picture.tobytes()
    return Encoded(np.frombuffer(ppm, dtype=np.uint8), (picture.height, picture.width))


class DaliLoader(Loader):
    """Views of images in files.

    While one batch is in use, the next is decoded and cropped, and the files of the one after that are read.
    """

    def __init__(
        self,
        images: EncodedImages,
        augmentation: Augmentation,
        *,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        regions: bool = False,
        **sampling: int,
    ) -> None:
        super().__init__(len(images), **sampling)
        self._augmentation, self.views, self.channels = augmentation, len(augmentation.views), 3
        self._mean, self._std = normalising(augmentation, images.format)
        self._images, self._device, self._dtype, self._size = images, device, dtype, image_size
        batch_size = sampling["batch_size"]
        threads = max(1, workers)
        self._threads = ThreadPoolExecutor(threads)
        self._reader, self._decoder = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # each one batch after the other
        self._build = lambda: _pipeline(augmentation, image_size, batch_size, device, threads, regions=regions)
        self._pipeline = self._build()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._again: str | None = None

    def _batches(self) -> Iterator[Batch]:
        submitted: deque[tuple[Future[_Read], Future[_Cropped]]] = deque()
        try:
            for request in self._sampler:
                read = self._reader.submit(self._read, request, encoded)
                submitted.append((read, self._decoder.submit(self._crop, read)))
                if len(submitted) > _AHEAD:
                    yield self._finish(submitted.popleft()[1].result())
            while submitted:
                yield self._finish(submitted.popleft()[1].result())
        finally:
            for futures in submitted:  # left before the end
                for unused in futures:
                    unused.cancel()

    def _read(self, request: Request, encode: Any) -> _Read:
        """Read the files of a batch, and draw its views."""
        read = list(self._threads.map(lambda index: self._images.read(index, encode), request.images))
        indices, files = [index for index, _ in read], [file for _, file in read]
        sizes = [file.size for file in files]
        drawn = draw_views(self._augmentation.views, sizes, self._size, self._sampler.generator(request))
        inputs: dict[str, Any] = {"encoded": [file.content for file in files]}
        for number, draws in enumerate(drawn):
            inputs |= {f"box{number}": draws.box.int().numpy(), f"flip{number}": draws.flip.int().numpy()}
        return _Read(request, indices, inputs, drawn)

    def _crop(self, reading: Future[_Read]) -> _Cropped:
        """Let DALI decode and crop a batch."""
        read = reading.result()
        try:
            outputs = self._pipeline.run(**read.inputs)
        except RuntimeError as error:
            if not _of_a_file(error):
                raise
            # DALI does not say which file it could not decode, and is of no use afterwards. Pillow finds the file, if
            # it too thinks it broken, and decodes the others of this batch.
            self._pipeline = self._build()
            sound, read = len(read.indices), self._read(read.request, uncompressed)
            if len(read.indices) == sound:
                self._again = _met(error)
            outputs = self._pipeline.run(**read.inputs)
        sides = [view.side(self._size) for view in self._augmentation.views]
        each = zip(outputs, read.drawn, sides, strict=True)
        views = [(self._copied(crops, side), draws) for crops, draws, side in each]
        return _Cropped(read.indices, views, None if self._stream is None else self._stream.record_event())

    def _copied(self, output: Any, side: int) -> Tensor:
        """A copy of our own, uint8 [B, S, S, 3]: DALI writes into its buffers again."""
        if self._stream is None:
            return torch.from_numpy(np.array(output.as_tensor()))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        with torch.cuda.stream(self._stream):  # not behind the step that is being trained
            copy = torch.empty((len(output), side, side, 3), dtype=torch.uint8, device=self._device)
        feed_ndarray(output.as_tensor(), copy, cuda_stream=self._stream)
        return copy

    def _finish(self, cropped: _Cropped) -> Batch:
        """Carry out what follows the crop."""
        report(self.broken, self._images, dict(self._images.unreadable))
        if self._again is not None:
            warnings.warn(
                f"DALI could not decode a batch ({self._again}), but Pillow could: such batches take longer",
                stacklevel=2,
            )
            self._again = None
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(cropped.copied)
            for crops, _ in cropped.views:
                crops.record_stream(stream)
        pairs = zip(cropped.views, self._augmentation.views, strict=True)
        return Batch(tuple(self._recoloured(crops, draws, view) for (crops, draws), view in pairs), cropped.indices)

    def _recoloured(self, crops: Tensor, draws: Draws, view: View) -> Tensor:
        images = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        batched.recolour_(images, draws, blur_radius=blur_radius(view, images.shape[-1]))
        out = batched.empty_views(len(images), images.shape[-1], self._dtype, self._device)
        return batched.normalise(images, self._mean, self._std, out=out)


def _of_a_file(error: RuntimeError) -> bool:
    """Whether it may be for a file that DALI's decoder failed, and not for the machine."""
    where, _, met = str(error).rpartition(_MET)
    return "fn.decoders." in where and _OF_THE_MACHINE.search(met) is None


def _met(error: Exception) -> str:
    """What an error of DALI's is about, in one line, without its traceback of a pipeline's definition."""
    return first_line(RuntimeError(str(error).rpartition(_MET)[2]))


def _pipeline(
    augmentation: Augmentation, image_size: int, batch_size: int, device: torch.device, threads: int, *, regions: bool
) -> Any:
    """Files and boxes in, a crop for each view out, uint8 [B, S, S, 3]; one definition for GPU and CPU.

    ``regions`` decodes the boxes alone; otherwise the picture is decoded once and the boxes are taken from it. Once is
    faster on two CPU cores and JPEGs of 500x375: 463 to 501 images a second against 443 to 466. No GPU was timed.
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
        # The hardware decoder of a GPU takes this share of the JPEGs, and the CUDA cores the rest.
        decoder = {"device": "mixed", "hw_decoder_load": 0.65} if gpu else {"device": "cpu"}
        file = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        whole = None if regions else fn.decoders.image(file, output_type=types.RGB, **decoder)
        views = []
        for number, view in enumerate(augmentation.views):
            box = fn.external_source(name=f"box{number}", dtype=types.INT32, ndim=1)
            flip = fn.external_source(name=f"flip{number}", dtype=types.INT32, ndim=0)
            start, shape, side = box[0:2], box[2:4], view.side(image_size)
            if regions:
                picture = fn.decoders.image_slice(file, start, shape, axes=(0, 1), **decoder)
            else:
                picture = fn.slice(whole, start, shape, axes=(0, 1))
            resized = fn.resize(
                picture, resize_x=side, resize_y=side, interp_type=filters[view.interpolation], antialias=True
            )
            views.append(fn.flip(resized, horizontal=flip, vertical=0))
        return tuple(views)

    pipeline = crops()
    pipeline.build()
    return pipeline
