"""Shards with more than an image and a label per sample: members are used, skipped and counted, or refused."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrm.data import Source, open_source, scan, shard_index
from fastrm.data.shard_index import ShardImages
from fastrm.errors import UsageError
from fastrm.files import cache_root


def picture(shade: int = 0, kind: str = "JPEG") -> bytes:
    """The bytes of an image of 9x7 pixels with this red value."""
    written = io.BytesIO()
    Image.new("RGB", (9, 7), (shade, 0, 0)).save(written, kind)
    return written.getvalue()


def pack(path: Path, members: list[tuple[str, bytes]], **kinds: Any) -> str:
    """Write a tar file; ``kinds`` maps the names of links to (kind, target)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if name in kinds:
                info.type, info.linkname = kinds[name]
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def samples(*keys: str, ending: str = "jpg") -> list[tuple[str, bytes]]:
    """Members for each key: an image, and its number as label."""
    return [part for i, key in enumerate(keys) for part in ((f"{key}.{ending}", picture(i)), (f"{key}.cls", b"%d" % i))]


def names(source: Source) -> list[str]:
    """The file names of all images."""
    assert isinstance(source.train, ShardImages)
    return [Path(source.train.name(index)).name for index in range(len(source.train))]


def labels(source: Source) -> list[int]:
    """The labels of all images."""
    assert source.train.labels is not None
    return source.train.labels.tolist()


def test_samples_as_img2dataset_and_segmentation_sets_store_them(tmp_path: Path) -> None:
    members = []
    for i in range(3):
        extra = [(f"000{i}.json", b"{}"), (f"000{i}.txt", b"a caption"), (f"000{i}.seg.png", picture(9, "PNG"))]
        members += [*extra, (f"000{i}.jpg", picture(i)), (f"000{i}.cls", b" 7\n")]
    source = open_source(pack(tmp_path / "a.tar", [*members, ("._0000.jpg", b"x"), ("Readme", b"")]))
    assert names(source) == ["0000.jpg", "0001.jpg", "0002.jpg"]
    assert labels(source) == [7, 7, 7]
    assert source.about.endswith("skipped: 3 .json, 3 .seg.png, 3 .txt, 1 hidden, 1 without an ending")


