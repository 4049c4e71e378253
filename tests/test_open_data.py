"""Data that a script passes as objects, and callables that make the views."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

import fastrm
from fastrm.data import Augmentation, PixelOptions, Source, View, make_loader, open_source
from fastrm.data.formats import RGB
from fastrm.data.inventory import inventory
from fastrm.data.items import ItemImages
from fastrm.data.pixels import values_in
from fastrm.data.settling import settled
from fastrm.errors import UsageError
from fastrm.probes import frozen_scores
from fastrm.probes.features import Pixels, Setting
from tests.conftest import natural_pictures

CPU = torch.device("cpu")
PICTURES = natural_pictures(40, 30, 36)  # uint8 [40, 3, 30, 36]
LABELS = torch.arange(40) % 4
AUGMENT = v2.Compose([v2.RandomResizedCrop(20), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)])
AS_FLOATS = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def two(image: Any) -> tuple[Any, Any]:
    """Two augmented views of an image."""
    return AUGMENT(image), AUGMENT(image)


def two_floats(image: Any) -> tuple[Tensor, Tensor]:
    """Two augmented views as float32 tensors in [0, 1]."""
    first, second = two(image)
    return AS_FLOATS(first), AS_FLOATS(second)


def loader(data: Any, **options: Any) -> Any:
    """A loader with small settings."""
    defaults = {"method": "mocov2", "image_size": 24, "batch_size": 8, "device": "cpu", "workers": 0, "seed": 5}
    return make_loader(data, **{**defaults, **options})


def indices_of(made: Any) -> list[int]:
    """The indices of all images of one pass."""
    return [index for batch in made for index in batch.indices]


def stacked(made: Any) -> list[Tensor]:
    """The views of each batch of one pass."""
    return [torch.stack(batch.views) for batch in made]


class Pairs(Dataset[Any]):
    """A map-style Dataset of (PIL image, label) that records the indices it is asked for."""

    def __init__(self, count: int = 40, transform: Callable[[Any], Any] = lambda image: image) -> None:
        self.count, self.transform = count, transform
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return self.transform(pil(PICTURES[index % 40])), int(LABELS[index % 40])


class Told(Pairs):
    """A Dataset whose labels can be read without its images."""

    targets = LABELS.tolist()


def pil(picture: Tensor) -> Image.Image:
    """A PIL image of a tensor [3, H, W]."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def as_arrays(dtype: str) -> Any:
    """The images as an array [N, H, W, C] of this dtype."""
    array = PICTURES.permute(0, 2, 3, 1).numpy()
    scale: dict[str, Callable[[Any], Any]] = {
        "uint8": lambda pixels: pixels,
        "uint16": lambda pixels: pixels.astype(np.uint16) * 257,
        "float32": lambda pixels: pixels.astype(np.float32) / 255,
        "float64": lambda pixels: pixels / 255,
    }
    return scale[dtype](array)


class Dicts:
    """Items as Hugging Face's datasets return them."""

    column_names = ("image", "label")

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return LABELS.tolist()
        return {"image": pil(PICTURES[index]), "label": int(LABELS[index])}


@pytest.fixture(scope="module")
def want() -> list[Tensor]:
    """The views of the images given as one array."""
    return stacked(loader(as_arrays("uint8"), loader="torch"))


GIVEN: dict[str, Callable[[], Any]] = {
    "PIL and labels": Pairs,
    "dicts": Dicts,
    "list of pairs": lambda: [Pairs()[index] for index in range(40)],
    "subset": lambda: Subset(ConcatDataset([Pairs(7), Pairs()]), range(7, 47)),
    "tensors": lambda: TensorDataset(PICTURES, LABELS),
    "tensors alone": lambda: TensorDataset(PICTURES),
    "floats": lambda: TensorDataset(PICTURES.float() / 255, LABELS),
    "bfloat16": lambda: Pairs(transform=lambda image: v2.functional.pil_to_tensor(image)),
    "arrays": lambda: Pairs(transform=np.asarray),
    "an array of uint16": lambda: as_arrays("uint16"),
    "an array of float32": lambda: as_arrays("float32"),
    "a tensor of float64": lambda: torch.from_numpy(as_arrays("float64")),
    "a tensor of bytes": lambda: torch.from_numpy(as_arrays("uint8")),
}


