"""Lists, tables, Hugging Face datasets, URLs and arrays in files give the same images, however they are stored."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fastrm import doctor, evaluate, train
from fastrm.data import SUPERVISED, _kind, copies, located, open_source
from fastrm.data.inventory import inventory
from fastrm.data.items import ItemImages
from fastrm.data.mapped import Mapped, MappedImages, PlacedImages
from fastrm.data.scan import scan
from fastrm.errors import UsageError
from fastrm.export import main as export
from fastrm.files import cache_root
from fastrm.machine.memory import size as in_words
from fastrm.models.weights import metadata
from fastrm.settings.config import Config, build
from tests.conftest import natural_pictures
from tests.test_train import assert_as_uninterrupted

COUNT, CLASSES = 36, ("cat", "dog", "eel")
LABELS = [i % 3 for i in range(COUNT)]
ARRAY: NDArray[np.uint8] = natural_pictures(COUNT, 20, 24).permute(0, 2, 3, 1).contiguous().numpy()


def png(pixels: NDArray[np.uint8]) -> bytes:
    """The PNG file of uint8 pixels [H, W, 3]."""
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG", compress_level=1)
    return written.getvalue()


PNGS = [png(pixels) for pixels in ARRAY]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images as PNG files in files/."""
    folder = tmp_path_factory.mktemp("collections")
    (folder / "files").mkdir()
    for i, content in enumerate(PNGS):
        (folder / "files" / f"{i}.png").write_bytes(content)
    return folder


def parquet(path: Path, rows: slice = slice(None), /, **columns: list[Any]) -> Path:
    """Write columns to a Parquet file, with 7 rows per row group."""
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({name: values[rows] for name, values in columns.items()}), path, row_group_size=7)
    return path


def csv(path: Path, *lines: str) -> Path:
    """Write lines to a UTF-8 text file."""
    pytest.importorskip("pyarrow")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tar(path: Path) -> Path:
    """Write a WebDataset shard of the images and their labels."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for i, content in enumerate(PNGS):
            for name, part in ((f"{i:03}.png", content), (f"{i:03}.cls", b"%d" % LABELS[i])):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                file.addfile(info, io.BytesIO(part))
    return path


def in_memory(path: Path) -> str:
    """Copy a file to fsspec's in-memory file system, and return its URL."""
    pytest.importorskip("fsspec").filesystem("memory").pipe(f"/{path.parent.name}/{path.name}", path.read_bytes())
    return f"memory://{path.parent.name}/{path.name}"


def names() -> list[str]:
    """The paths of the image files relative to the root."""
    return [f"files/{i}.png" for i in range(COUNT)]


def texts() -> list[str]:
    """The class name of each image."""
    return [CLASSES[label] for label in LABELS]


def structs() -> list[dict[str, Any]]:
    """The images as Hugging Face stores them in Parquet files."""
    return [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(PNGS)]


def as_list(root: Path) -> str:
    lines = [f"{name}\t{text}" for name, text in zip(names(), texts(), strict=True)]
    (root / "list.txt").write_text("\n".join(lines))
    return f"@{root / 'list.txt'}"


def as_csv(root: Path) -> str:
    rows = (f"{i},{name},{text}" for i, (name, text) in enumerate(zip(names(), texts(), strict=True)))
    return str(csv(root / "table.csv", "number,file_name,label", *rows))


def as_tsv(root: Path) -> str:
    rows = (f"{label}\t{root / name}" for label, name in zip(LABELS, names(), strict=True))
    return str(csv(root / "table.tsv", "class\tPath", *rows))


def as_paths(root: Path) -> str:
    return str(parquet(root / "paths.parquet", path=names(), label=texts()))


def as_bytes(root: Path) -> str:
    return str(parquet(root / "bytes.parquet", image=PNGS, path=names(), label=LABELS))


def as_folder(root: Path) -> str:
    parquet(root / "parts" / "part-2.parquet", slice(0, 20), image=structs(), label=texts())
    parquet(root / "parts" / "part-10.parquet", slice(20, COUNT), image=structs(), label=texts())
    return str(root / "parts")


