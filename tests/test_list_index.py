"""The index of lists, tables and given paths: it gives the same images as without it, and saves reading them again."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrm.data import Source, indexed, list_index, open_source
from fastrm.data import scan as scanning
from fastrm.data.encoded import FileImages
from fastrm.data.paths import stated
from fastrm.data.scan import scan
from fastrm.files import cache_root
from tests.test_folders import fill
from tests.test_index import long_ago


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(indexed, "SAMPLE", 4)


NAMES = [f"{folder}/{i}.png" for i in range(12) for folder in "ab"]
"""Names that alternate between two folders."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the images of NAMES, changed long ago."""
    fill(tmp_path / "data", *NAMES)
    long_ago(tmp_path / "data")
    return tmp_path / "data"


def lines(*rows: str) -> str:
    """A text of these lines."""
    return "\n".join(rows) + "\n"


def as_list(root: Path) -> str:
    """A training list with labels and a repeated name, and a validation list beside it."""
    (root / "train.txt").write_text(lines("# some", *(f"{name}\t{name[0]}" for name in NAMES[:20]), NAMES[0]))
    (root / "val.txt").write_text(lines(*(f"{root}/{name},{name[0]}" for name in NAMES[20:])))
    return f"@{root}/train.txt"


def as_list_with_some_labels(root: Path) -> str:
    (root / "some.txt").write_text(lines(*(f"{name},{name[0]}" for name in NAMES[:20]), *NAMES[20:]))
    return f"@{root}/some.txt"


def as_csv(root: Path) -> str:
    parts = [{1: "val", 3: "other"}.get(i % 6, "train") for i in range(24)]
    rows = (f"{name},{name[0]},{part}" for name, part in zip(NAMES, parts, strict=True))
    (root / "all.csv").write_text(lines("path,label,split", *rows))
    return str(root / "all.csv")


def as_parquet(root: Path) -> str:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"file": NAMES}), root / "all.parquet")
    return str(root / "all.parquet")


def as_paths(root: Path) -> list[Path]:
    return [root / name for name in NAMES]


KINDS = [as_list, as_list_with_some_labels, as_csv, as_parquet, as_paths]


class Work:
    """Counts the sources that are built, the files whose size is read, and the files that are decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = {"built": 0, "looked": 0, "decoded": 0}
        made, examined = list_index._made, scanning.examined

        def making(source: Source) -> object:
            self.counts["built"] += 1
            return made(source)

        def looking(paths: Sequence[str], number: int) -> object:
            self.counts["looked"] += number
            return stated(paths, number)

        def decoding(content: bytes) -> object:
            self.counts["decoded"] += 1
            return examined(content)

        monkeypatch.setattr(list_index, "_made", making)
        monkeypatch.setattr(indexed, "stated", looking)
        monkeypatch.setattr(scanning, "examined", decoding)

    def since(self) -> tuple[int, ...]:
        """The three counts since the last call."""
        found = tuple(self.counts.values())
        self.counts = dict.fromkeys(self.counts, 0)
        return found


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def told(source: Source) -> list[object]:
    """Description, names, labels, hashes and content of all images of a source."""
    parts: list[object] = [source.about, source.name]
    for images in (source.train, source.bank, source.test):
        if images is not None:
            assert isinstance(images, FileImages)
            labels = None if images.labels is None else images.labels.tolist()
            parts += [[images.name(i) for i in range(len(images))], labels, images.hashes().tolist()]
            parts.append([images.content(i) for i in range(len(images))])
    return parts


def start(data: Any, *, keep: bool = True) -> Source:
    """Open and scan a source, as the start of a run does."""
    return scan(open_source(data, keep=keep), workers=1)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_start_is_the_same_and_checks_a_few_files(
    kind: Callable[[Path], Any], data: Path, work: Work
) -> None:
    given = kind(data)
    long_ago(data)
    plain = open_source(given, keep=False)
    assert type(plain.train) is FileImages
    before = told(plain)
    assert told(start(given)) == before
    built, looked, decoded = work.since()
    assert (built, decoded) == (1, looked - 4)  # the sizes of all files, and of the sample of four again
    again = start(given)
    assert work.since() == (0, 8, 0)
    assert told(again) == before
    assert (again.bank is again.train) == (plain.bank is plain.train)
    sent = pickle.dumps(again.train)
    assert len(sent) < 1000
    assert told(Source(**vars(again) | {"train": pickle.loads(sent), "bank": None})) == told(
        Source(**vars(plain) | {"bank": None})
    )


def overwrite(root: Path, given: Any) -> Any:
    (root / NAMES[0]).write_bytes((root / NAMES[1]).read_bytes() + b"more")
    return given


def remove(root: Path, given: Any) -> Any:
    (root / NAMES[5]).unlink()
    return given


def edit(root: Path, given: Any) -> Any:
    if isinstance(given, list):
        return given[1:]
    path = Path(given.removeprefix("@"))
    path.write_text(path.read_text().replace(NAMES[7], "a/0.png"))
    return given


@pytest.mark.parametrize("kind", [as_list, as_csv, as_paths])
@pytest.mark.parametrize("change", [overwrite, remove, edit])
def test_a_change_of_a_list_is_found_and_only_new_files_are_decoded(
    change: Callable[[Path, Any], Any], kind: Callable[[Path], Any], data: Path, work: Work
) -> None:
    given = kind(data)
    long_ago(data)
    start(given)
    given = change(data, given)
    work.since()
    found = start(given)
    assert work.since()[2] <= 1 or (change is edit and kind is as_paths)
    names = [found.train.name(i) for i in range(len(found.train))]
    want = open_source(given, keep=False).train
    assert names == [name for i in range(len(want)) if os.path.exists(name := want.name(i))]
    sizes = {name: os.path.getsize(name) for name in names}
    index = found.train.table["bytes"][found.train.rows].tolist()  # type: ignore[attr-defined]
    assert index == list(sizes.values())


@pytest.mark.parametrize("kind", [as_list, as_parquet])
def test_a_listed_file_changed_in_place_is_noticed_when_it_is_read(
    kind: Callable[[Path], Any], data: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = kind(data)
    long_ago(data)
    with monkeypatch.context() as patch:
        patch.setattr(indexed, "SAMPLE", 0)
        start(given)
        overwrite(data, given)
        source = start(given)
        assert work.since() == (1, 24, 24)
    with pytest.warns(UserWarning, match=r"a/0\.png has \d+ bytes, and had \d+ when it was listed; the next"):
        source.train.values(0)
    start(given)
    built, _, decoded = work.since()
    assert (built, decoded) == (1, 1)


def test_no_index_is_kept_of_recent_changes_or_on_request(data: Path, work: Work) -> None:
    given = as_list(data)
    os.utime(data / "a")  # changed just now: it may change again and get the same time
    open_source(given, keep=False)
    assert not cache_root().exists()
    for _ in range(2):
        open_source(given)
    assert work.since()[0] == 2
    assert len(list((cache_root() / "index").iterdir())) == 1
    (data / "train.txt").write_text("")
    with pytest.raises(Exception, match="names no image"):
        open_source(given)


def test_a_subset_of_the_images_keeps_its_rows_of_the_index(data: Path) -> None:
    given = as_csv(data)
    for _ in range(2):
        source = open_source(given)
        part = source.train.subset(np.array([3, 0]))
        assert [part.name(i) for i in range(2)] == [source.train.name(3), source.train.name(0)]
        assert part.hashes().tolist() == source.train.hashes()[[3, 0]].tolist()
        assert part.labels is not None
        assert source.train.labels is not None
        assert part.labels.tolist() == source.train.labels[[3, 0]].tolist()