@pytest.mark.parametrize("given", GIVEN)
def test_views_do_not_depend_on_how_the_images_are_given(given: str, want: list[Tensor]) -> None:
    deep = any(dtype in given for dtype in ("float", "uint16"))
    pixels = PixelOptions(value_range=(0, 65535), mean=RGB.mean, std=RGB.std) if "uint16" in given else None
    views = stacked(loader(GIVEN[given](), loader="torch", pixels=pixels))
    assert len(views) == len(want) == 5
    for mine, other in zip(views, want, strict=True):
        # Bytes are rounded after the crop and at the end, and colour changes between enlarge the error. Other dtypes
        # are never rounded.
        level = (mine - other).abs() * 255 * torch.tensor(RGB.std).view(3, 1, 1)
        assert level.max() <= (8 if deep else 0)
        assert level.mean() <= (0.8 if deep else 0)


def test_images_of_several_sizes_give_the_views_of_their_files(tmp_path: Path) -> None:
    for index in range(12):
        pil(PICTURES[index]).resize((20 + 3 * index, 60 - 2 * index)).save(tmp_path / f"{index:02}.png")
    paths = sorted(tmp_path.iterdir())
    opened = [Image.open(path) for path in paths]
    files, listed, items = (stacked(loader(data, batch_size=6)) for data in (tmp_path, paths, opened))
    for a, b, c in zip(files, listed, items, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("method", ["mocov2", two])
@pytest.mark.parametrize("transform", [None, v2.RandomCrop(26)], ids=["as it is", "random"])
def test_views_of_a_dataset_do_not_depend_on_the_workers_and_seek_is_exact(method: Any, transform: Any) -> None:
    data = FakeData(40, (3, 30, 36), transform=transform)
    alone = loader(data, method=method)
    every = [torch.stack(batch.views) for _ in range(2) for batch in alone]
    assert not torch.equal(every[0], every[5])
    helped = loader(data, method=method, workers=2)
    for batch in (3, 7):
        helped.seek(batch)
        assert torch.equal(torch.stack(next(iter(helped)).views), every[batch])
    assert not torch.equal(stacked(loader(data, method=method, seed=6))[0], every[0])


class Drawing(Dataset[Any]):
    """A Dataset that draws from the global random generators of torch, NumPy and Python."""

    def __init__(self) -> None:
        self.drawn: list[tuple[float, float, float]] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        self.drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        return PICTURES[index]


def test_items_draw_seeded_numbers_and_the_global_generators_are_restored() -> None:
    data = Drawing()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    want = (torch.rand(3), np.random.rand(3), [random.random() for _ in range(3)])
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    made = loader(data, batch_size=4)
    data.drawn.clear()
    drawn = dict(zip(indices_of(made), data.drawn, strict=True))
    assert len({number for numbers in drawn.values() for number in numbers}) == 24
    data.drawn.clear()
    second = indices_of(made)
    # the second epoch draws other numbers
    assert not {number for numbers in data.drawn for number in numbers} & set(chain(*drawn.values()))
    assert sorted(second) == list(range(8))
    list(inventory(open_source(data).train, left_out=0, steps_per_epoch=1).hashes)
    open_source(data).train.values(3)
    assert torch.equal(torch.rand(3), want[0])
    assert (np.random.rand(3) == want[1]).all()
    assert [random.random() for _ in range(3)] == want[2]


def test_arguments_and_results_of_a_callable_augmentation(tmp_path: Path) -> None:
    met: list[Any] = []

    def views(image: Any) -> Any:
        met.append(image)
        return torch.full((3, 4, 6), 0.25), torch.full((1, 5, 5), 255, dtype=torch.uint8), Image.new("RGB", (7, 8))

    pil(PICTURES[0]).save(tmp_path / "a.png")
    deep = PICTURES[1, 0].numpy().astype(np.uint16) * 3
    Image.fromarray(deep).save(tmp_path / "b.png")
    made = loader(tmp_path, method=views, batch_size=2)
    (floats, gray, black), indices = next(iter(made))
    assert indices in ([0, 1], [1, 0])
    assert (floats.shape, gray.shape, black.shape) == ((2, 3, 4, 6), (2, 3, 5, 5), (2, 3, 8, 7))
    assert (floats == 0.25).all()
    format = settled(open_source(tmp_path)).format
    assert format is not None
    mean, std = np.array(format.mean), np.array(format.std)
    assert gray[0, :, 0, 0].tolist() == pytest.approx(((1 - mean) / std).tolist())
    assert black[1, :, 3, 3].tolist() == pytest.approx((-mean / std).tolist())
    first, second = met[-2:] if indices == [0, 1] else met[:-3:-1]
    assert np.array_equal(np.asarray(first), PICTURES[0].permute(1, 2, 0))
    assert second.dtype == torch.uint16
    assert np.array_equal(second[0].numpy(), deep)
    loader("digits", method=views)
    assert isinstance(met[-1], Image.Image)
    bands = np.random.default_rng(0).integers(0, 2**15, (8, 6, 5, 13), dtype=np.uint16)
    next(iter(loader(bands, method=views)))
    assert met[-1].shape == (13, 6, 5)
    assert met[-1].dtype == torch.uint16


@pytest.mark.parametrize("size", [0, 1])
def test_an_image_folder_of_torchvision_has_labels_and_scores(pictures: Path, size: int) -> None:
    transform = (
        v2.Compose([AS_FLOATS, v2.Resize((12, 12), antialias=True), v2.ToDtype(torch.float32)]) if size else None
    )
    source = open_source(ImageFolder(str(pictures / "classes"), transform=transform))
    files = open_source(pictures / "classes")
    assert source.bank is not None
    assert files.bank is not None
    assert (len(source.train), len(source.bank)) == (len(files.train), len(files.bank)) == (96, 87)
    assert "10 classes; kNN is tested on a tenth" in source.about
    both = [settled(s) for s in (source, files)]
    scores = [frozen_scores({"it": Pixels()}, s, Setting(16, CPU, 0), knn=True)["it"] for s in both]
    assert scores[0]["knn10"].value > 0.4  # chance is 0.1
    if not size:
        assert scores[0] == scores[1]


def test_labels_are_read_without_the_images_if_they_agree() -> None:
    data = Told()
    source = open_source(data)
    before = len(data.asked)
    assert source.test is not None
    assert source.train.labels is not None
    assert source.train.labels.tolist() == LABELS.tolist()
    assert source.test.labels is not None
    assert len(source.test.labels) == 4
    assert len(data.asked) == before
    other = Told()
    other.targets = [9] * 40
    labels = open_source(other).train.labels
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()
    for data_ in (
        Subset(Told(), range(3, 23)),
        ConcatDataset([Told(), Told()]),
        Dicts(),
        TensorDataset(PICTURES, LABELS),
    ):
        assert "4 classes" in open_source(data_).about
    assert "read from each item" in open_source(Pairs()).about
    assert open_source(TensorDataset(PICTURES, LABELS - 1)).bank is None
    assert open_source(TensorDataset(PICTURES, LABELS.float())).bank is None


def test_a_missing_label_of_a_later_item_is_reported() -> None:
    data = [*(Pairs()[index] for index in range(20)), (pil(PICTURES[0]), None)]
    with pytest.raises(UsageError, match="the label of item 20 of list is None"):
        _ = open_source(data).train.labels


def hashes(data: Any) -> Tensor:
    """The hashes of all items."""
    return inventory(open_source(data).train, left_out=0, steps_per_epoch=1).hashes


def test_the_inventory_recognises_a_dataset_and_its_changes() -> None:
    pixels = PICTURES.repeat(5, 1, 1, 1)
    same = hashes(TensorDataset(pixels))
    assert torch.equal(same, hashes(TensorDataset(pixels.clone())))
    random_ones = FakeData(40, (3, 20, 20), transform=v2.RandomCrop(12))
    assert torch.equal(hashes(random_ones), hashes(random_ones))
    for place in (0, 199):
        changed = pixels.clone()
        changed[place, 0, 0, 0] += 1
        assert (hashes(TensorDataset(changed)) != same).sum() == 1
    grown = hashes(TensorDataset(torch.cat([pixels, pixels[:5]])))
    assert len(grown) == 205
    assert (grown[:199] == same[:199]).all()
    array = as_arrays("uint16")
    before = hashes(array)
    array[17, 3, 4, 1] += 1
    assert (hashes(array) != before).nonzero().flatten().tolist() == [17]
    marked = Pairs()
    marked.fingerprint = "a"  # type: ignore[attr-defined]
    other = copy.copy(marked)
    other.fingerprint = lambda: "b"  # type: ignore[attr-defined]
    assert not set(hashes(marked).tolist()) & set(hashes(other).tolist())


def test_a_dataset_with_its_own_generator_is_reported_as_not_resumable_exactly() -> None:
    rng = np.random.default_rng(0)
    source = open_source(Pairs(transform=lambda image: rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)))
    assert "a resumed run is not exact" in source.about
    assert torch.equal(
        hashes(Pairs(transform=lambda image: rng.random((20, 20, 3)))),
        hashes(Pairs(transform=lambda image: rng.random((20, 20, 3)))),
    )