def as_hub(root: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    held = datasets.Dataset.from_dict({"image": structs(), "label": LABELS}, features=features)
    held.save_to_disk(str(root / "hub"))
    return f"hf:{root / 'hub'}"


def as_url_of_shards(root: Path) -> str:
    in_memory(tar(root / "shards" / "train-0.tar"))
    return "memory://shards/train-{0..0}.tar"


def as_url_of_table(root: Path) -> str:
    return in_memory(parquet(root / "far" / "bytes.parquet", image=PNGS, label=texts()))


def as_npy(root: Path) -> str:
    np.save(root / "images.npy", ARRAY)
    np.save(root / "labels.npy", np.array(texts()))
    return str(root / "images.npy")


def as_hdf5(root: Path, **how: Any) -> str:
    with pytest.importorskip("h5py").File(root / f"array{len(how)}.h5", "w") as file:
        file.create_dataset("train/x", data=ARRAY, **how)
        file["train/y"] = np.array(LABELS)[:, None]
    return str(root / f"array{len(how)}.h5")


def as_packed_hdf5(root: Path) -> str:
    return as_hdf5(root, compression="gzip", chunks=(5, 20, 24, 3))


def as_deep_npy(root: Path) -> str:
    np.save(root / "deep.npy", ARRAY.astype(np.uint16) * 257)
    return str(root / "deep.npy")


ENCODED = (as_list, as_csv, as_tsv, as_paths, as_bytes, as_folder, as_hub, as_url_of_shards, as_url_of_table)
ARRAYS = (as_npy, as_hdf5, as_packed_hdf5)
forms = pytest.mark.parametrize("form", [*ENCODED, *ARRAYS], ids=lambda form: form.__name__)

# A run on each form takes long; these three differ most.
some_forms = pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=[] if form in (as_csv, as_url_of_shards, as_hdf5) else [pytest.mark.slow])
        for form in (*ENCODED, *ARRAYS)
    ],
    ids=lambda form: form.__name__,
)


def settings(data: str, out: Path, **leaves: Any) -> Config:
    quick: dict[str, Any] = {
        "arch": "test_resnet", "image_size": 32, "stem": "imagenet", "batch_size": 6, "epochs": 1, "max_steps": 3,
        "hidden_dim": 16, "output_dim": 8, "predictor_hidden_dim": 16, "warmup_epochs": 0.0, "log_every": 1,
        "workers": 0, "eval_every": 0, "device": "cpu",
    }  # fmt: skip
    return build(data=data, out=out, **{**quick, **leaves})


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A function that returns an uninterrupted run on the images, as files or as one array in a file."""
    done: dict[bool, Path] = {}

    def run(array: bool) -> Path:
        if array not in done:
            out = tmp_path_factory.mktemp("whole") / "run"
            np.save(root / "plain.npy", ARRAY)
            train.train(settings(str(root / "plain.npy") if array else as_list(root), out))
            done[array] = out
        return done[array]

    return run


@forms
def test_every_form_gives_the_same_images_and_labels(form: Callable[[Path], str], root: Path) -> None:
    source = open_source(form(root))
    assert len(source.train) == COUNT
    for i in (0, 7, 21, COUNT - 1):
        np.testing.assert_array_equal(source.train.values(i), ARRAY[i])
    assert source.train.labels is not None
    assert source.train.labels.tolist() == LABELS
    assert source.bank is not None
    assert source.test is not None
    assert (len(source.bank), len(source.test)) == (COUNT - COUNT // 10, COUNT // 10)
    assert "3 classes" in source.about
    parts = source.train.subset(np.array([3, 30]))
    np.testing.assert_array_equal(parts.values(1), ARRAY[30])
    assert parts.name(1) == source.train.name(30)
    assert list(parts.identities())[1] == list(source.train.identities())[30]


@some_forms
def test_a_run_on_each_form_resumes_bit_for_bit_and_is_evaluated_and_exported(
    form: Callable[[Path], str], root: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights equal those of a run on the same images as files, or as one array."""
    data, out = form(root), tmp_path / "run"
    if "://" not in data:
        mark = next((mark for mark in ("@", "hf:") if data.startswith(mark)), "")
        monkeypatch.chdir(root)
        data = mark + os.path.relpath(data.removeprefix(mark))
    train.train(settings(data, out, max_steps=1))
    monkeypatch.chdir(tmp_path)
    data = json.loads((out / "config.json").read_text())["data"]
    train.train(settings(data, out, workers=1, loader="auto"))
    assert_as_uninterrupted(out, whole(form in ARRAYS))
    evaluate.main([str(out), "--knn", "--device", "cpu", "--workers", "0"])
    scores = json.loads((out / "evaluation.json").read_text())
    assert [found["left_out"] for found in scores["sets"].values()] == [0]
    export([str(out), "--format", "safetensors", "--out", str(tmp_path / "student.safetensors")])
    assert (tmp_path / "student.safetensors").is_file()


