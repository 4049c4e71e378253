"""Views of any number and size: through every loader, in files of users, over a resume, and on the contact sheet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastrm
from fastrm import train
from fastrm.data import Augmentation, Source, View, augmentation_of, make_loader, open_source, sheets
from fastrm.data.__main__ import main as contact_sheet
from fastrm.data.dali import dali_problem
from fastrm.data.draws import draw_views
from fastrm.data.sources import ArrayImages
from fastrm.errors import UsageError
from fastrm.methods import MoCoV2, find
from fastrm.run import checkpoint
from fastrm.settings.config import Config
from fastrm.settings.config_file import VIEWS
from fastrm.settings.flags import read_flags
from tests.conftest import natural_pictures
from tests.test_batched import composed

# A strong blur, so that a blur for another view's size would be visible.
LARGE = View(blur_sigma=(8.0, 8.5), blur_probability=1.0)
SMALL = replace(LARGE, size=16, crop_scale=(0.05, 0.4), interpolation="bicubic")
MULTI_CROP = Augmentation(views=(LARGE,) * 2 + (SMALL,) * 4)
KINDS = [
    "memory", "memory, tiny", "torch", "torch, files",
    pytest.param("dali, files", marks=pytest.mark.skipif(dali_problem() is not None, reason="needs DALI")),
]  # fmt: skip
TINY = {"hidden_dim": 16, "predictor_hidden_dim": 16, "output_dim": 8, "queue_size": 32, "workers": 0, "eval_every": 0}


def source_of(kind: str, folder: Path) -> Source:
    """A source of six images, in memory or in files."""
    pixels = natural_pictures(6, *((20, 26) if "tiny" in kind else (60, 80))).permute(0, 2, 3, 1).numpy()
    if "files" not in kind:
        return Source(name="some", train=ArrayImages(pixels, None), bank=None, test=None, about="")
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return open_source(str(folder))


def loader_of(kind: str, source: Source, recipe: Augmentation, image_size: int = 32) -> Any:
    """A loader of this kind for the source and augmentation."""
    return make_loader(
        source, method=recipe, image_size=image_size, batch_size=6, device="cpu", workers=0, seed=5,
        loader=kind.partition(",")[0],
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_two_sizes_equal_torchvision(kind: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path)
    loader = loader_of(kind, source, MULTI_CROP)
    (request,) = loader._sampler
    views, indices = next(iter(loader))
    assert [tuple(view.shape) for view in views] == [(6, 3, 32, 32)] * 2 + [(6, 3, 16, 16)] * 4
    pictures = [source.train.picture(i) for i in indices]
    sizes = [(picture.height, picture.width) for picture in pictures]
    drawn = draw_views(MULTI_CROP.views, sizes, 32, loader._sampler.generator(request))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for view, draws, out in zip(MULTI_CROP.views, drawn, views, strict=True):
        side = out.shape[-1]
        assert (draws.sigma >= 8 * side / 224).all()
        assert (draws.sigma <= 8.5 * side / 224).all()
        radius = int(np.ceil(3 * 8.5 * side / 224))
        for i, picture in enumerate(pictures):
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            want = composed(image, draws, i, view.interpolation, side, radius)
            assert float((out[i] * std + mean - want).abs().mean()) < 3 / 255


@pytest.mark.parametrize("kind", KINDS)
def test_further_views_and_given_sizes_do_not_change_two_views(kind: str, tmp_path: Path) -> None:
    source, two = source_of(kind, tmp_path), find("mocov3").augmentation(0.2)
    more = replace(two, views=(*two.views, replace(two.views[0], size=16)))
    sized = replace(two, views=tuple(replace(view, size=32) for view in two.views))
    want = next(iter(loader_of(kind, source, two))).views
    for recipe, image_size in ((more, 32), (sized, 48)):
        found = next(iter(loader_of(kind, source, recipe, image_size))).views
        assert all(torch.equal(*pair) for pair in zip(found, want, strict=False))


def made(text: str, tmp_path: Path, method: str = "byol", **options: Any) -> Augmentation:
    """The augmentation that a file with this text describes."""
    (tmp_path / "views.toml").write_text(text, encoding="utf-8")
    return augmentation_of(method, 0.1, tmp_path / "views.toml", **options)


def test_a_file_states_only_differences_from_the_method(tmp_path: Path) -> None:
    first, second = find("byol").augmentation(0.1).views
    own = (first, second)
    assert made("", tmp_path).views == own
    assert made("hue = 0\nblur_sigma = [1, 2]", tmp_path).views == tuple(
        replace(view, hue=0, blur_sigma=(1, 2)) for view in own
    )
    text = "hue = 0.05\n[[view]]\nflip_probability = 0.0\n[[view]]\nsize = 224\nhue = 0.2\n[[view]]"
    assert made(text, tmp_path).views == (
        replace(first, hue=0.05, flip_probability=0.0),
        replace(second, size=224, hue=0.2),
        replace(first, hue=0.05),  # the defaults start again
    )
    assert made("mean = [0, 0.5, 1]\nstd = [1, 1, 2]", tmp_path).std == (1, 1, 2)
    assert made('views = "4x64"', tmp_path).views == tuple(replace(view, size=64) for view in own * 2)


def test_views_of_several_sizes_equal_the_multi_crop_of_dino(tmp_path: Path) -> None:
    """The values are those of https://arxiv.org/abs/2104.14294 and its code: the first view is always blurred, the
    second sometimes solarized.
    """
    want = [(224, (0.4, 1.0), 1.0, 0.0), (224, (0.4, 1.0), 0.1, 0.2)] + [(96, (0.05, 0.4), 0.5, 0.0)] * 8
    short = augmentation_of("byol", 0.1, "2x224,8x96")
    for found in (short, made('views = "2x224, 8x96"', tmp_path), made(
        "[[view]]\ncount = 2\nsize = 224\n[[view]]\ncount = 8\nsize = 96", tmp_path
    )):  # fmt: skip
        assert found == short
        numbers = [(v.size, v.crop_scale, v.blur_probability, v.solarize_probability) for v in found.views]
        assert numbers == want
        assert {(v.brightness, v.contrast, v.saturation, v.hue) for v in found.views} == {(0.4, 0.4, 0.2, 0.1)}
    # A view without a size has the size of the run, and values in the file override the published ones.
    found = made("crop_scale = [0.3, 1]\n[[view]]\n[[view]]\nsize = 96\ncrop_scale = [0.1, 0.2]", tmp_path)
    assert [view.crop_scale for view in found.views] == [(0.3, 1), (0.1, 0.2)]
    assert made("[[view]]\n[[view]]\nsize = 96", tmp_path, image_size=96).views[1].crop_scale == (0.1, 1.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("crop_scael = [0.1, 1]", "'crop_scael' is unknown; did you mean crop_scale?"),
        ("[[view]]\n[[view]]\nblur_prob = 1", r"\[\[view\]\] 2: 'blur_prob' .*did you mean blur_probability?"),
        ("xyzzy = 1", "'xyzzy' is unknown; there are crop_scale, crop_ratio, "),
        ("hue = 0.5", "toml: hue is 0.5; it must be a number from 0 to a third"),
        ("[[view]]\ncount = 2\n[[view]]\nhue = '1'", "view 3: hue is '1'; it must be a number from 0 to a third"),
        ("crop_scale = [1, 0.5]", r"crop_scale is \(1, 0.5\); it must be 2 numbers above 0 up to 1, the lower one"),
        ("blur_sigma = [1, 99]", "blur_sigma is .*; it must be 2 numbers above 0 up to 64"),
        ("size = 7", "size 7 is out of range; it must be at least 8 and at most 4096"),
        ("[[view]]\nsize = 7.5", r"\[\[view\]\] 1: size 7.5 is a float; it must be int"),
        ("[[view]]\ncount = 0", r"\[\[view\]\] 1: count 0 is out of range; it must be at least 1 and at most 64"),
        ("views = 3", 'views is 3; it must be a number of views and their size, as "2x224,8x96"'),
        ("views = '2x224'\n[[view]]", "both set the number of views"),
        ("view = 3", r"view must be tables: \[\[view\]\]"),
        ("std = [1, 0, 1]", "std is .*; it must be a number per channel above 0"),
        ("hue = ", "it is no TOML: "),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^--augmentation .*views.toml: .*{says}|^--augmentation .*{says}") as caught:
        made(text, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["views.yaml", "2x", "0x", "2x99999", "x224", "", "gone.toml", "gone.json", "2x7"])
def test_invalid_augmentations_are_refused(given: str) -> None:
    with pytest.raises(UsageError, match=f"^--augmentation {given}: "):
        augmentation_of("byol", 0.1, given)


def test_python_reads_the_same_augmentation(tmp_path: Path) -> None:
    (tmp_path / "views.toml").write_text("hue = 0.0", encoding="utf-8")
    assert Augmentation.read(tmp_path / "views.toml") == Augmentation(views=(View(hue=0.0),) * 2)
    own = find("byol").augmentation(0.1)
    assert Augmentation.read("2x224,8x96", base=own) == augmentation_of("byol", 0.1, "2x224,8x96")


def test_every_value_is_written_and_read(tmp_path: Path) -> None:
    whole = augmentation_of("mocov3", 0.3, "2x224,8x96")
    plain = json.loads(json.dumps(whole.plain()))
    assert [set(view) for view in plain["view"]] == [set(asdict(View()))] * 10
    assert plain["view"][2]["crop_scale"] == [0.05, 0.4]
    (tmp_path / "config.json").write_text(json.dumps({VIEWS: plain}), encoding="utf-8")
    # The method does not matter, since every value is given.
    assert augmentation_of("byol", 0.9, tmp_path / "config.json") == whole
    assert whole.difference(plain) == ""
    other = replace(whole, views=(replace(whole.views[0], hue=0.2, size=96), *whole.views[1:]))
    assert other.difference(plain) == "hue of view 1 was 0.1, is 0.2; size of view 1 was 224, is 96"
    assert replace(whole, views=whole.views[:2]).difference(plain) == "there were 10 views, and are 2"
    assert replace(whole, mean=(0, 0, 0)).difference(plain).startswith("mean was ")


SETTINGS = {**TINY, "method": "mocov2", "image_size": 16, "batch_size": 8}


@pytest.fixture
def run(small: Callable[..., Config], tmp_path: Path) -> Callable[..., Any]:
    """A function that trains up to a step, with the views that a text describes."""

    def go(text: str | None, steps: int, **leaves: Any) -> Any:
        if text is not None:
            (tmp_path / "views.toml").write_text(text, encoding="utf-8")
            leaves["augmentation"] = str(tmp_path / "views.toml")
        return train.train(small(**{**SETTINGS, "max_steps": steps, **leaves}))

    return go


TEXT = "hue = 0.05\n[[view]]\n[[view]]\nsize = 12\n"


def test_a_run_stores_every_value_of_its_views(run: Any, tmp_path: Path) -> None:
    run(TEXT, 1)
    out = tmp_path / "run"
    want = augmentation_of("mocov2", 0.2, tmp_path / "views.toml", 16)
    assert [view.size for view in want.views] == [None, 12]
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["augmentation"] == str(tmp_path / "views.toml")
    assert config[VIEWS] == checkpoint.load(out)["augmentation"] == want.plain()
    # The file may describe the same views in other words and lie elsewhere; other values are refused.
    (tmp_path / "other.toml").write_text(TEXT.replace("0.05", "5e-2") + "hue = 0.05\n", encoding="utf-8")
    assert run(None, 2, augmentation=str(tmp_path / "other.toml"))["step"] == 2
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for text, says in (
        (TEXT.replace("0.05", "0.1"), "hue of view 1 was 0.05, is 0.1; hue of view 2 was 0.05, is 0.1"),
        (
            None,
            r"crop_scale of view 1 was \[0.4, 1.0\], is \[0.2, 1.0\]; hue of view 1 was 0.05, is 0.1; .*; and 2 more",
        ),
    ):
        with pytest.raises(UsageError, match=f"checkpoint.pt is from a run with other views: {says}") as caught:
            run(text, 3)
        assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    # After the files are deleted, the run's config.json has everything.
    for name in ("views.toml", "other.toml"):
        (tmp_path / name).unlink()
    assert run(None, 2, augmentation=str(out / "config.json"))["step"] == 2
    repeated = read_flags(["--config", str(out / "config.json"), "--out", str(tmp_path / "again")]).input
    assert augmentation_of("mocov2", repeated.crop_min, repeated.augmentation, 16) == want


def test_the_views_of_a_method_are_stored_and_compared(run: Any, tmp_path: Path) -> None:
    run(None, 1)
    own = find("mocov2").augmentation(0.2).plain()
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (config["augmentation"], config[VIEWS]) == (None, own)
    with pytest.raises(UsageError, match=r"with other views: hue of view 1 was 0.1, is 0.0; hue of view 2"):
        run("hue = 0.0", 2)
    # If the views are the method's own, a setting beside the file changes them.
    repeated = read_flags(["--config", str(tmp_path / "run" / "config.json"), "--crop-min", "0.5"])
    assert (repeated.input.augmentation, repeated.input.crop_min) == (None, 0.5)


def test_checkpoints_of_older_versions_without_views_continue(run: Any, tmp_path: Path) -> None:
    def forget() -> None:
        path = tmp_path / "run" / "checkpoint.pt"
        state = checkpoint.load(path)
        del state["augmentation"], state["config"]["augmentation"]
        torch.save({**state, "checksum": checkpoint.checksum(state)}, path)

    run(None, 1)
    forget()
    with pytest.raises(UsageError, match=r"--augmentation was None, is .*views.toml"):
        run("hue = 0.0", 2)
    assert run(None, 2)["step"] == 2
    forget()
    settings = {"epochs": 4, "max_steps": 2, "warmup_epochs": 0.0, "log_every": 1, "stem": "imagenet", **SETTINGS}
    own = find("mocov2").augmentation(0.2)
    result = fastrm.pretrain("digits", arch="test_resnet", augmentation=own, out=tmp_path / "run", **settings)
    assert result.scores["step"] == 2


def test_an_augmentation_object_is_stored_and_compared(tmp_path: Path) -> None:
    def go(augmentation: Any) -> Any:
        return fastrm.pretrain(
            "digits", augmentation=augmentation, arch="test_resnet", max_steps=1, out=tmp_path / "run", **SETTINGS
        )

    mine = Augmentation(views=(View(hue=0.0), View(size=24)))
    go(mine)
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (config["augmentation"], config[VIEWS]) == ("<Augmentation>", mine.plain())
    assert go(mine).scores["step"] == 1
    with pytest.raises(UsageError, match=r"with other views: hue of view 2 was 0.1, is 0.0"):
        go(Augmentation(views=(View(hue=0.0), View(hue=0.0, size=24))))
    assert go(tmp_path / "run" / "config.json").scores["step"] == 1
    flags = read_flags(["--config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "other")])
    assert flags.input.augmentation == str(tmp_path / "run" / "config.json")


def test_a_method_refuses_another_number_of_views(small: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="--method mocov3 takes 2 views or more of an image; the augmentation gives 1"
    ) as caught:
        train.train(small(augmentation="1x32"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def place_of(picture: Any, sheet: Any, top: int, left: int) -> tuple[int, int]:
    """The row and column of an image in a sheet, at or after a position."""
    height, width = picture.shape[:2]
    high, wide = sheet.shape[0] - top - height + 1, sheet.shape[1] - left - width + 1
    near = np.ones((high, wide), dtype=bool)
    for y, x in np.random.default_rng(0).integers(0, (height, width), (12, 2)).tolist():
        part = sheet[top + y : top + y + high, left + x : left + x + wide]
        near &= abs(part - picture[y, x]).max(axis=-1) <= 1
    for y, x in np.argwhere(near).tolist():
        y, x = top + y, left + x
        if abs(sheet[y : y + height, x : x + width] - picture).max() <= 1:
            return y, x
    raise AssertionError("it is not there")


@pytest.mark.parametrize(
    ("kind", "text", "sides", "original"),
    [
        ("tiny", "", (128, 128), 4),  # 20x26 pixels
        # 60x80 pixels, enlarged to 200
        ("files", "[[view]]\n[[view]]\nsize = 16\n[[view]]\nsize = 200\n", (128, 128, 200), 2),
        ("files", "views = '3x48,9x24'", (144,) * 12, 1),
    ],
)
def test_a_contact_sheet_shows_images_and_views_pixel_by_pixel(
    kind: str, text: str, sides: tuple[int, ...], original: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each pixel is drawn as a square, so that views are at least 128 pixels wide."""
    (tmp_path / "data").mkdir()
    source = source_of("files", tmp_path / "data")
    if kind == "tiny":
        for path in (tmp_path / "data").iterdir():
            Image.fromarray(np.asarray(Image.open(path))[:20, :26]).save(path)
    (tmp_path / "views.toml").write_text(text, encoding="utf-8")
    flags = ["--data", str(tmp_path / "data"), "--image-size", "32", "--images", "2", "--loader", "torch"]
    out = tmp_path / "views.png"
    contact_sheet([*flags, "--augmentation", str(tmp_path / "views.toml"), "--crop-min", "0.3", "--out", str(out)])
    assert f"and beside each its {len(sides)} views" in capsys.readouterr().out
    with Image.open(out) as drawn:
        found = np.asarray(drawn.convert("RGB")).astype(int)
    views, indices = next(iter(make_loader(
        str(tmp_path / "data"), method=augmentation_of("mocov3", 0.3, tmp_path / "views.toml", 32), image_size=32,
        batch_size=2, device="cpu", workers=0, seed=0, loader="torch",
    )))  # fmt: skip
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    bottom = 0
    for i, index in enumerate(indices):
        picture = np.asarray(source.train.picture(index)).astype(int)
        shown = [picture.repeat(original, axis=0).repeat(original, axis=1)]
        for view, side in zip(views, sides, strict=True):
            one = ((view[i].permute(1, 2, 0).numpy() * std + mean).clip(0, 1) * 255).round()
            times = side // one.shape[0]
            shown.append(one.repeat(times, axis=0).repeat(times, axis=1))
        tops, x = set(), 0
        for tile in shown:
            near = found[: bottom + max(sides) + 80, : x + tile.shape[1] + 80]
            top, left = place_of(tile, near, bottom, x)
            assert (found[top, x : left - 1] > 200).all()  # side by side, with nothing in between
            tops.add(top)
            x = left + tile.shape[1]
        assert len(tops) == 1
        assert (found[bottom : top - 1] < 128).any()  # text above the row
        bottom = top + max(sides)