def test_an_augmentation_with_its_own_generator_is_reported() -> None:
    """Loader processes are forked with equal copies of such a generator."""
    own = np.random.default_rng(0)

    def notes(draw: Callable[[], float], data: Any = None) -> list[str]:
        def augment(_: Any) -> tuple[Tensor, Tensor]:
            return torch.full((3, 8, 8), draw()), torch.full((3, 8, 8), float("nan"))

        made = make_loader(
            Pairs() if data is None else data, method=augment, image_size=8, batch_size=2, device="cpu", workers=0,
            seed=0,
        )  # fmt: skip
        return made.notes

    (said,) = notes(own.random)
    assert "the augmentation draws from a generator of its own" in said
    for draw in (random.random, np.random.random, lambda: torch.rand(()).item()):
        assert notes(draw) == []

    def seeded() -> float:
        return np.random.default_rng(random.getrandbits(32)).random()

    assert notes(seeded) == []


class Breaking(Pairs):
    """A Dataset that raises for some of its items."""

    def __init__(self, broken: set[int], count: int = 40) -> None:
        super().__init__(count)
        self.broken = broken

    def __getitem__(self, index: int) -> Any:
        if index in self.broken:
            raise KeyError(f"no row {index}")
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("method", ["mocov2", two])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_that_raises_is_left_out_and_more_than_a_tenth_is_refused(method: Any, workers: int) -> None:
    made = loader(Breaking({0, 7}), method=method, workers=workers, batch_size=10)
    with pytest.warns(
        UserWarning, match=r"left out, since it cannot be read: item 7 of Breaking \(KeyError: 'no row 7'\)"
    ):
        indices = indices_of(made)
    assert set(indices) == set(range(40)) - {0, 7}
    assert len(indices) == 40
    assert set(made.broken) == {"item 0 of Breaking", "item 7 of Breaking"}
    made = loader(Breaking(set(range(30, 40))), method=method, workers=workers)
    with (
        pytest.raises(UsageError, match="5 of 40 items are broken, more than a tenth") as caught,
    ):
        list(made)
    assert "\n" not in str(caught.value)