def test_a_list_written_on_windows_is_read(root: Path) -> None:
    lines = [
        "# made by hand",
        *(name.replace("/", "\\") + f",{text}" for name, text in zip(names(), texts(), strict=True)),
    ]
    wanted = open_source(as_list(root)).train
    for code in ("utf-8-sig", "utf-16"):
        (root / "windows.txt").write_bytes("\r\n".join([*lines, "", "  "]).encode(code))
        source = open_source(f"@{root / 'windows.txt'}")
        assert list(source.train.identities()) == list(wanted.identities())
        assert source.train.labels is not None
        assert source.train.labels.tolist() == LABELS
        assert "skipped: 1 comments" in source.about


def test_text_after_a_comma_is_a_label_unless_it_ends_like_an_image(root: Path) -> None:
    (root / "odd, names").mkdir()
    for name in ("a, b.png", "#1.png"):
        (root / "odd, names" / name).write_bytes(PNGS[0])
    (root / "odd, names" / "list").write_text('a, b.png\n"a, b.png"\n#1.png, 10 \n#1.png,10\n../files/0.png,9\n')
    source = open_source(f"@{root / 'odd, names' / 'list'}")
    assert [Path(source.train.name(i)).name for i in range(len(source.train))] == ["a, b.png", "#1.png", "0.png"]
    assert source.bank is not None
    assert source.bank.labels is not None
    assert source.train.labels is None
    assert "2 of them have a label; 2 classes" in source.about
    assert "skipped: 2 repeated paths" in source.about


def test_missing_labels_and_repeated_paths_are_counted(root: Path) -> None:
    rows = [f"{name},{label}" for name, label in zip(names(), LABELS, strict=True)]
    rows[4] = "files/4.png,"
    rows[5] = "files/5.png,NaN"
    data = csv(root / "gaps.csv", "path,class", *rows, "files/6.png,0", "files/7.png,2", ",1")
    source = open_source(str(data))
    assert len(source.train) == COUNT
    assert source.train.labels is None
    assert source.bank is not None
    assert source.test is not None
    assert source.bank.labels is not None
    assert len(source.bank) + len(source.test) == COUNT - 3  # two different labels are given for the seventh image
    assert "33 of them have a label" in source.about
    assert "skipped: 2 repeated paths, 1 rows without a path" in source.about


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (["0", "7", "2"], [0, 7, 2]),
        (["2.0", "0.0", "5.0"], [2, 0, 5]),
        (["-1", "3", "1"], [0, 2, 1]),
        (["10 x", "9 x", "10 x"], [1, 0, 1]),
        (["3", "cat", "12"], [0, 2, 1]),
        (["1000000000", "7", "8"], [2, 0, 1]),
    ],
)
def test_labels_are_numbers_or_text(given: list[str], labels: list[int], root: Path) -> None:
    data = csv(root / "labels.csv", "path;label", *(f"files/{i}.png;{label}" for i, label in enumerate(given)))
    found = open_source(str(data)).train.labels
    assert found is not None
    assert found.tolist() == labels


def test_labels_that_are_not_classes_are_ignored_or_refused_if_requested(root: Path) -> None:
    data = str(csv(root / "scores.csv", "path,label", *(f"files/{i}.png,{i / 7}" for i in range(9))))
    assert "labels are not used, since they hold" in open_source(data).about
    with pytest.raises(UsageError, match=r"which is not a class: labels are whole numbers or text"):
        open_source(data, label_column="label")
    nested = str(parquet(root / "nested.parquet", path=names(), label=[[1, 2]] * COUNT))
    assert "labels are not used, since they are of type list" in open_source(nested).about


