"""Caches an index of the images in a list or a table, so that it is parsed and its files are checked only once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrm.data.copies import state
from fastrm.data.encoded import FileImages
from fastrm.data.index import TICK, Table, look_up
from fastrm.data.indexed import IndexedImages, differ, images, with_sizes
from fastrm.data.paths import Paths, packed, stated
from fastrm.data.sources import Images, Source, endings
from fastrm.files import home

_TRAIN, _BANK, _TEST = "train", "bank", "test"


def _mark(file: Path) -> str:
    """A digest that changes with a list or a table; for text files, of the whole content.

    Raises:
        OSError: it cannot be read.
    """
    if file.suffix.lower() == ".parquet":
        return state(file)
    digest = blake2b(state(file).encode(), digest_size=16)
    with open(file, "rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def by_index(files: Sequence[Path], told: object, build: Callable[[], Source], *, keep: bool) -> Source:
    """The data set of lists or tables, from its index if that is up to date, otherwise newly built.

    Args:
        files: the lists or tables, by absolute paths.
        told: other values on which the set depends, such as the requested columns.
        build: builds the set, with absolute paths.
        keep: whether to cache the index for the next start.

    Raises:
        UsageError: raised by ``build``.
    """
    begin, where = time.time_ns(), [str(file) for file in files]
    try:
        what = where, [_mark(file) for file in files], told, sorted(endings()), str(home())
    except OSError:  # reported when the file is read
        return build()
    found = look_up(("list", where, None if where else told), what, _holds)
    if found.table is not None:
        return _source(found.table)
    source = build()
    if not keep or not isinstance(source.train, FileImages):
        return source
    table = _made(source)
    table.about["begin"] = begin
    found.keep(table, *with_sizes(table, "", found.earlier))
    return _source(table)


def _made(source: Source) -> Table:
    """The index of a set: first the training images, then the validation images that are not among them."""
    train, test = source.train, source.test
    assert isinstance(train, FileImages)
    places = np.full(train.table.rows, -1, dtype=np.int32)
    places[train.rows] = np.arange(len(train))
    parts, paths = [train], list(train.paths.texts())
    if isinstance(test, FileImages) and (test.table is not train.table or (places[test.rows] < 0).any()):
        parts.append(test)
        paths += test.paths.texts()
    table = Paths.of(paths).table
    stops = np.cumsum([0, *map(len, parts)]).tolist()
    folders = sorted({os.path.dirname(path) for path in paths})
    added: dict[str, NDArray[Any]] = {
        "watched": np.frombuffer(packed(folders), dtype=np.uint8),
        "watched_changed": stated(folders, len(folders))[1],
    }
    used: dict[str, Images | None] = {_TRAIN: train, _BANK: source.bank, _TEST: test}
    rows: dict[str, NDArray[np.int32]] = {}
    for name, some in used.items():
        if isinstance(some, FileImages):
            apart = some is test and len(parts) > 1
            rows[name] = np.arange(stops[1], stops[2], dtype=np.int32) if apart else places[some.rows]
    labels = {name: some.labels for name, some in used.items() if some is not None and some.labels is not None}
    if labels.keys() == rows.keys():  # one column is enough for all parts
        added["label"] = np.zeros(stops[-1], dtype=np.int64)
        for name, of_each in labels.items():
            added["label"][rows[name]] = of_each
    else:
        added |= {f"{name}_label": of_each for name, of_each in labels.items()}
    added |= {f"{name}_rows": of_part for name, of_part in rows.items() if name != _TRAIN}
    table.keep(added)
    spans = zip(stops, stops[1:], parts, strict=False)
    table.about |= {
        "parts": [(start, stop, None if part.root is None else str(part.root)) for start, stop, part in spans],
        "name": source.name,
        "about": source.about,
        "bank_is_train": source.bank is train,
    }
    return table


def _source(table: Table) -> Source:
    """Build the data set from its index."""
    parts = [images(table, "", part) for part in range(len(table.about["parts"]))]

    def used(name: str, of: IndexedImages) -> IndexedImages | None:
        if name != _TRAIN and f"{name}_rows" not in table:
            return None
        start = int(of.rows.start) if isinstance(of.rows, slice) else 0
        some = of if name == _TRAIN else of.subset(table[f"{name}_rows"] - start)
        return some.with_labels(np.array(table[f"{name}_label"])) if f"{name}_label" in table else some

    train = used(_TRAIN, parts[0])
    assert train is not None
    bank = train if table.about["bank_is_train"] else used(_BANK, parts[0])
    return Source(
        name=table.about["name"], train=train, bank=bank, test=used(_TEST, parts[-1]), about=table.about["about"]
    )


def _holds(table: Table) -> bool:
    """Whether an index is up to date, judged by the folders and a sample of the files."""
    folders = [os.fsdecode(name) for name in table["watched"].tobytes().split(b"\0")[:-1]]
    _, changed = stated(folders, len(folders))
    settled = (changed <= table.about["begin"] - TICK).all()  # otherwise it may have changed again with the same time
    same = bool(settled) and np.array_equal(changed, table["watched_changed"])
    return same and not table.stale and not differ(table, "")