def test_a_dataset_that_raises_for_100_items_ends_the_run() -> None:
    made = loader(Breaking(set(range(10, 3000)), count=3000))
    with pytest.raises(UsageError, match=r"100 items in a row cannot be read; .*\(KeyError: 'no row"):
        next(iter(made))
    with pytest.raises(UsageError, match="item 0 of Breaking cannot be read: KeyError: 'no row 0'"):
        open_source(Breaking(set(range(10))))


def test_an_evaluation_leaves_out_items_that_raise() -> None:
    source = open_source(Breaking({3, 8}))
    with pytest.warns(UserWarning, match="item [38] of Breaking"):
        frozen_scores({"it": Pixels()}, source, Setting(16, CPU, 0), knn=True)


class Archive(Dataset[Any]):
    """A Dataset of images in one file, which it opens at the first access, as torch's DataLoader requires."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        if self.file is None:
            self.file = open(self.path, "rb")  # noqa: SIM115
        self.file.seek(3240 * index)
        first = self.file.read(1000)
        return torch.frombuffer(bytearray(first + self.file.read(2240)), dtype=torch.uint8).view(3, 30, 36)


@pytest.mark.parametrize("wrapped", [lambda data: data, lambda data: ConcatDataset([Subset(data, range(40))])])
def test_each_process_opens_the_file_of_a_dataset_again(tmp_path: Path, wrapped: Callable[[Any], Any]) -> None:
    (tmp_path / "pictures").write_bytes(PICTURES.numpy().tobytes())
    archive = Archive(tmp_path / "pictures")
    made = loader(wrapped(archive))
    alone = stacked(made)
    source = open_source(wrapped(archive))
    assert archive.file is None
    source.train.values(3)
    list(source.train.identities())
    assert archive.file is None
    assert all(torch.equal(a, b) for a, b in zip(stacked(loader(source, workers=2)), alone, strict=True))
    pickle.dumps(source.train)  # an open file could not be pickled


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(PICTURES)


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return PICTURES[0]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a stream": (Stream, "data is a Stream, whose items come in one order; give a map-style Dataset"),
    "a generator": (lambda: (picture for picture in PICTURES), "data is a generator, whose items come in one order"),
    "a DataLoader": (lambda: DataLoader(Pairs()), "data is a DataLoader; give its dataset"),
    "splits": (lambda: {"train": Pairs()}, r"data is a dict; give one part of it, as in data\['train'\]"),
    "a set": (lambda: {"a.jpg"}, "data is a set, which has no order"),
    "a class": (lambda: Pairs, "data is the class Pairs; give an object of it"),
    "a number": (lambda: 5, "data is a int; it must be a path, the name of a set, a map-style Dataset"),
    "without length": (Endless, "is a Dataset without __len__"),
    "an empty list": (list, "data is an empty list"),
    "an empty Dataset": (lambda: Pairs(0), "data is an empty Pairs"),
    "empty images": (lambda: np.zeros((8, 0, 3, 3), np.uint8), r"shape \[8, 0, 3, 3\]; it must be \[N, H, W, C\]"),
    "channels first": (lambda: PICTURES, r"shape \[40, 3, 30, 36\], with channels before.*permute\(0, 2, 3, 1\)"),
    "one image": (lambda: as_arrays("uint8")[0], r"shape \[30, 36, 3\], which is one image"),
    "one number": (lambda: torch.tensor(1.0), "data is a Tensor without a length"),
    "a path twice": (lambda: ["a.jpg", "./a.jpg"], "2 paths, 1 of them twice"),
    "a table": (lambda: pytest.importorskip("pandas").DataFrame({"path": ["a.jpg"]}), "a DataFrame of pandas; give a "
                "list of its paths, or write it"),
    "pairs of views": (lambda: [((PICTURES[0], PICTURES[1]), 0)] * 8, "it is a tuple; .*give it as the augmentation"),
    "other dicts": (lambda: [{"pixels": 0}], "item 0 of list cannot be read: it is a dict of pixels without the key"),
    "paths and labels": (lambda: [("a.jpg", 0)] * 8, "item 0 of list .* it is a str; .*give a list of paths"),
    "not numbers": (lambda: TensorDataset(PICTURES.float() * torch.nan), "none of the float32 values of 40 images"),
    "of int64": (lambda: TensorDataset(PICTURES.long()), "its values are int64; they must be integers of 8 to 32 bits"),
    "turned tensors": (lambda: TensorDataset(PICTURES.mT.transpose(1, 3)), r"be \[C, H, W\]: permute\(2, 0, 1\)"),
    "turned arrays": (lambda: list(PICTURES.numpy()), r"it must be \[H, W, C\]: transpose\(1, 2, 0\) makes it so"),
    "a vector": (lambda: TensorDataset(torch.rand(40, 7)), r"it is a tensor of shape \[7\]; it must be \[C, H, W\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_objects_that_are_not_data_are_refused_in_one_line(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(UsageError, match=message) as caught:
        loader(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_flipped_arrays_give_what_their_copies_give(channels: int) -> None:
    """As OpenCV's blue, green, red is turned to red, green, blue by [..., ::-1]."""
    images = PICTURES.permute(0, 2, 3, 1).numpy()[..., [0, 1, 2, 0, 1][:channels]]
    flipped = [image[::-1, :, ::-1] for image in images]
    copies = [image.copy() for image in flipped]
    assert all(torch.equal(a, b) for a, b in zip(stacked(loader(flipped)), stacked(loader(copies)), strict=True))


