"""NVIDIA DALI: whether it can be used, its inputs, and batches that it decodes ahead."""

from __future__ import annotations

import importlib
import io
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastrm.data.stored import as_rgb, header
from fastrm.errors import first_line

Request = TypeVar("Request")
About = TypeVar("About")
_MET = "encountered:"
"""Marker in DALI's errors before the actual message."""
HARDWARE = 0.65
"""Fraction of the JPEGs for the hardware decoder of a GPU; the CUDA cores decode the rest."""
_AHEAD = 2  # batches that are read and decoded while one is in use
# Decoder errors that are not the fault of a file; the numbers are nvImageCodec's, such as those of its allocator.
_OF_THE_MACHINE = re.compile(
    r"nvImageCodec failure: '#(1|2|6|8|9|10|11)'|cuda|nvml|driver|device|alloc|memory", re.IGNORECASE
)


@cache
def dali_problem() -> str | None:
    """Why DALI cannot be used here; None if it can."""
    try:
        importlib.import_module("nvidia.dali.fn")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            return "DALI is not installed; on Linux: pip install nvidia-dali-cuda130 (or -cuda120)"
        return f"DALI cannot be imported ({error})"
    return None


def dali_trial(device: torch.device) -> str | None:
    """Why DALI cannot decode a JPEG on a device; None if it can."""
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "JPEG")
    try:
        pipeline(decode_whole, 1, device, 1).run(encoded=[np.frombuffer(file.getvalue(), dtype=np.uint8)])
    except Exception as error:  # DALI and its libraries raise errors of any type
        return f"it is installed, but cannot decode on {device.type}: {_met(error)}"
    return None


@cache
def decodes_on(device: torch.device) -> bool:
    """Whether DALI is installed and works on a device; warns if it is installed but does not work."""
    if dali_problem() is not None:
        return False
    problem = dali_trial(device)
    if problem is not None:
        warnings.warn(f"DALI is not used: {problem}", stacklevel=2)
    return problem is None


class Encoded(NamedTuple):
    """A file in the form that DALI gets."""

    content: NDArray[np.uint8]
    size: tuple[int, int]
    """Height and width, upright."""


Encode = Callable[[bytes], Encoded]


def encoded(content: bytes) -> Encoded:
    """Return the bytes of a file for DALI. A file that DALI may decode differently from
    :func:`fastrm.data.decode.decode`, or not at all, is decoded here and returned as an uncompressed image.

    Raises:
        BrokenImage: it is not an image, or a broken one.
    """
    found = header(content)
    return Encoded(np.frombuffer(content, dtype=np.uint8), found.size) if found.plain else uncompressed(content)


def uncompressed(content: bytes) -> Encoded:
    """Decode a file here, and return it as a PPM image; raises like :func:`encoded`."""
    picture = as_rgb(content)
    ppm = b"P6\n%d %d\n255\n" % picture.size + picture.tobytes()
    return Encoded(np.frombuffer(ppm, dtype=np.uint8), (picture.height, picture.width))


@dataclass(frozen=True)
class Files(Generic[About]):
    """Files of a batch that are read but not decoded."""

    indices: list[int]
    """Indices of the readable images."""
    inputs: dict[str, Sequence[Any]]
    """Inputs of DALI by name; each has one part per file."""
    about: About
    """Information for after the decoding."""


