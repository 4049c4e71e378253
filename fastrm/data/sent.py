"""Opens images in one process, and sends the results to the others."""

from __future__ import annotations

import io
import pickle
import socket
import warnings
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrm.data.encoded import EncodedImages, FileImages
from fastrm.data.index import Table
from fastrm.data.indexed import SAMPLE
from fastrm.data.measuring import spread_over
from fastrm.data.pages import PageImages
from fastrm.data.paths import stated
from fastrm.data.scan import MOST
from fastrm.data.shard_index import ShardImages
from fastrm.data.sources import Images, Source
from fastrm.errors import UsageError
from fastrm.machine.distributed import world
from fastrm.machine.meeting import everyone, from_first, together


class Opened(NamedTuple):
    """Images, and information about them."""

    source: Source
    broken: dict[str, str]
    """Images that are left out, by name, with the reason."""
    hashes: NDArray[np.int64]
    """Hashes of the identities of the training images; empty if they are not needed."""
    batch: int | None = None
    """Images per optimizer step of the run that continues; None if no run continues."""


class _ByValue(pickle.Pickler):
    """Sends the content of a table instead of its path."""

    def reducer_override(self, obj: Any) -> Any:
        return obj.by_value() if isinstance(obj, Table) else NotImplemented


def opened_once(open_it: Callable[[], Opened]) -> Opened:
    """Open images in the first process, and share them with all. Call this in all processes.

    Information about files is sent: the other processes list nothing, and check a sample of the files. Arrays, tables
    and Python objects are opened by each process after the first one, which may have to download them.

    Raises:
        UsageError: they cannot be opened, or a process finds other images; all processes raise it.
    """
    rank, size = world()
    if size == 1:
        return open_it()
    with together():
        found = open_it() if rank == 0 else None
        if everyone(found is not None and _travels(found.source))[0]:
            found = pickle.loads(from_first(_packed(found)))
            _check_files(found.source)
            return found
        found = open_it() if found is None else found
        _check_same(found)
        return found


def _travels(source: Source) -> bool:
    every = (images for images in (source.train, source.bank, source.test) if images is not None)
    return all(_in_files(images) for images in every)


def _in_files(images: Images) -> bool:
    """Whether images are places in files, and nothing else."""
    return _in_files(images.files) if isinstance(images, PageImages) else isinstance(images, FileImages | ShardImages)


def _packed(found: Opened | None) -> bytes:
    if found is None:
        return b""
    packed = io.BytesIO()
    _ByValue(packed, protocol=5).dump(found)
    return packed.getvalue()


def _check_files(source: Source) -> None:
    """Compare the sizes of some files with those in the first process.

    A few missing files are left out when they are read; more mean that the processes see different folders.
    """
    assert isinstance(source.train, EncodedImages)
    files = source.train.stored_in()
    chosen = [str(files[at]) for at in spread_over(len(files), SAMPLE)]
    first, *others = everyone((socket.gethostname(), stated(chosen, len(chosen))[0]))
    for number, (host, sizes) in enumerate(others, start=1):
        differ = sizes != first[1]
        missing = int((differ & (sizes < 0)).sum())
        if not differ.any():
            continue
        words = (
            f"--data: of {len(chosen):,} files that process 0 on {first[0]} sees, process {number} on {host} misses "
            f"{missing:,} and finds {int(differ.sum()) - missing:,} of another size; the first is "
            f"{chosen[int(differ.argmax())]}"
        )
        if differ.sum() > MOST * len(chosen):
            raise UsageError(f"{words}; all must see the same images")
        if world().rank == 0:
            warnings.warn(words, stacklevel=2)


def _check_same(found: Opened) -> None:
    """Compare the images of each process with those of the first one."""
    digest = blake2b(found.hashes.tobytes(), digest_size=16).hexdigest()
    first, *others = everyone((len(found.source.train), digest))
    for number, other in enumerate(others, start=1):
        if other != first:
            counts = f"process 0 has {first[0]:,} images, and process {number} {other[0]:,}"
            raise UsageError(
                f"--data: {counts}{'' if other[0] != first[0] else ' others'}; all must see the same images"
            )