def test_names_of_any_length_are_drawn_above_their_row() -> None:
    tiles = [sheets.Tile(Image.new("RGB", (128, 128), "white"))] * 2
    drawn = [
        sheets.draw([sheets.Row(name, "label 3", tiles)], titles=["original", "view 1\n32 pixels"])
        for name in ("a", "b" * 10_000, "/a/" * 40 + "b.png", "line\nfeed", "日本 é \udcff")
    ]
    assert len({picture.size for picture in drawn}) == 1
    for i, picture in enumerate(drawn):
        ink = np.asarray(picture.convert("L")) < 128
        assert ink[:-140].any()
        assert not ink[:, -2:].any()
        assert not any((ink == (np.asarray(other.convert("L")) < 128)).all() for other in drawn[:i])


def test_the_sheet_uses_the_crops_of_the_method(tmp_path: Path) -> None:
    """The crops are the default of the method, not that of the command. BYOL crops down to 8 % of the area."""
    flags = ["--data", "digits", "--image-size", "16", "--images", "2", "--method", "byol"]
    for name, more in (("own", []), ("same", ["--crop-min", "0.08"]), ("other", ["--crop-min", "0.9"])):
        contact_sheet([*flags, *more, "--out", str(tmp_path / f"{name}.png")])
    own, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("own", "same", "other"))
    assert own == same
    assert own != other