def test_a_table_may_have_a_training_and_a_validation_part(root: Path) -> None:
    parts = ["train"] * 20 + ["val"] * 9 + ["test"] * 4 + [None] * 3  # type: ignore[list-item]
    data = parquet(root / "split.parquet", image=PNGS, label=texts(), split=parts)
    source = open_source(str(data))
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (20, 9)
    assert "skipped: 4 rows of test, 3 rows of no part" in source.about
    np.testing.assert_array_equal(source.test.values(2), ARRAY[22])
    for folder, name in (("beside", "train.csv"), ("beside", "*.csv")):
        rows = [f"../files/{i}.png,{CLASSES[i % 3]}" for i in range(30)]
        csv(root / folder / "train.csv", "file,class", *rows[:20])
        csv(root / folder / "val.csv", "file,class", *rows[20:])
        source = open_source(str(root / folder / name))
        assert source.test is not None
        assert (len(source.train), len(source.test)) == (20, 10)
        assert source.test.labels is not None
        assert source.test.labels.tolist() == [i % 3 for i in range(20, 30)]
    csv(root / "beside" / "val.csv", "file,class", "../files/1.png,cow")
    with pytest.raises(UsageError, match=r"have classes that the training images lack: cow"):
        open_source(str(root / "beside" / "train.csv"))


