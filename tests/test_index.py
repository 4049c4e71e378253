"""The index of a folder: it is right after any change to the folder, the index or the cache, and it saves work."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from fastrm.data import Source, folders, indexed, listing, open_source
from fastrm.data.encoded import FileImages
from fastrm.data.index import Table, opened
from fastrm.data.inventory import inventory
from fastrm.data.looks import FAULTY, SOUND
from fastrm.data.paths import Paths
from fastrm.data.scan import scan
from fastrm.data.stored import DTYPES
from fastrm.files import cache_root
from tests.test_folders import fill


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index folder of a cache that only this test uses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_root() / "index"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes for training and validation, with 5 and 2 images each and 20 in a subfolder; one image is broken."""
    root = tmp_path / "data"
    for part, count in (("train", 5), ("val", 2)):
        fill(root, *(f"{part}/{name}/{i}.png" for name in "ab" for i in range(count)))
    fill(root, *(f"train/a/deep/{i}.png" for i in range(20)))
    (root / "train" / "b" / "3.png").write_bytes(b"broken")
    long_ago(root)
    return root


def long_ago(root: Path) -> None:
    """Set the modification time of all folders to long before they are listed."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        os.utime(folder, (1e9, 1e9))


class Listed:
    """Counts how often a folder is listed and a file is decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.listed = self.decoded = 0

        def count(name: str, plain: Callable[..., object]) -> Callable[..., object]:
            def counting(*args: object) -> object:
                setattr(self, name, getattr(self, name) + 1)
                return plain(*args)

            return counting

        from fastrm.data import scan as scanning

        monkeypatch.setattr(folders, "listed", count("listed", folders.listed))
        monkeypatch.setattr(scanning, "examined", count("decoded", scanning.examined))

    def since(self) -> tuple[int, int]:
        """The number of listings and decodings since the last call."""
        found = self.listed, self.decoded
        self.listed = self.decoded = 0
        return found


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Listed:
    """Counts listings and decodings in this test."""
    return Listed(monkeypatch)


def told(source: Source) -> tuple[object, ...]:
    """Names, labels, hashes, description and name of a source."""
    assert isinstance(source.train, FileImages)
    assert isinstance(source.test, FileImages)
    parts = (source.train, source.test)
    labels = [part.labels.tolist() for part in parts if part.labels is not None]
    names = [[part.name(i) for i in range(len(part))] for part in parts]
    assert names == [[str(path) for path in part.paths] for part in parts]
    hashes = [inventory(part, left_out=0, steps_per_epoch=1).hashes.tolist() for part in parts]
    return names, labels, hashes, source.about, source.name


