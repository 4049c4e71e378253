"""Files with several pages, each of which is an image of its own."""

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
        files: of which each is read page by page.
        rows: int32 [N, 2]: for each image the index of its file and its page.
    """

    NOUN = "pages"

    def __init__(self, files: EncodedImages, rows: NDArray[np.int32]) -> None:
        super().__init__(None if files.labels is None else files.labels[rows[:, 0]])
        self.files, self.rows = files, rows

    @classmethod
    def of(cls, files: EncodedImages, counts: Sequence[int] | NDArray[np.int64]) -> PageImages:
        """All pages of all files; ``counts`` says how many each has."""
        places = np.repeat(np.arange(len(files)), counts)
        pages = np.concatenate([np.arange(count) for count in counts])
        return cls(files, np.stack([places, pages], axis=1).astype(np.int32))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """That of the file, and the number of the page from 1 on."""
        file, page = self.rows[index].tolist()
        return f"{self.files.name(file)}, page {page + 1}"

    def content(self, index: int) -> bytes:
        """The bytes of the whole file."""
        return self.files.content(int(self.rows[index, 0]))

    def values(self, index: int) -> Values:
        """What is stored of a page, [H, W, bands]."""
        return stored(self.content(index), int(self.rows[index, 1]))

    def pixels(self, index: int) -> Tensor:
        """A page as its views are made of it."""
        return self.format.fitted(self.values(index))

    def identities(self) -> Iterator[bytes]:
        """What tells each page from others: its file, and its number."""
        files = list(self.files.identities())
        return (files[file] + b"\0%d" % page for file, page in self.rows.tolist())

    def stored_in(self) -> Sequence[Path]:
        """The files on disk."""
        return self.files.stored_in()

    def subset(self, indices: NDArray[np.int64]) -> PageImages:
        """Return the images at ``indices``."""
        return PageImages(self.files, self.rows[indices])