def test_a_second_view_that_is_not_used_is_said() -> None:
    assert "the second part of an item is an image too" in open_source([[p, p] for p in PICTURES]).about
    assert "the second part" not in open_source(TensorDataset(PICTURES, LABELS)).about


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("cat", "without labels: that of the first item is 'cat', and labels are whole numbers from 0 up"),
        (0.5, "that of the first item is 0.5, and"),
        (np.eye(3)[0], "that of the first item is array([1., 0., 0.]), and"),
    ],
)
def test_labels_of_another_type_are_named(label: Any, said: str) -> None:
    source = open_source([(picture, label) for picture in PICTURES])
    assert said in source.about
    assert source.train.labels is None
    for unlabelled in (PICTURES, [(picture, None) for picture in PICTURES]):
        assert open_source(list(unlabelled)).about.endswith("; without labels")


class Streaming(IterableDataset[Any]):
    """Items in one order or by their index, as in the classes of litdata and MosaicML."""

    def __len__(self) -> int:
        return len(PICTURES)

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError

    def __getitem__(self, index: int) -> Any:
        return PICTURES[index], int(LABELS[index])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterable_dataset_with_an_index_is_read_by_it(workers: int) -> None:
    want = stacked(loader(Pairs(), workers=0))
    assert all(torch.equal(a, b) for a, b in zip(stacked(loader(Streaming(), workers=workers)), want, strict=True))