class DaliDecoder:
    """While one batch is in use, decodes the next one, and reads the files of the one after that.

    Args:
        build: builds a pipeline from files, named ``encoded``, to images uint8 [S, S, 3].
        device: device that decodes.
        threads: number of threads that read files.
        most: largest number of images per call of the pipeline.

    Attributes:
        threads: the threads that read files.
    """

    def __init__(self, build: Callable[[], Any], *, device: torch.device, threads: int, most: int) -> None:
        self._build, self._pipeline, self._most = build, build(), most
        self.threads = ThreadPoolExecutor(threads)
        self._reader, self._decoder = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # each one batch after the other
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._again: str | None = None

    def batches(
        self, requests: Iterable[Request], read: Callable[[Request, Encode], Files[About]]
    ) -> Iterator[tuple[Files[About], list[Tensor]]]:
        """Yield the result of ``read`` for each request, with the outputs of the pipeline, uint8 [B, S, S, 3].

        Without files there is no output.
        """
        submitted: deque[tuple[Future[Files[About]], Future[tuple[Files[About], list[Tensor]]]]] = deque()
        try:
            for request in requests:
                reading = self._reader.submit(read, request, encoded)
                again = partial(read, request, uncompressed)
                submitted.append((reading, self._decoder.submit(self._decoded, reading, again)))
                if len(submitted) > _AHEAD:
                    yield self._ready(*submitted.popleft()[1].result())
            while submitted:
                yield self._ready(*submitted.popleft()[1].result())
        finally:
            for futures in submitted:  # the consumer stopped early
                for unused in futures:
                    unused.cancel()

    def _decoded(
        self, reading: Future[Files[About]], again: Callable[[], Files[About]]
    ) -> tuple[Files[About], list[Tensor]]:
        files = reading.result()
        try:
            return files, self._run(files.inputs)
        except RuntimeError as error:
            if not _of_a_file(error):
                raise
            # DALI does not name the file that it could not decode, and cannot be used afterwards. Pillow finds the
            # file, if it also considers it broken, and decodes the others of this batch.
            self._pipeline = self._build()
            sound, files = files.indices, again()
            if files.indices == sound:
                self._again = _met(error)
            return files, self._run(files.inputs)

    def _run(self, inputs: dict[str, Sequence[Any]]) -> list[Tensor]:
        """Copies of the pipeline's outputs, because DALI reuses its buffers."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        count, whole = len(inputs["encoded"]), list[Tensor]()
        for start in range(0, count, self._most):
            some = {name: given[start : start + self._most] for name, given in inputs.items()}
            parts = [output.as_tensor() for output in self._pipeline.run(**some)]
            with torch.cuda.stream(self._stream):  # so that it does not wait for the training step
                whole = whole or [
                    torch.empty((count, *part.shape()[1:]), dtype=torch.uint8, device=self._device) for part in parts
                ]
            for part, out in zip(parts, whole, strict=True):
                feed_ndarray(part, out[start : start + self._most], cuda_stream=self._stream)
            if self._stream is not None:
                self._stream.synchronize()
        return whole

    def _ready(self, files: Files[About], outputs: list[Tensor]) -> tuple[Files[About], list[Tensor]]:
        """Make a batch available to the consumer."""
        if self._again is not None:
            warnings.warn(
                f"DALI could not decode a batch ({self._again}), but Pillow could: such batches take longer",
                stacklevel=2,
            )
            self._again = None
        if self._stream is not None:
            for pictures in outputs:
                pictures.record_stream(torch.cuda.current_stream(self._device))
        return files, outputs


def _of_a_file(error: RuntimeError) -> bool:
    """Whether DALI's decoder may have failed because of a file, not because of the machine."""
    where, _, met = str(error).rpartition(_MET)
    return "fn.decoders." in where and _OF_THE_MACHINE.search(met) is None


def _met(error: Exception) -> str:
    """The message of a DALI error in one line, without the traceback of the pipeline's definition."""
    return first_line(RuntimeError(str(error).rpartition(_MET)[2]))


def pipeline(outputs: Callable[[Any, dict[str, Any]], Any], batch_size: int, device: torch.device, threads: int) -> Any:
    """A pipeline from files to the result of ``outputs``, which gets the files and the decoder's arguments."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"

    @pipeline_def(  # type: ignore[untyped-decorator, unused-ignore]
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1,  # this module prefetches itself, because each run gets its inputs
    )
    def decoding() -> Any:
        decoder = {"device": "mixed", "hw_decoder_load": HARDWARE} if gpu else {"device": "cpu"}
        return outputs(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1), decoder)

    made = decoding()
    made.build()
    return made


def decode_whole(file: Any, decoder: dict[str, Any], **how: Any) -> Any:
    """In a pipeline: decode files to RGB."""
    from nvidia.dali import fn, types

    return fn.decoders.image(file, output_type=types.RGB, **decoder, **how)
