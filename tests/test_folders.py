"""Folder layouts as users have them: which images are used, their labels, and what is skipped."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image, features

from fastrm.data import Source, open_source
from fastrm.data.__main__ import main
from fastrm.data.encoded import FileImages
from fastrm.data.sources import endings
from fastrm.errors import UsageError
from fastrm.files import write_json
from fastrm.settings.config import build


def fill(root: Path, *names: str) -> str:
    """Write an image (or some bytes, for other endings) at each of these paths, and return the root."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in endings():
            Image.new("RGB", (8, 8), (len(name), 0, 0)).save(path)
        else:
            path.write_bytes(b"something")
    return str(root)


def read(root: Path) -> tuple[list[str], list[int] | None, str]:
    """Paths of the training images relative to the root, their labels, and the description of the source."""
    source = open_source(str(root))
    assert isinstance(source.train, FileImages)
    labels = source.train.labels
    names = [path.relative_to(root).as_posix() for path in source.train.paths]
    return names, None if labels is None else labels.tolist(), source.about


def validated(source: Source) -> list[str]:
    """Class folder and file name of each validation image."""
    assert isinstance(source.test, FileImages)
    return [path.parent.name + "/" + path.name for path in source.test.paths]


# Links


def test_a_cycle_of_links_gives_each_image_once(tmp_path: Path) -> None:
    fill(tmp_path / "data", "a/0.png", "b/1.png")
    for link, target in (("a/up", ".."), ("b/self", "."), ("b/a", "../a"), ("loop", "."), ("over", "../..")):
        (tmp_path / "data" / link).symlink_to(target, target_is_directory=True)
    names, labels, about = read(tmp_path / "data")
    assert (names, labels) == (["a/0.png", "b/1.png"], [0, 1])
    assert about.endswith("skipped: 5 links to folders listed already")


def test_links_to_class_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "else", "cats/0.png", "dogs/1.png", "dogs/deep/2.png")
    (tmp_path / "data").mkdir()
    for link, target in (("b", "cats"), ("a", "dogs"), ("c", "cats")):
        (tmp_path / "data" / link).symlink_to(tmp_path / "else" / target, target_is_directory=True)
    names, labels, about = read(tmp_path / "data")
    assert (names, labels) == (["a/1.png", "a/deep/2.png", "b/0.png"], [0, 0, 1])
    assert "1 links to folders listed already" in about


