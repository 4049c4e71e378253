"""Reads a shard: the offsets of the images in a tar file, their labels, and other members."""

from __future__ import annotations

import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrm.data.paths import packed
from fastrm.data.sources import endings
from fastrm.errors import UsageError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_BLOCK = tarfile.BLOCKSIZE


class Shard(NamedTuple):
    """The content of a shard of N images, in their order."""

    names: bytes
    """Names, packed by :func:`fastrm.data.paths.packed`."""
    offsets: NDArray[np.int64]
    """Offset of each image in bytes, [N]."""
    sizes: NDArray[np.int64]
    """Sizes in bytes, [N]."""
    labels: NDArray[np.int64]
    """Labels, -1 for images without one, [N]."""
    passed: Mapping[str, int]
    """Number of unused members by kind."""
    ended: bool
    """Whether the tar file has an end mark."""


class _Part(NamedTuple):
    """One file of a sample."""

    name: str
    ending: str
    """The text after the first dot, in lower case."""
    offset: int
    size: int


def read_shard(path: Path) -> Shard:
    """Find the images and labels of a shard.

    By WebDataset's rule, the key of a member is its path up to the first dot of the last part; the rest is its ending.
    The ending of an image has one part; images with more parts, such as ``.seg.png``, are skipped beside it.

    Raises:
        UsageError: the file is not a complete, uncompressed tar file; a key has two images or two labels, or only an
            image with a longer ending; a label is not a whole number.
    """
    passed: Counter[str] = Counter()
    images: dict[str, list[_Part]] = defaultdict(list)
    labels: dict[str, list[_Part]] = defaultdict(list)
    readable = endings()
    whole: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                folder, _, base = name.rpartition("/")
                if info.isdir():
                    continue
                if info.isreg():
                    whole[name] = info
                stem, _, ending = base.partition(".")
                last = "." + ending.lower().rpartition(".")[2]
                if not stem or folder.split("/")[0] == "__MACOSX":
                    passed["hidden"] += 1
                elif last != ".cls" and last not in readable:
                    passed[last if ending else "without an ending"] += 1
                elif (held := whole.get(info.linkname.removeprefix("./")) if info.islnk() else info) is None:
                    passed["broken links"] += 1
                elif not held.isreg():
                    passed["links" if info.issym() else "special files"] += 1
                elif held.issparse():
                    raise ValueError(f"{info.name} is stored as a sparse file; pack it without tar's --sparse")
                else:
                    part = _Part(info.name, ending.lower(), held.offset_data, held.size)
                    (labels if last == ".cls" else images)[f"{folder}/{stem}"].append(part)
            ended = _ended(path, tar.offset)
        numbers = _labels(path, labels, passed)
        chosen = {key: _image(parts, passed) for key, parts in images.items()}
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"--data: {path} is not a whole, uncompressed tar file ({_why(path, error)})") from None
    except ValueError as error:
        raise UsageError(f"--data: {path} cannot be used: {error}") from None
    if alone := numbers.keys() - chosen.keys():
        passed[".cls without an image"] += len(alone)
    placed = sorted(chosen.items(), key=lambda item: item[1].offset)
    names = packed(part.name.replace("\0", "\\0") for _, part in placed)
    told = np.array([(part.offset, part.size, numbers.get(key, -1)) for key, part in placed], dtype=np.int64)
    offsets, sizes, of_each = told.reshape(-1, 3).T
    return Shard(names, offsets, sizes, of_each, passed, ended)


def _image(parts: list[_Part], passed: Counter[str]) -> _Part:
    """The one image among those of a key."""
    plain = [part for part in parts if "." not in part.ending]
    if len(plain) == 1:
        passed.update("." + part.ending for part in parts if part is not plain[0])
        return plain[0]
    first, *more = plain or parts
    if more and more[0].name == first.name:
        raise ValueError(f"{first.name} is in it twice; keep one")
    names = " and ".join(part.name for part in (first, *more[:1]))
    if plain or len(parts) > 1:
        raise ValueError(
            f"{names} have one key, which ends at the first dot of the name; give each image a key of its own"
        )
    raise ValueError(
        f"{names} has the ending .{parts[0].ending}, since a key ends at the first dot of the name; an image's ending "
        "has no further dot: rename it"
    )


def _labels(path: Path, found: dict[str, list[_Part]], passed: Counter[str]) -> dict[str, int]:
    """The label of each key."""
    labels = {}
    with open(path, "rb") as file:
        for key, parts in found.items():
            plain = [part for part in parts if part.ending == "cls"]
            passed.update("." + part.ending for part in parts if part.ending != "cls")
            if len(plain) > 1:
                raise ValueError(f"{plain[0].name} and {plain[1].name} are two labels of one key; keep one")
            for part in plain:
                file.seek(part.offset)
                text = file.read(min(part.size, 32)).strip()
                number = int(text) if text.isdigit() else -1
                if not 0 <= number < 2**31 or part.size > 32:
                    raise ValueError(
                        f"the label in {part.name} is {text!r}; it must be a whole number from 0 to {2**31 - 1}"
                    )
                labels[key] = number
    return labels


def _ended(path: Path, offset: int) -> bool:
    """Whether an end mark follows the last member; False if nothing follows.

    Raises:
        ValueError: something else follows, which tar readers take for the end.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(_BLOCK)
        if not block:
            return False
        if block.strip(b"\0") or len(block) < _BLOCK:
            raise ValueError(f"it is damaged or cut off at byte {offset:,}")
        while rest := file.read(2**20):
            if rest.strip(b"\0"):
                raise ValueError(
                    f"it continues after its end mark at byte {offset:,}; pack it again if tar files were joined"
                )
    return True


def _why(path: Path, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError:
        return str(error)
    packed = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    return f"it is packed with {packed}; images are read by their offsets, so unpack it" if packed else str(error)
