"""Files with several pages, each of which is an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastrm.data.encoded import EncodedImages
from fastrm.data.stored import Values, stored


class PageImages(EncodedImages):
    """The pages of images in files.

    Args:
        files: files, which are read page by page.
        places: index of the file and page per image, int32 [N, 2].
    """

    NOUN = "pages"

    def __init__(self, files: EncodedImages, places: NDArray[np.int32]) -> None:
        super().__init__(None if files.labels is None else files.labels[places[:, 0]], slice(0, len(places)))
        self.files, self._places = files, places

    @classmethod
    def of(cls, files: EncodedImages, counts: Sequence[int] | NDArray[np.int64]) -> PageImages:
        """All pages of all files; ``counts`` has the number of pages per file."""
        places = np.repeat(np.arange(len(files)), counts)
        pages = np.concatenate([np.arange(count) for count in counts])
        return cls(files, np.stack([places, pages], axis=1).astype(np.int32))

    def _place(self, index: int) -> tuple[int, int]:
        """The index of an image's file, and its page."""
        file, page = self._places[self.row(index)].tolist()
        return file, page

    def name(self, index: int) -> str:
        """The name of the file, and the page number from 1."""
        file, page = self._place(index)
        return f"{self.files.name(file)}, page {page + 1}"

    def content(self, index: int) -> bytes:
        """The bytes of the whole file."""
        return self.files.content(self._place(index)[0])

    def values(self, index: int) -> Values:
        """The stored values of a page, [H, W, bands]."""
        return stored(self.content(index), self._place(index)[1])

    def pixels(self, index: int) -> Tensor:
        """A page in the form that views are made from."""
        return self.format.fitted(self.values(index))

    def identities(self) -> Iterator[bytes]:
        """The identity of each page: its file and number."""
        files = list(self.files.identities())
        return (files[file] + b"\0%d" % page for file, page in self._places[self.rows].tolist())

    def stored_in(self) -> Sequence[Path]:
        """The files on disk."""
        return self.files.stored_in()