def test_broken_links_and_special_files_are_skipped_and_counted(tmp_path: Path) -> None:
    fill(tmp_path, "a/0.png", *(f"b/{i}.png" for i in range(20)))
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "a" / "gone").symlink_to("nowhere")
    (tmp_path / "a" / "self").symlink_to("self")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    source = open_source(str(tmp_path))
    assert len(source.train) == 22
    assert "skipped: 2 broken links, 1 special files" in source.about


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_folder_that_cannot_be_read_is_named(error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.scandir is replaced, because tests may run as root, who may read everything."""
    fill(tmp_path, "a/0.png", "b/1.png")
    plain = os.scandir

    def scandir(path: str | Path) -> object:
        if Path(path).name == "b":
            raise error
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match=rf"--data: {tmp_path}/b cannot be read: {error.strerror}"):
        open_source(str(tmp_path))


# Kinds of files


def test_all_image_formats_of_pillow_are_read(tmp_path: Path) -> None:
    kinds = ["JPG", "jpe", "jfif", "gif", "jp2", "tga", "bmp", "tiff", "webp", "pcx", "ppm", "mpo"]
    kinds += ["avif"] if features.check("avif") else []
    fill(tmp_path, *(f"{kind}/0.{kind}" for kind in kinds))
    source = open_source(str(tmp_path))
    assert source.about.startswith(f"{len(kinds)} images in {tmp_path}; {len(kinds)} classes")
    for i in range(len(source.train)):
        assert source.train.values(i).shape[:2] == (8, 8)
    assert not endings() & {".pdf", ".eps", ".h5", ".mpg", ".txt", ".tar", ".npy", ".heic"}


def test_the_first_image_of_a_gif_is_used(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert open_source(str(tmp_path)).train.values(0)[0, 0].tolist() == [255, 0, 0]


def test_folders_without_supported_images_and_skipped_files_are_named(tmp_path: Path) -> None:
    fill(tmp_path, "a/0.png", "b/1.png", "birds/0.heic", "birds/1.HEIC", "none/.keep", "a/notes.txt", "a/.DS_Store")
    fill(
        tmp_path, "a/Thumbs.db", "__MACOSX/a/0.png", "b/@eaDir/1.png", "b/.ipynb_checkpoints/1.png", "lost+found/2.png"
    )
    names, labels, about = read(tmp_path)
    assert (names, labels) == (["a/0.png", "b/1.png"], [0, 1])
    assert "2 folders hold no image in a supported format (birds: 2 .heic, none: 1 hidden)" in about
    assert about.endswith("skipped: 4 system files, 3 hidden, 2 .heic, 1 .txt")


def test_a_folder_without_images_is_refused_and_its_files_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no image; skipped: 2 \.heic, 1 without an ending; looked below"):
        open_source(fill(tmp_path, "a/0.heic", "b/0.heic", "c/README"))


# Runs of fastrm and what they leave


def test_runs_and_contact_sheets_of_fastrm_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, "a/0.png", "b/1.png", "c/2.png", "c/config.json", "c/index.html", "runs/one/plot.png",
         "runs/compared.png", "mine/plot.png", "page/plot.png", "env/pyvenv.cfg", "env/x.png")  # fmt: skip
    for name in ("runs/one", "mine"):
        write_json(tmp_path / name / "config.json", build(data="digits").flat())
    (tmp_path / "page" / "index.html").write_text("<meta name='generator' content='fastrm 0.1'>")
    monkeypatch.chdir(tmp_path)
    for out in ("views.png", "sheet.jpg", "other.png"):
        main(["--data", ".", "--image-size", "16", "--images", "2", "--out", out, "--loader", "torch"])
    Image.open("sheet.jpg").verify()
    # as in versions that did not mark their sheets
    (tmp_path / "views.png").write_bytes((tmp_path / "a" / "0.png").read_bytes())
    source = open_source(".")
    assert isinstance(source.train, FileImages)
    assert [str(path) for path in source.train.paths] == ["a/0.png", "b/1.png", "c/2.png"]
    said = "3 contact sheets of fastrm, 2 runs of fastrm, 1 .html, 1 .json, 1 Python environments, 1 reports of fastrm"
    assert f"skipped: {said}" in source.about
    assert "data       3 images in ." in capsys.readouterr().out


# Layouts


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"), ("Train", "Val"), ("TRAIN", "TEST"), ("training", "validation"), ("train", "valid"),
        ("train", "dev"), ("train2017", "val2017"), ("train_images", "test_images"), ("Training Set", "Test-Set"),
        ("train", "val_256"), ("train", "test1"),
    ],
)  # fmt: skip
def test_common_names_of_training_and_validation_folders(train: str, val: str, tmp_path: Path) -> None:
    fill(tmp_path, f"{train}/a/0.png", f"{train}/b/1.png", f"{val}/a/2.png", f"{val}/b/3.png")
    source = open_source(str(tmp_path))
    assert (len(source.train), validated(source)) == (2, ["a/2.png", "b/3.png"])
    assert source.about == f"2 images in {tmp_path}/{train}; 2 classes; 2 for validation in {tmp_path}/{val}"


def test_unused_parts_are_reported(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/0.png", "train/b/1.png", "test/a/2.png", "val/a/3.png", "unlabeled/4.png", "5.png")
    source = open_source(str(tmp_path))
    assert (len(source.train), validated(source)) == (2, ["a/3.png"])
    assert source.about == (
        f"2 images in {tmp_path}/train; 1 images in test/ are not used; 1 images in unlabeled/ are not used; 1 images "
        f"beside train/ are not used; 2 classes; 1 for validation in {tmp_path}/val without 1 of the classes (b)"
    )


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (
            ["val/0.png", "val/1.png"],
            "2 of 2 images in val/ are in no class folder: kNN is tested on a tenth of the training",
        ),
        (["val/images/0.png", "val/a.txt"], "1 images in val/ are not in class folders, but in images/: kNN is tested"),
        (["val/a/0.png", "val/1.png"], "1 of 2 images in val/ are in no class folder: kNN"),
        (["val/a/0.heic"], "val/ holds no image; skipped: 1 .heic: kNN is tested on a tenth"),
        ([], "there is no val folder: kNN is tested on a tenth of the training images"),
    ],
)
def test_a_validation_folder_that_cannot_be_used_is_reported(held: list[str], said: str, tmp_path: Path) -> None:
    """The unsorted val folder of ImageNet is the most common case."""
    fill(tmp_path, *(f"train/{name}/{i}.png" for name in "ab" for i in range(10)), *held)
    source = open_source(str(tmp_path))
    assert said in source.about
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (20, 2)


def test_validation_may_lack_classes_but_not_have_others(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/0.png", "train/b/1.png", "train/c/2.png", "val/b/3.png", "val/b/4.png")
    source = open_source(str(tmp_path))
    assert source.test is not None
    assert source.test.labels is not None
    assert source.test.labels.tolist() == [1, 1]
    assert "2 for validation in" in source.about
    assert "without 2 of the classes (a, c)" in source.about
    fill(tmp_path, "val/C/4.png")
    with pytest.raises(UsageError, match=r"classes that the training images lack: C \(case counts\)"):
        open_source(str(tmp_path))


def test_a_labelled_val_beside_an_unlabelled_train_is_not_used(tmp_path: Path) -> None:
    source = open_source(fill(tmp_path, "train/0.png", "train/1.png", "val/a/2.png", "val/b/3.png"))
    assert source.test is None
    assert "val/ is not used, since the training images have no labels; without labels" in source.about


def test_a_class_called_train_is_reported_or_refused(tmp_path: Path) -> None:
    names, labels, about = read(Path(fill(tmp_path, "bus/0.png", "plane/1.png", "train/2.png")))
    assert (names, labels) == (["bus/0.png", "plane/1.png", "train/2.png"], [0, 1, 2])
    assert "train/ is used as a class, like the folders beside it" in about
    fill(tmp_path, "bus/deep/0.png")
    with pytest.raises(UsageError, match=r"train/ may be the training set, or a class beside bus/; give .*train"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/0.png", "Training/a/0.png"], "Training and .*/train may both be the training set"),
        (["val/a/0.png", "val/b/0.png"], "holds val/ and no train/; give .*/val to train on it"),
        (["train/0.png", "masks/0.png"], "train/ may be the training set, or a class beside masks/"),
        (
            ["images/0.png", "masks/0.png"],
            "images/ and masks/ in .* look like images and their targets.*give .*/images",
        ),
        (["train/images/0.jpg", "train/labels/0.png", "val/a/0.png"], "images/ and labels/ in .*train look like"),
    ],
)
def test_ambiguous_layouts_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(fill(tmp_path, *names))


def test_a_class_called_test_is_reported(tmp_path: Path) -> None:
    _, labels, about = read(Path(fill(tmp_path, "cat/0.png", "dog/1.png", "test/2.png")))
    assert labels == [0, 1, 2]
    assert "test/ is used as a class" in about


def test_images_beside_the_class_folders_are_reported(tmp_path: Path) -> None:
    _, labels, about = read(Path(fill(tmp_path, "a/0.png", "b/1.png", "c.png")))
    assert labels is None
    assert about == f"3 images in {tmp_path}; 1 of them not in its subfolders (first c.png); without labels"


def test_labels_follow_the_numeric_order_of_class_names(tmp_path: Path) -> None:
    names, labels, about = read(Path(fill(tmp_path, "10/a.png", "9/b.png", "9/c.PNG", "x/d.png", "X/e.png")))
    assert names == ["10/a.png", "9/b.png", "9/c.PNG", "X/e.png", "x/d.png"]
    assert labels == [1, 0, 0, 2, 3]
    assert "the classes X and x differ only in case" in about


def test_a_folder_with_the_name_of_a_data_set_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "digits/0.png")
    monkeypatch.chdir(tmp_path)
    assert "this is the set of that name, and the folder digits is meant by ./digits" in open_source("digits").about
    assert len(open_source("./digits").train) == 1


def test_parts_in_a_deeper_folder_are_reported(tmp_path: Path) -> None:
    """The layout is that of the ILSVRC archive."""
    fill(tmp_path, "Data/CLS-LOC/train/a/0.png", "Data/CLS-LOC/val/1.png", "Annotations/0.xml")
    with pytest.raises(UsageError, match=r"holds training and validation images in .*/Data/CLS-LOC; give that folder"):
        open_source(str(tmp_path))
    assert (
        "CLS-LOC holds validation images, which are used for training too" in read(Path(fill(tmp_path, "b/0.png")))[2]
    )


# Shards in folders


def test_a_folder_of_shards_is_read_as_shards(tmp_path: Path) -> None:
    fill(tmp_path, "00000.parquet", "00000_stats.json", "pictures/0.jpg", "pictures/1.jpg")
    for name in ("9.tar", "10.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.add(tmp_path / "pictures" / "0.jpg", "0.jpg")
    beside = open_source(str(tmp_path))
    assert beside.about.startswith(f"2 images in {tmp_path}; without labels; skipped: 2 .tar (give them as '*.tar')")
    shutil.rmtree(tmp_path / "pictures")
    source = open_source(str(tmp_path))
    assert [source.train.name(index) for index in (0, 1)] == [str(tmp_path / f"{shard}.tar/0.jpg") for shard in (9, 10)]
    assert source.about == "2 images in 2 shards; without labels; skipped: 1 .json, 1 .parquet"
    (tmp_path / "10.tar").rename(tmp_path / "val-10.tar")
    with pytest.raises(UsageError, match=r"and by its name a validation shard, val-10.tar; give"):
        open_source(str(tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "9.tar").rename(tmp_path / "train" / "9.tar")
    with pytest.raises(
        UsageError, match=r"holds no image, but tar files in .*; give the training files, as in '.*tar'"
    ):
        open_source(str(tmp_path))