def test_splits_of_a_hugging_face_dataset(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def part(rows: slice, labels: list[int]) -> Any:
        classes = datasets.ClassLabel(names=list(CLASSES))
        features = datasets.Features({"img": datasets.Image(), "label": classes, "text": datasets.Value("string")})
        columns = {"img": structs()[rows], "label": labels[rows], "text": texts()[rows]}
        return datasets.Dataset.from_dict(columns, features=features)

    held = {
        "train": part(slice(0, 20), LABELS),
        "test": part(slice(20, 25), LABELS),
        "extra": part(slice(0, 2), LABELS),
    }
    datasets.DatasetDict(held).save_to_disk(str(tmp_path / "dict"))
    source = open_source(f"hf:{tmp_path / 'dict'}")
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (20, 5)
    assert "skipped: 2 rows of extra" in source.about
    with pytest.raises(UsageError, match=r"is a Hugging Face dataset; give hf:"):
        open_source(tmp_path / "dict")
    held["test"] = part(slice(20, 25), [-1] * COUNT)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration: datasets.DatasetDict(held))
    source = open_source("hf:owner/name:all")
    assert source.name == "name"
    assert "the validation images have no labels: kNN is tested on a tenth" in source.about
    assert open_source("hf:owner/name", label_column="text").train.labels is not None
    with pytest.raises(UsageError, match="has no such column; its columns are img, label, text"):
        open_source("hf:owner/name", image_column="photo")
    assert located("hf:owner/name") == "hf:owner/name"

    def unreachable(*_: Any) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UsageError, match=r"hf:owner/name cannot be loaded: no network; there is no such folder"
    ) as caught:
        open_source("hf:owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("form", [as_bytes, as_hub], ids=lambda form: form.__name__)
def test_broken_rows_are_left_out_and_named(
    form: Callable[[Path], str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PNGS", [*PNGS[:17], b"", *PNGS[18:30], PNGS[30][:200], *PNGS[31:]])
    data = form(tmp_path)
    source, broken = scan(open_source(data), workers=1)
    place = data if form is as_hub else str(tmp_path / "bytes.parquet")
    assert list(broken) == [f"{place}, row 17", f"{place}, row 30"]
    assert len(source.train) == COUNT - 2
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [label for i, label in enumerate(LABELS) if i not in (17, 30)]


def test_rows_without_an_image_are_skipped_and_counted(root: Path) -> None:
    cells: list[Any] = [*PNGS]
    cells[3] = cells[11] = None
    source = open_source(str(parquet(root / "empty.parquet", image=cells, label=texts())))
    assert len(source.train) == COUNT - 2
    assert "skipped: 2 rows without an image" in source.about
    assert source.train.name(3).endswith("row 4")


def test_images_in_a_table_are_identified_by_their_content(root: Path, tmp_path: Path) -> None:
    def hashes(data: Any) -> list[int]:
        found: list[int] = inventory(open_source(str(data)).train, left_out=0, steps_per_epoch=1).hashes.tolist()
        return found

    one = parquet(tmp_path / "one.parquet", image=PNGS, label=texts())
    before = hashes(one)
    one.rename(tmp_path / "two.parquet")
    assert hashes(tmp_path / "two.parquet") == before == hashes(as_folder(root))
    assert len(set(before)) == COUNT
    changed = parquet(tmp_path / "two.parquet", image=[*PNGS[:5], PNGS[6], *PNGS[6:]], label=texts())
    assert [i for i, (a, b) in enumerate(zip(before, hashes(changed), strict=True)) if a != b] == [5]


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no list": (lambda root: f"@{root / 'none.txt'}", r"the list .*none.txt does not exist"),
    "an empty list": (lambda root: listed(root, "", "# no"), r"names no image"),
    "a missing file": (lambda root: listed(root, "nowhere.png"), r"line 1: .*nowhere.png does not exist, nor"),
    "URLs": (lambda root: listed(root, "https://x/a.png"), r"line 1: https://x/a.png is a URL; .* download them"),
    "no text": (lambda root: listed(root, "a\0b"), r"is not a text file"),
    "no column": (
        lambda root: csv(root / "w.csv", "a,b", "1,2"),
        r"no column image, path or file; its columns are a, b",
    ),
    "two columns": (
        lambda root: csv(root / "w.csv", "path,file,label", "1,2,3"),
        r"path and file may be the column meant; give --image-column",
    ),
    "two labels": (
        lambda root: csv(root / "w.csv", "path,label,class", "1,2,3"),
        r"label and class may be the column meant; give --label-column",
    ),
    "a column twice": (lambda root: csv(root / "w.csv", "path,path", "1,2"), r"has the column path twice"),
    "no row": (lambda root: csv(root / "w.csv", "path,label"), r"names no image"),
    "an empty file": (lambda root: csv(root / "w.csv", ""), r"cannot be read as a table: .*Empty CSV file"),
    "uneven rows": (lambda root: csv(root / "w.csv", "path,label", "a,1,2"), r"Expected 2 columns, got 3"),
    "a table of URLs": (lambda root: csv(root / "w.csv", "path", "s3://x/a.png"), r"row 0 of w.csv: .* is a URL"),
    "no Parquet": (lambda root: damaged(root, "w.parquet"), r"w.parquet cannot be read as a table: "),
    "an empty column": (
        lambda root: parquet(root / "w.parquet", image=[b"", None][1:] * 3, path=[None] * 3),
        r"no column image, path or file",
    ),
    "no array": (lambda root: damaged(root, "w.npy"), r"w.npy cannot be read as an array"),
    "one image": (
        lambda root: saved(root, ARRAY[0]),
        r"--data .*w.npy is an array of shape \[20, 24, 3\], which is one",
    ),
    "no HDF5": (lambda root: damaged(root, "w.h5"), r"w.h5 cannot be read as HDF5"),
    "a protocol": (lambda root: "nonsense://a/b.tar", r"nonsense://a/b.tar cannot be read: .*nonsense"),
    "nothing there": (lambda root: "memory://nowhere/a.tar", r"memory://nowhere/a.tar cannot be read"),
    "no folder": (lambda root: f"hf:{root / 'none'}", r"there is no folder .*none"),
    "a folder": (lambda root: f"{root}*.parquet", r"no file matches"),
    "a file": (
        lambda root: damaged(root, "w.zip"),
        r"w.zip is a file of another kind; give a folder .* hf:PATH .* URL",
    ),
}


def listed(root: Path, *lines: str) -> str:
    (root / "wrong.txt").write_text("\n".join(lines))
    return f"@{root / 'wrong.txt'}"


def damaged(root: Path, name: str) -> Path:
    for package in {".parquet": ["pyarrow"], ".h5": ["h5py"]}.get(Path(name).suffix, []):
        pytest.importorskip(package)
    (root / name).write_bytes(b"none of these" * 9)
    return root / name


def saved(root: Path, array: NDArray[Any]) -> Path:
    np.save(root / "w.npy", array)
    return root / "w.npy"


@pytest.mark.parametrize("what", WRONG)
def test_wrong_data_gives_an_error_of_one_line(what: str, tmp_path: Path) -> None:
    make, message = WRONG[what]
    data = str(make(tmp_path))
    with pytest.raises(UsageError, match=message) as caught:
        open_source(data)
    assert "\n" not in str(caught.value)


def test_column_names_are_refused_for_data_without_columns(root: Path) -> None:
    for data in ("digits", as_list(root), str(root / "files"), as_npy(root)):
        with pytest.raises(UsageError, match=r"--label-column kind: --data .* has no columns"):
            open_source(data, label_column="kind")
    table = csv(root / "other.csv", "first,path,kind", *(f"files/{i}.png,files/none.png,{i % 2}" for i in range(8)))
    source = open_source(str(table), image_column="first", label_column="kind")
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [0, 1] * 4
    with pytest.raises(UsageError, match=r"--image-column colour: .*no such column; its columns are first, path, kind"):
        open_source(str(table), image_column="colour")


def test_arrays_in_an_hdf5_file_are_found_or_listed(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "several.h5", "w") as file:
        file["images"], file["masks"] = ARRAY, ARRAY[..., 0]
        file["labels"] = np.array([text.encode() for text in texts()])
        file["a/x"] = ARRAY[:9].astype(np.uint16) * 257
    with pytest.raises(UsageError, match=r"several arrays .* it has a/x \[9, 20, 24, 3\], images \[36"):
        open_source(str(tmp_path / "several.h5"))
    source = open_source(str(tmp_path / "several.h5"), image_column="/masks")
    assert source.train.labels is not None
    assert source.train.labels.tolist() == LABELS
    np.testing.assert_array_equal(source.train.values(4)[..., 0], ARRAY[4, ..., 0])
    deep = open_source(str(tmp_path / "several.h5"), image_column="a/x")
    np.testing.assert_array_equal(deep.train.values(4), ARRAY[4].astype(np.uint16) * 257)
    with pytest.raises(
        UsageError, match=r"--label-column images: it has the shape \[36, 20, 24, 3\]; it must be \[9\]"
    ):
        open_source(str(tmp_path / "several.h5"), image_column="a/x", label_column="images")


def test_labels_in_a_file_beside_an_array(tmp_path: Path) -> None:
    np.save(tmp_path / "photos.npy", ARRAY.astype(np.uint16) * 257)
    np.save(tmp_path / "labels.npy", np.zeros(5))
    source = open_source(str(tmp_path / "photos.npy"))
    assert source.train.labels is None
    assert "labels.npy has the shape [5], and is not used" in source.about
    np.save(tmp_path / "photos_labels.npy", np.array(LABELS))
    labels = open_source(str(tmp_path / "photos.npy")).train.labels
    assert labels is not None
    assert labels.tolist() == LABELS
    np.save(tmp_path / "photos_labels.npy", np.zeros(5))
    with pytest.raises(UsageError, match=r"photos_labels.npy has the shape \[5\]; it must be \[36\]"):
        open_source(str(tmp_path / "photos.npy"))


def test_an_array_in_a_file_is_pickled_as_its_path(tmp_path: Path) -> None:
    import pickle

    np.save(tmp_path / "a.npy", ARRAY)
    np.save(tmp_path / "turned.npy", np.asfortranarray(ARRAY))
    for name in ("a.npy", "turned.npy"):
        images: Any = open_source(str(tmp_path / name)).train
        assert isinstance(images.arrays, Mapped)
        sent = pickle.dumps(images)
        assert len(sent) < 2000
        np.testing.assert_array_equal(pickle.loads(sent).arrays, ARRAY)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(images.arrays[3:5])), ARRAY[3:5])


