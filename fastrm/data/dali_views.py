"""Evaluation views of images in files, decoded, resized and cropped by NVIDIA DALI."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from torchvision.transforms.v2 import functional

from fastrm.data.dali import DaliDecoder, Encode, Encoded, Files, decode_whole, pipeline
from fastrm.data.decode import BROKEN, reason
from fastrm.data.encoded import EncodedImages
from fastrm.data.eval_view import seen_of

Views = tuple[list[int], Tensor | None, dict[int, str]]
"""Indices and views of a batch, and the reasons for the images that are left out, by index."""
_MOST = 32  # decoded images in memory; at 24 million pixels each, they take 2.3 GB


class DaliViews:
    """Batches of one view per image on a device; unreadable images are left out.

    Values differ from :func:`fastrm.data.eval_view.eval_view` by rounding: that function rounds between resizing along
    the two sides, and decoders differ by 1 or 2 of 255.
    """

    def __init__(
        self, images: EncodedImages, batches: Sampler[list[int]], *, image_size: int, device: torch.device, threads: int
    ) -> None:
        self._images, self._batches, self._size = images, batches, image_size
        build = partial(pipeline, partial(_seen, image_size=image_size), _MOST, device, threads)
        self._decoder = DaliDecoder(build, device=device, threads=threads, most=_MOST)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Views]:
        mean, std = (list(values) for values in (self._images.format.mean, self._images.format.std))
        for files, seen in self._decoder.batches(self._batches, self._read):
            views = None
            if seen:
                scaled = functional.to_dtype(seen[0].permute(0, 3, 1, 2), torch.float32, scale=True)
                views = functional.normalize(scaled, mean, std)
            unreadable = self._images.unreadable
            yield files.indices, views, {index: unreadable[index] for index in files.about if index in unreadable}

    def _read(self, wanted: list[int], encode: Encode) -> Files[list[int]]:
        """Read the files of a batch, and compute the visible part of each."""

        def read(index: int) -> Encoded | None:
            if index not in self._images.unreadable:
                try:
                    return encode(self._images.content(index))
                except BROKEN as error:
                    self._images.unreadable[index] = reason(error)
            return None

        pairs = zip(wanted, self._decoder.threads.map(read, wanted), strict=True)
        found = {index: file for index, file in pairs if file is not None}
        boxes = [np.array(seen_of(*file.size, self._size), dtype=np.float32) for file in found.values()]
        return Files([*found], {"encoded": [file.content for file in found.values()], "box": boxes}, wanted)


def _seen(file: Any, decoder: dict[str, Any], *, image_size: int) -> Any:
    """In a pipeline: decode files, and resize their visible parts to uint8 [B, S, S, 3]."""
    from nvidia.dali import fn, types

    # Upsample the colours of JPEGs as Pillow does.
    picture = decode_whole(file, decoder, jpeg_fancy_upsampling=True)
    box = fn.external_source(name="box", dtype=types.FLOAT, ndim=1)
    return fn.resize(
        picture,
        resize_x=image_size,
        resize_y=image_size,
        roi_start=box[0:2],
        roi_end=box[2:4],
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