def test_the_start_reports_the_number_of_views(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(None, 1)
    assert "views " not in capsys.readouterr().out
    run(None, 1, augmentation="1x8,1x24", resume="never")
    said = capsys.readouterr().out
    assert (
        "views      1 of 8 pixels, 1 of 24 pixels; the network is built for --image-size 16, and evaluated at it"
        in said
    )


@pytest.mark.parametrize(
    ("bands", "says"),
    [
        (5, "; of 5 bands the first three as red, green and blue"),
        (2, "; of 2 bands the first as gray"),
        (1, " views\n"),
    ],
)
def test_the_sheet_shows_three_bands_or_one(
    bands: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The values are scaled by the given range; each view is the whole image here."""
    (tmp_path / "data").mkdir()
    values = np.random.default_rng(0).integers(0, 4096, (2, 24, 24, bands)).astype(np.uint16)
    for i, picture in enumerate(values):
        np.save(tmp_path / "data" / f"{i}.npy", picture)
    (tmp_path / "views.toml").write_text(
        "crop_scale = [1, 1]\ncrop_ratio = [1, 1]\njitter_probability = 0\nblur_probability = 0\n"
        "solarize_probability = 0\nflip_probability = 0\ngrayscale_probability = 0\nviews = '1x24'",
        encoding="utf-8",
    )
    flags = ["--data", str(tmp_path / "data"), "--images", "2", "--out", str(tmp_path / "views.png")]
    contact_sheet([*flags, "--value-range", "0,4095", "--augmentation", str(tmp_path / "views.toml")])
    assert says in capsys.readouterr().out
    with Image.open(tmp_path / "views.png") as drawn:
        found = np.asarray(drawn.convert("RGB")).astype(int)
    shown = values[..., :3] if bands == 5 else values[..., :1].repeat(3, axis=-1)
    for picture in (shown / 4095 * 255).round():
        large = picture.repeat(6, axis=0).repeat(6, axis=1)
        top, left = place_of(large, found, 0, 0)
        assert place_of(large, found, top, left + 144)[0] == top


def test_a_custom_method_accepts_multi_crop(tmp_path: Path) -> None:
    shapes = []

    class SixViews(MoCoV2):
        views = 6

        def forward(self, first: Tensor, second: Tensor, *rest: Any, **options: Any) -> Any:
            shapes.append([tuple(view.shape[1:]) for view in (first, second, *rest[:4])])
            return super().forward(first, second, *rest[4:], **options)

    fastrm.pretrain(
        "digits", augmentation="2x32,4x16", arch="test_resnet", method=SixViews, image_size=32, batch_size=16,
        max_steps=1, out=tmp_path / "run", **TINY,
    )  # fmt: skip
    assert shapes[-1] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 4
    assert [view["size"] for view in checkpoint.load(tmp_path / "run")["augmentation"]["view"]] == [
        32,
        32,
        16,
        16,
        16,
        16,
    ]