def test_earlier_copies_are_used_if_the_url_cannot_be_reached(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type(pytest.importorskip("fsspec").filesystem("memory"))
    data = as_url_of_shards(root)
    first = open_source(data)
    fetched: list[str] = []
    monkeypatch.setattr(memory, "get_file", lambda self, path, *_: fetched.append(path))
    again = open_source(data)
    assert list(again.train.identities()) == list(first.train.identities())
    assert "copied to" in again.about

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(memory, "info", unreachable)
    offline = open_source(data)
    assert list(offline.train.identities()) == list(first.train.identities())
    assert "1 files cannot be reached; their earlier copies are used" in offline.about
    assert not fetched


def test_files_at_a_local_url_are_not_copied(root: Path) -> None:
    pytest.importorskip("fsspec")
    data = as_bytes(root)
    assert open_source(f"file://{data}").about == open_source(data).about


@pytest.mark.parametrize("form", [as_bytes, as_url_of_shards, as_packed_hdf5])
def test_deleted_copies_are_made_again_and_their_size_is_reported(
    form: Callable[[Path], str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = form(root)
    assert copies.held() == 0
    before = inventory(open_source(data).train, left_out=0, steps_per_epoch=1).hashes
    size = copies.held()
    assert size == sum(path.stat().st_size for path in (tmp_path / "cache" / "fastrm" / "copies").rglob("*.*")) > 0
    assert f"{in_words(size)} of tables and remote files in {copies.root()}" in doctor.PARTS["copies"]()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UsageError, match=rf"; delete {copies.root()}, which holds .* of earlier copies, or set XDG"):
        copies.check_room(data, 11)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.rmtree(copies.root())
    assert torch.equal(inventory(open_source(data).train, left_out=0, steps_per_epoch=1).hashes, before)
    assert copies.held() == size


def test_a_full_disk_is_reported_before_a_copy_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = parquet(tmp_path / "large.parquet", image=PNGS[:9])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UsageError, match=r"which takes .* KiB, and 10 bytes are free; set XDG_CACHE_HOME"):
        open_source(str(data))


@pytest.mark.parametrize(
    ("data", "package", "extra"),
    [
        ("x.csv", "pyarrow", "tables"),
        ("hf:a/b", "datasets", "hf"),
        ("x.h5", "h5py", "hdf5"),
        ("s3://a/b.tar", "fsspec", "remote"),
    ],
)
def test_a_missing_package_of_a_data_format_is_named(
    data: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if data.startswith("x"):
        Path(data).write_bytes(b"path\n")
    for name in (package, f"{package}.core", f"{package}.csv"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(
        UsageError, match=rf"--data {data} needs the package {package}: .*pip install (\S+ )*{package}\b"
    ):
        open_source(data)


def test_relative_data_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("held").mkdir()
    assert located("@a.txt") == f"@{tmp_path / 'a.txt'}"
    assert located("hf:held") == f"hf:{tmp_path / 'held'}"
    assert located("s3://a/{0..3}.tar") == "s3://a/{0..3}.tar"
    assert located("a-{0..3}.parquet") == str(tmp_path / "a-{0..3}.parquet")


def test_an_array_larger_than_half_the_gpu_memory_is_read_by_workers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: Any = open_source(as_npy(root)).train
    for memory, loader in ((2 * ARRAY.nbytes, "memory"), (2 * ARRAY.nbytes - 1, "torch")):
        held = type("Properties", (), {"total_memory": memory})
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, held=held: held)
        assert _kind("auto", images, SUPERVISED, torch.device("cuda")) == loader


@pytest.mark.parametrize(
    ("data", "written"),
    [
        ("https://host/train-{0..3}.tar?signature=secret", "https://host/train-{0..3}.tar"),
        ("https://me:secret@host/a@b.tar", "https://host/a@b.tar"),
        ("/home/me/photos?", "photos?"),
        ("@/home/me/list.txt", "list.txt"),
        ("hf:/home/me/saved", "saved"),
        ("hf:owner/name", "hf:owner/name"),
        ("cifar10", "cifar10"),
    ],
)
def test_weight_files_name_their_images_without_folders_and_keys(data: str, written: str, tmp_path: Path) -> None:
    flat = {**settings("digits", tmp_path).flat(), "data": data}
    assert metadata(flat, "student")["data"] == written


@pytest.mark.parametrize("write", [*ARRAYS, as_deep_npy])
def test_the_hashes_of_an_array_are_computed_once(
    write: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read: list[str] = []
    for kind in (MappedImages, ItemImages):
        plain = kind.identities

        def reading(images: Any, plain: Callable[[Any], Iterator[bytes]] = plain) -> Iterator[bytes]:
            read.append("all")
            return plain(images)

        monkeypatch.setattr(kind, "identities", reading)
    data = write(tmp_path)
    hashes = open_source(data, keep=False).train.hashes()
    for changed, times in ((1e9, 1), (1.1e9, 1), (time.time() + 9, 2)):  # the last time is in the future
        os.utime(data, (changed, changed))
        read.clear()
        for _ in range(2):
            np.testing.assert_array_equal(open_source(data).train.hashes(), hashes)
        assert len(read) == times
    assert len(list((cache_root() / "index").iterdir())) == 1
    part = open_source(data).train.subset(np.array([2, 0]))
    if isinstance(part, PlacedImages):
        np.testing.assert_array_equal(part.hashes(), hashes[[2, 0]])