def test_keys_are_paths_and_the_case_of_endings_is_ignored(tmp_path: Path) -> None:
    members = [("./a/0.CLS", b"1"), ("a/0.JPG", picture()), ("b/0.PNG", picture(1, "PNG")), ("b/0.cls", b"0")]
    source = open_source(pack(tmp_path / "a.TAR", members))
    assert labels(source) == [1, 0]
    assert isinstance(source.train, ShardImages)
    assert source.train.content(1) == picture(1, "PNG")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (samples("img.v1.0001", "img.v1.0002"), "img.v1.0001.jpg and img.v1.0002.jpg have one key"),
        (samples("img.v1.0001"), "img.v1.0001.jpg has the ending .v1.0001.jpg, since a key ends at the first dot"),
        (samples("0") + samples("0", ending="png")[:1], "0.jpg and 0.png have one key"),
        ([("0.rgb.jpg", picture()), ("0.cls", b"1")], "0.rgb.jpg has the ending .rgb.jpg"),
        ([*samples("0"), ("0.jpg", picture(3))], "0.jpg is in it twice; keep one"),
        ([*samples("0"), ("0.CLS", b"1")], "0.cls and 0.CLS are two labels of one key"),
        ([*samples("0"), ("1.jpg", b""), ("1.cls", b"cat")], "the label in 1.cls is b'cat'; it must be a whole"),
        ([("1.jpg", picture()), ("1.cls", b"1" + b" " * 40)], "the label in 1.cls"),
        ([("a.txt", b""), ("b.mp4", b"")], "holds no image; skipped: 1 .mp4, 1 .txt; looked for what Pillow reads"),
    ],
)
def test_samples_without_one_image_and_one_label_are_refused(
    members: list[tuple[str, bytes]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(pack(tmp_path / "a.tar", members))


def test_missing_labels_are_counted(tmp_path: Path) -> None:
    members = [*samples("0", "1"), ("2.jpg", picture()), ("3.cls", b"3"), ("1.fine.cls", b"9")]
    source = open_source(pack(tmp_path / "a.tar", members))
    assert source.train.labels is source.test is None
    assert source.about == (
        "3 images in 1 shards; 1 of them have no .cls (first 2.jpg), so no label is used; without labels; "
        "skipped: 1 .cls without an image, 1 .fine.cls"
    )


def test_hard_links_are_followed_and_other_links_are_counted(tmp_path: Path) -> None:
    links = {
        "1.jpg": (tarfile.LNKTYPE, "0.jpg"), "1.cls": (tarfile.LNKTYPE, "0.cls"), "2.jpg": (tarfile.LNKTYPE, "9.jpg"),
        "3.jpg": (tarfile.SYMTYPE, "0.jpg"), "4.jpg": (tarfile.FIFOTYPE, ""),
    }  # fmt: skip
    source = open_source(pack(tmp_path / "a.tar", [*samples("0"), *((name, b"") for name in links)], **links))
    assert names(source) == ["0.jpg", "1.jpg"]
    assert labels(source) == [0, 0]
    assert isinstance(source.train, ShardImages)
    assert source.train.content(1) == source.train.content(0) == picture()
    assert "skipped: 1 broken links, 1 links, 1 special files" in source.about


def test_a_sparse_member_is_named(tmp_path: Path) -> None:
    content = picture() + bytes(4096)
    info = tarfile.TarInfo("0.jpg")
    info.pax_headers = {"GNU.sparse.map": f"0,{len(content)}", "GNU.sparse.size": str(len(content) + 9)}
    info.size = len(content)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UsageError, match=r"0.jpg is stored as a sparse file"):
        open_source(str(tmp_path / "a.tar"))


def test_compressed_shards_are_refused_with_advice(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", samples("0", "1"))
    packed = gzip.compress((tmp_path / "a.tar").read_bytes())
    for name, message in (
        ("b.tar", "packed with gzip; .* unpack"),
        ("b.tar.gz", "compressed, .* unpack"),
        ("b.TGZ", "unp"),
    ):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(UsageError, match=message):
            open_source(str(tmp_path / name))


def test_joined_damaged_or_truncated_tar_files_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        pack(tmp_path / f"{name}.tar", samples(f"{name}0", f"{name}1"))
    first, second = ((tmp_path / f"{name}.tar").read_bytes() for name in "ab")
    (tmp_path / "joined.tar").write_bytes(first + second)
    with tarfile.open(tmp_path / "a.tar") as tar:
        third = tar.getmembers()[2].offset
    (tmp_path / "damaged.tar").write_bytes(first[:third] + b"x" * 512 + first[third + 512 :])
    (tmp_path / "cut.tar").write_bytes(first[: third + 100])
    for name, message in (
        ("joined", "continues after its end mark at byte"),
        ("damaged", f"damaged or cut off at byte {third:,}"),
        ("cut", f"damaged or cut off at byte {third:,}"),
    ):
        with pytest.raises(UsageError, match=message):
            open_source(str(tmp_path / f"{name}.tar"))
    (tmp_path / "unended.tar").write_bytes(first.rstrip(b"\0") + bytes(-len(first.rstrip(b"\0")) % 512))
    assert "1 shards have no end mark and may be cut off (first" in open_source(str(tmp_path / "unended.tar")).about


def test_patterns_of_shards(tmp_path: Path) -> None:
    for i in (0, 9, 10):
        pack(tmp_path / f"train-{i}.tar", samples(f"{i}", f"1{i}"))
    pack(tmp_path / "{odd}[1].tar", samples("odd", "even"))
    for pattern in ("train-*.tar", "train-[0-9]*.tar", "train-{0,9,10}.tar", "tra{in-0,in-9,in-10}.tar"):
        assert names(open_source(str(tmp_path / pattern)))[::2] == ["0.jpg", "9.jpg", "10.jpg"], pattern
    assert names(open_source(str(tmp_path / "{odd}[1].tar"))) == ["odd.jpg", "even.jpg"]
    (tmp_path / "folder.tar").mkdir()
    for pattern, message in (
        ("valid-*.tar", "no file matches .*valid-"),
        ("{train-*,train-0}.tar", "names .*train-0.tar more than once"),
        ("fol*.tar", "folder.tar is a folder"),
        ("a.tar::b.tar", "several files are named as in"),
        ("pipe:curl http://x/a.tar", "several files are named as in .* commands are not run"),
    ):
        with pytest.raises(UsageError, match=message):
            open_source(pattern if pattern.startswith("pipe:") else str(tmp_path / pattern))
    pack(tmp_path / "train-val-0.tar", samples("a"))
    with pytest.raises(
        UsageError, match=r"a validation shard, train-val-0.tar; give the training shards, as in '.*\*.tar'"
    ):
        open_source(str(tmp_path / "train-*.tar"))


def test_an_empty_shard_is_reported(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", samples("0", "1"))
    pack(tmp_path / "1.tar", [("a.json", b"")])
    source = open_source(str(tmp_path / "{0,1}.tar"))
    assert "2 images in 2 shards; 1 shards hold no image (first" in source.about
    (tmp_path / "1.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"1.tar is not a whole"):
        open_source(str(tmp_path / "{0,1}.tar"))


def test_labels_belong_to_their_images(tmp_path: Path) -> None:
    """The labels equal the red values of the images for any order of the members."""
    rng = np.random.default_rng(0)
    members = [part for i in range(20) for part in ((f"k{i}.png", picture(i, "PNG")), (f"k{i}.cls", b"%d" % i))]
    members = [members[i] for i in rng.permutation(len(members))]
    source = open_source(pack(tmp_path / "a.tar", members))
    for i, label in enumerate(labels(source)):
        assert source.train.picture(i).getpixel((0, 0)) == (label, 0, 0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index folder of a cache that only this test uses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_root() / "index"


class Work:
    """Records the shards that are read, and counts the members that are decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[str] = []
        self.decoded = 0
        read, examined = shard_index.read_shard, scan.examined

        def reading(path: Path) -> object:
            self.read.append(path.name)
            return read(path)

        def looking(content: bytes) -> object:
            self.decoded += 1
            return examined(content)

        monkeypatch.setattr(shard_index, "read_shard", reading)
        monkeypatch.setattr(scan, "examined", looking)

    def since(self) -> tuple[list[str], int]:
        """The shards and the count since the last call."""
        found = sorted(self.read), self.decoded
        self.read, self.decoded = [], 0
        return found


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Work:
    return Work(monkeypatch)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Three old shards: with 3 images of which one has no label, without images, and without an end mark."""
    folder = tmp_path / "shards"
    folder.mkdir()
    pack(folder / "0.tar", [*samples("a/0", "a/1"), ("a/2.jpg", picture(2)), ("a/2.json", b"{}")])
    pack(folder / "1.tar", [("b.txt", b""), ("b.cls", b"1")])
    content = Path(pack(folder / "2.tar", samples("0", "\udcff"))).read_bytes().rstrip(b"\0")
    (folder / "2.tar").write_bytes(content + bytes(-len(content) % 512))
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    return folder


def told(source: Source) -> tuple[object, ...]:
    """Names and content, labels, hashes and description of a source."""
    images = source.train
    assert isinstance(images, ShardImages)
    each = [(images.name(i), images.content(i)) for i in range(len(images))]
    return each, images.labels, images.hashes().tolist(), source.about


def searched(data: object) -> tuple[object, ...]:
    """The same after opening and scanning the data."""
    return told(scan.scan(open_source(str(data)), workers=1)[0])


def test_the_second_start_does_not_read_the_shards(packed: Path, work: Work) -> None:
    first = searched(packed)
    assert work.since() == (["0.tar", "1.tar", "2.tar"], 5)
    assert searched(packed) == searched(f"{packed}/{{0,1,2}}.tar") == first
    assert work.since() == ([], 0)
    assert first[3] == (
        f"5 images in 3 shards; 1 of them have no .cls (first a/2.jpg), so no label is used; 1 shards hold no image "
        f"(first {packed}/1.tar); 1 shards have no end mark and may be cut off (first {packed}/2.tar); without labels; "
        "skipped: 1 .cls without an image, 1 .json, 1 .txt"
    )
    want = []
    for shard, name, shade in (("0", "a/0", 0), ("0", "a/1", 1), ("0", "a/2", 2), ("2", "0", 0), ("2", "\udcff", 1)):
        identity = os.fsencode(f"{shard}.tar/{name}.jpg") + b"\0%d" % len(picture(shade))
        want.append(int.from_bytes(blake2b(identity, digest_size=8).digest(), "little", signed=True))
    assert first[2] == want


def test_labels_are_read_from_the_index(tmp_path: Path, work: Work) -> None:
    path = pack(tmp_path / "a.tar", samples(*"abcdefghijkl"))
    os.utime(path, (1e9, 1e9))
    for _ in range(2):
        source = open_source(path)
        assert labels(source) == list(range(12))
        assert isinstance(source.test, ShardImages)
        assert source.test.labels is not None
        assert source.test.content(0) == picture(int(source.test.labels[0]))
    assert work.since() == (["a.tar"], 0)


@pytest.mark.parametrize("settled", [True, False])
def test_only_a_changed_shard_is_read_again(settled: bool, packed: Path, work: Work) -> None:
    searched(packed)
    if not settled:  # it may change again and get the same time
        os.utime(packed / "2.tar")
        searched(packed)
        work.since()
        before = (packed / "2.tar").stat().st_mtime_ns
        pack(packed / "2.tar", samples("1", "2"))
        os.utime(packed / "2.tar", ns=(before, before))
    else:
        work.since()
        pack(packed / "2.tar", samples("1", "2"))
        os.utime(packed / "2.tar", (1.1e9, 1.1e9))
    assert [Path(name).name for name, _ in searched(packed)[0][3:]] == ["1.jpg", "2.jpg"]  # type: ignore[index]
    assert work.since() == (["2.tar"], 2)
    (packed / "0.tar").unlink()
    pack(packed / "3.tar", samples("3"))
    assert len(open_source(str(packed)).train) == 3
    assert "3.tar" in work.since()[0]
    assert len(list(cache_root().glob("index/*"))) == 1


def test_a_shard_that_changes_during_use_is_reported(packed: Path, work: Work) -> None:
    open_source(str(packed))
    images = open_source(str(packed)).train
    assert isinstance(images, ShardImages)
    assert work.since()[0] == ["0.tar", "1.tar", "2.tar"]
    pack(packed / "2.tar", samples("0", "another"))
    size = (packed / "2.tar").stat().st_size
    with pytest.warns(
        UserWarning, match=rf"2.tar has {size:,} bytes, and had .*; the next start indexes it again"
    ) as said:
        read = [images.content(index) for index in (3, 4, 0)]
    assert len(said) == 1 < len(read)
    assert names(open_source(str(packed)))[3:] == ["0.jpg", "another.jpg"]
    assert work.since()[0] == ["2.tar"]


def test_no_index_is_kept_of_shards_with_an_error(packed: Path, cache: Path) -> None:
    pack(packed / "3.tar", [*samples("0"), ("0.jpg", picture(3))])
    os.utime(packed / "3.tar", (1e9, 1e9))
    for _ in range(2):
        with pytest.raises(UsageError, match=r"3.tar cannot be used: 0.jpg is in it twice"):
            open_source(str(packed))
    with pytest.raises(UsageError, match=r"holds no image; skipped: 1 .cls without an image, 1 .txt"):
        open_source(str(packed / "1.tar"))
    assert not cache.exists()
    open_source(str(packed / "{0,2}.tar"), keep=False)
    assert not cache.exists()


def test_shards_are_pickled_as_paths_and_found_after_a_move(packed: Path, work: Work) -> None:
    images = open_source(str(packed)).train.subset(np.array([4, 0]))
    sent = pickle.dumps(images)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert [again.name(1), again.content(0)] == [images.name(1), picture(1)]
    packed.rename(packed.with_name("moved"))
    work.since()
    assert open_source(str(packed.with_name("moved"))).train.name(0) == f"{packed.with_name('moved')}/0.tar/a/0.jpg"
    assert work.since() == ([], 0)


def test_shards_of_one_name_in_several_folders(tmp_path: Path, work: Work) -> None:
    for name in "xy":
        (tmp_path / name).mkdir()
        os.utime(pack(tmp_path / name / "0.tar", samples(name)), (1e9, 1e9))
    for _ in range(2):
        images = open_source(f"{tmp_path}/{{x,y}}/0.tar").train
        assert [images.name(i) for i in range(2)] == [f"{tmp_path}/{name}/0.tar/{name}.jpg" for name in "xy"]
    assert work.since()[0] == ["0.tar", "0.tar"]