def test_negative_labels_are_none() -> None:
    source = open_source([(picture, -1) for picture in PICTURES])
    assert (source.train.labels, source.bank) == (None, None)


@pytest.mark.filterwarnings("ignore:left out")
def test_missing_files_in_a_list_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"1 of 8 files are broken, more than a tenth; .*No such file") as caught:
        next(iter(loader([tmp_path / f"{index}.jpg" for index in range(8)], loader="torch")))
    assert "\n" not in str(caught.value)


def test_the_class_of_an_augmentation_is_refused() -> None:
    with pytest.raises(UsageError, match="augmentation is the class RandomResizedCrop; give an object of it"):
        fastrm.Trainer(PICTURES, augmentation=v2.RandomResizedCrop)


def test_the_recorded_name_of_a_passed_object_cannot_be_opened() -> None:
    with pytest.raises(UsageError, match="--data <FakeData> names an object that a script passed"):
        open_source("<FakeData>")


def raising(image: Any) -> Any:
    return undefined(image)  # type: ignore[name-defined] # noqa: F821


CALLABLES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one view": (AUGMENT, "augmentation gave a Image for item 0 of Pairs; it must give a tuple of views"),
    "no view": (lambda image: (), "augmentation gave a tuple for item 0"),
    "an array": (lambda image: (np.asarray(image),), r"gave for view 0 of item 0 .*ndarray of shape \[30, 36, 3\]"),
    "int64": (lambda image: (PICTURES[0].long(),), r"a tensor \[3, 30, 36\] of int64; it must give"),
    "a batch": (lambda image: (PICTURES[:2],), r"a tensor \[2, 3, 30, 36\] of uint8"),
    "bands in bytes": (lambda image: (PICTURES[:5, 0],), "uint8 views are normalised by the data's mean"),
    "raising": (raising, r"NameError: name 'undefined' .* \(test_open_data.py, line \d+\), called with item 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLABLES)
def test_a_callable_without_valid_views_is_refused_in_one_line(what: str) -> None:
    augment, message = CALLABLES[what]
    with pytest.raises(UsageError, match=message) as caught:
        loader(Pairs(), method=augment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_views_of_different_shapes_are_refused(workers: int) -> None:
    data = [pil(PICTURES[0]).resize((30 + i % 2, 36)) for i in range(8)]  # some even ones are looked at first
    data[7] = data[0]
    made = loader(data, method=lambda image: (AS_FLOATS(image),), workers=workers)
    with pytest.raises(
        UsageError, match=r"view 0 of item \d of list is \[3, 36, 31\] of float32, and that of the first image is \[3"
    ) as caught:
        next(iter(made))
    assert "\n" not in str(caught.value)


def test_a_loader_states_the_number_of_views() -> None:
    one = Augmentation(views=(View(),))
    for data, method, count in ((Pairs(), two, 2), ("digits", one, 1), (Pairs(), one, 1), ("digits", "byol", 2)):
        assert loader(data, method=method).views == count


@pytest.mark.filterwarnings("ignore:left out")
def test_a_run_on_a_dataset_with_a_callable_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Dataset and callable draw random numbers, and one item raises."""

    class Cropped(Breaking):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return v2.functional.crop(image, random.randrange(9), int(np.random.randint(9)), 20, 20), label

    class Stops:
        def on_step(self, run: Any, step: int, outputs: Any) -> None:
            if step == 2:
                run.stop()

    settings: dict[str, Any] = {
        "arch": "test_resnet", "method": "byol", "augmentation": two_floats, "image_size": 20, "batch_size": 8,
        "hidden_dim": 8, "output_dim": 4, "predictor_hidden_dim": 8, "max_steps": 6, "eval_every": 0, "device": "cpu",
        "stem": "imagenet", "warmup_epochs": 0.0,
    }  # fmt: skip
    whole = fastrm.pretrain(Cropped({3}), out=tmp_path / "whole", workers=0, **settings)
    fastrm.pretrain(Cropped({3}), out=tmp_path / "cut", hooks=[Stops()], workers=0, **settings)
    random.seed(8)
    again = fastrm.pretrain(Cropped({3}), out=tmp_path / "cut", workers=1, **settings)
    for mine, other in zip(whole.student.state_dict().values(), again.student.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    assert whole.scores["loss"] == again.scores["loss"]
    assert "item 3 of Cropped" in (tmp_path / "whole" / "skipped.txt").read_text()


def test_the_loader_for_each_kind_of_data() -> None:
    assert type(loader(as_arrays("uint8"))).__name__ == "MemoryLoader"
    for data, method in ((Pairs(), "mocov2"), ("digits", two), (as_arrays("uint16"), "mocov2")):
        for kind in ("auto", "memory"):
            assert type(loader(data, method=method, loader=kind)).__name__ == "TorchLoader"
        with pytest.raises(UsageError, match=r"--loader dali .*; for .* give torch or auto"):
            loader(data, method=method, loader="dali")
    with pytest.raises(
        UsageError, match=r"the items of FakeData change when they are read again; for .* give torch or auto"
    ):
        loader(FakeData(40, (3, 30, 36), transform=v2.RandomCrop(20)), loader="memory")


def test_objects_that_cannot_be_pickled_for_workers_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    loader(TensorDataset(PICTURES), workers=1)
    for data, method in ((Pairs(), "mocov2"), (TensorDataset(PICTURES), lambda image: (image,))):
        with pytest.raises(
            UsageError, match=r"--workers 1: the Dataset or the augmentation cannot be sent .*--workers 0"
        ):
            loader(data, method=method, workers=1)
        loader(data, method=method)


@pytest.mark.parametrize("name", ["Folder", "augment"])
def test_what_a_notebook_defines_is_refused_for_spawned_workers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be pickled, by its name in ``__main__``, which spawned processes have only if it is of a file."""
    notebook = ModuleType("__main__")
    defined = "class Folder(list): pass\n\ndef augment(image): return (image,)"
    exec(defined, vars(notebook))
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    given: dict[str, dict[str, Any]] = {
        "Folder": {"data": vars(notebook)["Folder"](PICTURES)},
        "augment": {"data": TensorDataset(PICTURES), "method": vars(notebook)["augment"]},
    }
    with pytest.raises(
        UsageError, match=rf"--workers 1: .*\({name} is defined in a notebook or prompt, which they cannot import"
    ):
        loader(**given[name], workers=1)
    loader(**given[name], workers=0)
    for told in ({"__file__": str(tmp_path / "script.py")}, {"__spec__": "of python -m"}):
        (tmp_path / "script.py").write_text(defined)
        with monkeypatch.context() as patch:
            for key, value in told.items():
                patch.setattr(notebook, key, value, raising=False)
            loader(**given[name], workers=1)


def test_images_of_unusual_modes_are_read_like_files() -> None:
    picture = pil(PICTURES[0])
    want = values_in(picture)
    for mode in ("RGBA", "CMYK"):
        assert np.abs(values_in(picture.convert(mode)).astype(int) - want).max() <= 1
    alpha = np.dstack([np.asarray(picture), np.full((30, 36), 9, np.uint8)])
    assert np.array_equal(values_in(alpha), want)
    assert np.array_equal(values_in(alpha, channels=4), alpha)
    gray = np.array(picture.convert("L"))
    for given in (gray, gray[..., None], torch.from_numpy(gray), Image.fromarray(gray), np.dstack([gray, gray])):
        assert (values_in(given)[..., 0] == gray).all()
    with pytest.raises(ValueError, match="its content is only in the transparency"):
        values_in(np.dstack([np.zeros((30, 36, 3), np.uint8), gray]))


def test_an_open_source_is_returned_unchanged() -> None:
    source = open_source("digits")
    assert open_source(source) is source
    assert isinstance(source, Source)
    assert isinstance(open_source(Pairs()).train, ItemImages)
    assert open_source(Pairs()).name == "Pairs"