def plain(data: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """The same, found without a cache."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
        return told(scan(open_source(str(data)), workers=1)[0])


def test_the_second_start_neither_lists_nor_decodes(data: Path, work: Listed, monkeypatch: pytest.MonkeyPatch) -> None:
    source, broken = scan(open_source(str(data)), workers=2)
    assert work.since() == (1, 34)
    again, found = scan(open_source(str(data)), workers=2)
    assert work.since() == (0, 0)
    assert told(source) == told(again) == plain(data, monkeypatch)
    assert broken == found == {str(data / "train" / "b" / "3.png"): "cannot identify image file"}


def test_the_second_start_is_the_same_without_a_validation_folder(data: Path, work: Listed) -> None:
    first, second = (told(scan(open_source(str(data / "train")), workers=1)[0]) for _ in range(2))
    assert work.since() == (1, 30)
    assert first == second
    assert "there is no val folder: kNN is tested on a tenth" in str(first)


def test_identities_are_hashed_as_in_old_checkpoints(data: Path) -> None:
    for _ in range(2):
        source = open_source(str(data))
        files = sorted((data / "train").rglob("*.png"), key=lambda path: path.relative_to(data / "train").parts)
        want = []
        for path in files:
            content = f"{path.relative_to(data / 'train').as_posix()}\0{path.stat().st_size}".encode()
            want.append(struct.unpack("<q", blake2b(content, digest_size=8).digest())[0])
        found = inventory(source.train, left_out=0, steps_per_epoch=1).hashes.tolist()
        assert sorted(found) == sorted(want)
        names = [source.train.name(i) for i in range(len(source.train))]
        assert found == [dict(zip(map(str, files), want, strict=True))[name] for name in names]


def add(data: Path) -> None:
    fill(data, "train/b/new.png")


def remove(data: Path) -> None:
    (data / "train" / "a" / "1.png").unlink()


def rename(data: Path) -> None:
    (data / "val" / "b").rename(data / "val" / "a" / "deeper")


def add_class(data: Path) -> None:
    fill(data, "train/c/0.png")


def overwrite(data: Path) -> None:
    (data / "train" / "a" / "1.png").write_bytes((data / "train" / "a" / "2.png").read_bytes() + b"more")


def touch(data: Path) -> None:
    os.utime(data / "train" / "a" / "1.png", (1e9, 1e9))


def hide(data: Path) -> None:
    (data / "train" / "a" / "deep").rename(data / "train" / "a" / ".deep")


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("change", [add, remove, rename, add_class, overwrite, touch, hide])
def test_a_change_is_found_and_only_new_files_are_decoded(
    change: Callable[[Path], None], settled: bool, data: Path, work: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change is also found if the time of the folder stays the same, as in file systems that count in seconds."""
    if not settled:
        for folder in [data, *(path for path in data.rglob("*") if path.is_dir())]:
            os.utime(folder)
    times = {path: path.stat().st_mtime_ns for path in [data, *data.rglob("*")] if path.is_dir()}
    scan(open_source(str(data)), workers=1)
    work.since()
    change(data)
    for path, time in times.items() if not settled else ():
        if path.is_dir():
            os.utime(path, ns=(time, time))
    found = told(scan(open_source(str(data)), workers=1)[0])
    listed, decoded = work.since()
    assert listed == 1
    assert decoded <= 1 or change is rename
    assert found == plain(data, monkeypatch)
    work.since()
    assert told(scan(open_source(str(data)), workers=1)[0]) == found
    assert work.since() == (0, 0)


def test_a_moved_or_linked_folder_uses_the_same_index(
    data: Path, work: Listed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = told(scan(open_source(str(data)), workers=1)[0])
    (tmp_path / "link").symlink_to(data)
    data.rename(tmp_path / "moved")
    work.since()
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    for path in (tmp_path / "moved", tmp_path / "link", Path("../moved"), Path()):
        found = told(scan(open_source(f"{path}/"), workers=1)[0])
        assert work.since() == (0, 0)
        assert found == plain(path, monkeypatch)
        assert found[1:3] == first[1:3]
        work.since()


@pytest.mark.parametrize("harm", ["cut", "flipped", "foreign", "empty", "older", "folder"])
def test_a_damaged_index_is_rebuilt(
    harm: str, data: Path, work: Listed, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = told(scan(open_source(str(data)), workers=1)[0])
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    flipped = content.copy()
    flipped[len(content) // 2] ^= 1
    older = content[:13] + struct.pack("<I", 0) + content[17:]
    path.unlink()
    if harm == "folder":
        path.mkdir()
    else:
        new = {"cut": content[:-70], "flipped": flipped, "foreign": b"PK" * 99, "empty": b"", "older": older}
        path.write_bytes(new[harm])
    work.since()
    for _ in range(2):
        assert told(scan(open_source(str(data)), workers=1)[0]) == want
    assert work.since()[0] == (2 if harm == "folder" else 1)


def test_a_cache_that_cannot_be_written_is_not_needed(data: Path, work: Listed, cache: Path) -> None:
    want = told(scan(open_source(str(data)), workers=1)[0])
    shutil.rmtree(cache)
    cache.write_bytes(b"in the way")
    for _ in range(2):
        assert told(scan(open_source(str(data)), workers=1)[0]) == want


def test_a_replaced_index_stays_valid_for_open_sources(data: Path, cache: Path) -> None:
    source = open_source(str(data))
    before = told(source)
    remove(data)
    other = told(open_source(str(data)))
    assert told(source) == before != other
    assert len(list(cache.iterdir())) == 1
    assert [path.name for path in pickle.loads(pickle.dumps(source.train)).paths][:1] == ["0.png"]
    assert len(pickle.loads(pickle.dumps(source.train))) == len(source.train)


def test_a_source_is_pickled_as_the_path_of_its_index(data: Path) -> None:
    source = open_source(str(data))
    assert isinstance(source.train, FileImages)
    sent = pickle.dumps(source.train.subset(np.array([2, 1])))
    assert len(sent) < 1000
    found = pickle.loads(sent)
    assert [path.name for path in found.paths] == ["2.png", "1.png"]
    assert found.content(0) == source.train.content(2)


def test_a_file_changed_in_place_is_noticed_when_it_is_read(
    data: Path, work: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample of files that a start examines is empty here; in a large folder, most files are not in it."""
    with monkeypatch.context() as patch:
        patch.setattr(indexed, "SAMPLE", 0)
        source, _ = scan(open_source(str(data)), workers=1)
        overwrite(data)
        same = open_source(str(data))
        assert work.since() == (1, 34)
    files = [again.train for again in (same, source, pickle.loads(pickle.dumps(same)))]
    assert all(isinstance(images, FileImages) and images.paths[1].name == "1.png" for images in files)
    with pytest.warns(UserWarning, match=r"a/1\.png has \d+ bytes, and had \d+ when it was listed; the next") as said:
        read = [images.values(1) for images in files]
    assert len(said) == 1 < len(read)
    changed = told(scan(open_source(str(data)), workers=1)[0])
    assert work.since() == (1, 1)
    assert changed == plain(data, monkeypatch)


def test_broken_links_are_checked_again(data: Path, work: Listed, tmp_path: Path) -> None:
    (data / "train" / "c").symlink_to(tmp_path / "later")
    long_ago(data)
    assert "1 broken links" in open_source(str(data)).about
    open_source(str(data))
    assert work.since() == (1, 0)
    fill(tmp_path, "later/0.png")
    assert "3 classes" in open_source(str(data)).about
    fill(tmp_path, "later/1.png")
    assert len(open_source(str(data)).train) == 32
    assert work.since() == (2, 0)


def test_a_second_scan_in_one_process_uses_the_first(data: Path, work: Listed) -> None:
    source = open_source(str(data))
    _, broken = scan(source, workers=1)
    overwrite(data)
    work.since()
    assert scan(source, workers=1)[1] == broken
    assert work.since() == (0, 1)


def test_file_names_that_are_not_valid_text(tmp_path: Path, work: Listed, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (b"\xff\xfe", b"b\xc3\xbc", b"new\nline"):
        for name in (b"\xe4.png", b"spa ce.png"):
            path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/data/" + folder), os.fsdecode(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    found = []
    for _ in range(2):
        source, broken = scan(open_source(str(tmp_path / "data")), workers=1)
        assert not broken
        found.append([os.fsencode(source.train.name(i)) for i in range(6)])
        pickle.loads(pickle.dumps(source))
    assert found[0] == found[1] == sorted(os.fsencode(path) for path in (tmp_path / "data").rglob("*.png"))
    assert work.since() == (1, 6)


def test_size_dtype_and_bands_are_known_without_decoding(data: Path) -> None:
    Image.new("RGB", (30, 20)).save(data / "train" / "a" / "0.png")
    source = open_source(str(data))
    assert source.train.looks is None  # type: ignore[attr-defined]
    found, _ = scan(source, workers=1)
    looks = open_source(str(data)).train.looks  # type: ignore[attr-defined]
    assert looks.size[0].tolist() == [20, 30]
    assert (looks.size[1:][looks.state[1:] == SOUND] == 8).all()
    assert (looks.state == FAULTY).sum() == 1
    assert len(found.train.looks.size) == len(found.train) == 29  # type: ignore[attr-defined]
    assert {DTYPES[code] for code in found.train.looks.dtype} == {"uint8"}  # type: ignore[attr-defined]
    assert set(found.train.looks.bands) == {3}  # type: ignore[attr-defined]


def test_compact_paths_behave_like_a_list(tmp_path: Path) -> None:
    whole = [Path(text) for text in ("/a/b.png", "/c.png", "/a/d.png", "/a/b/e.png", "f.png", "g/h.png")]
    paths = Paths.of(whole)
    assert list(paths) == whole == [paths[i] for i in range(6)]
    assert paths[-1] == whole[-1]
    assert list(paths[1:5:2]) == whole[1:5:2]
    with pytest.raises(IndexError):
        paths[6]
    assert list(paths.subset(np.array([4, 0])).subset(np.array([1, 1, 0]))) == [whole[0], whole[0], whole[4]]


def test_a_dry_run_writes_no_index(data: Path, cache: Path) -> None:
    want = told(open_source(str(data)))
    shutil.rmtree(cache)
    assert told(open_source(str(data), keep=False)) == want
    assert not cache.exists()


def test_columns_survive_writing_and_reading(tmp_path: Path) -> None:
    columns = {"one": np.arange(5, dtype=np.int32), "two": np.zeros((0, 3)), "three": np.arange(12.0).reshape(3, 4).T}
    table = Table(columns, 5, {"said": "\udcff\0 ü"}, tmp_path / "deep" / "t.index")
    table.keep({"four": np.ones(3, bool)})
    found = opened(tmp_path / "deep" / "t.index")
    assert found is not None
    assert (found.rows, found.about) == (5, table.about)
    for name, column in {**columns, "four": np.ones(3, bool)}.items():
        np.testing.assert_array_equal(found[name], column)
        assert not table[name].flags.writeable or column.size == 0


def test_two_processes_that_write_at_once_leave_a_valid_index(tmp_path: Path) -> None:
    """The second process starts and ends while the first one writes."""
    path = tmp_path / "t.index"
    first, second = (Table({"n": np.full(1000, n)}, 1000, path=path) for n in (1, 2))
    plain = Table._write

    def slowly(table: Table, partial: Path) -> None:
        if table is first:
            with mock.patch("os.getpid", return_value=0):
                second.keep({})
        plain(table, partial)

    with mock.patch.object(Table, "_write", slowly):
        first.keep({})
    assert (first["n"] == 1).all()
    assert (second["n"] == 2).all()
    found = opened(path)
    assert found is not None
    assert (found["n"] == 1).all()
    assert [other.name for other in tmp_path.iterdir()] == ["t.index"]


def test_file_sizes_are_the_same_when_read_in_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrm.data import paths

    files = [tmp_path / f"{i}" for i in range(300)]
    for i, file in enumerate(files):
        file.write_bytes(b"x" * i)
    files[7].unlink()
    want = [-1 if i == 7 else i for i in range(300)]
    for slow in (0.0, 1e9):
        monkeypatch.setattr(paths, "_SLOW", slow)
        sizes, changed = paths.stated(map(str, files), 300)
        assert sizes.tolist() == want
        assert [i for i, time in enumerate(changed) if time != (-1 if i == 7 else files[i].stat().st_mtime_ns)] == []
    assert listing.checksum(["a"]) != listing.checksum(["b"])
