"""The target libraries load the exports, and an export is kept only if it gives the same features."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import fastrm
from fastrm import export
from fastrm.data.eval_view import eval_view
from fastrm.data.formats import RGB, PixelFormat
from fastrm.errors import TrainingError, UsageError
from fastrm.exports import TARGETS
from fastrm.models import Backbone, build_backbone
from fastrm.models.weights import metadata, write_backbone
from tests.test_cli import fails


def pixels_of(channels: int) -> PixelFormat:
    """The pixel format of images with 3 or 5 channels."""
    if channels == 3:
        return RGB
    return PixelFormat(channels=channels, mean=(0.4, 0.3, 0.2, 0.1, 0.5), std=(0.2, 0.3, 0.4, 0.5, 0.6))


def backbone_in(path: Path, arch: str, channels: int = 3, size: int = 32, data: str = "digits") -> Backbone:
    """Write a backbone whose tensors all have an effect on the features, and return it."""
    torch.manual_seed(0)
    backbone = build_backbone(arch, image_size=size, stem="imagenet", channels=channels).eval()
    for name, value in backbone.net.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            low = 0.5 if "var" in name else 0.2  # gives features of about size 1
            value.uniform_(low, low + 1) if "var" in name or "weight" in name else value.normal_(0, 0.1)
    settings = {"arch": arch, "stem": "imagenet", "image_size": size, "method": "byol", "data": data}
    write_backbone(path, backbone, metadata(settings, "student", pixels_of(channels)))
    return backbone


def images_for(backbone: Backbone, size: int = 32) -> Tensor:
    """Random images float32 [3, channels, size, size]."""
    return torch.randn(3, backbone.channels, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def expected(backbone: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [3, D] and feature map of the backbone."""
    features, found = backbone.encode(images)
    assert features.std() > 1e-2
    return features, found


def write(path: Path, kind: str, out: Path, *more: str) -> Path:
    """Export the backbone file ``path`` to ``out``."""
    export.main([str(path), "--format", kind, "--out", str(out), *more])
    return out


NETWORKS = [(arch, bands) for arch in ("resnet18", "convnext_atto", "test_vit") for bands in (3, 5)]


@pytest.mark.slow  # test_flags_of_export and test_bands have quicker cases
@pytest.mark.parametrize("kind", ["timm", "onnx"])
@pytest.mark.parametrize(("arch", "channels"), NETWORKS)
def test_timm_and_onnx_give_the_same_features(
    kind: str, arch: str, channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "it.safetensors"
    backbone = backbone_in(path, arch, channels)
    images = images_for(backbone)
    want, found = expected(backbone, images)
    out = tmp_path / ("it.onnx" if kind == "onnx" else "it")
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        write(path, kind, out)
        (got,) = onnxruntime.InferenceSession(str(out)).run(["features"], {"images": images.numpy()})
    else:
        network = timm.create_model(f"local-dir:{write(path, kind, out)}", pretrained=True).eval()
        with torch.no_grad():
            got = network(images)
            torch.testing.assert_close(network.forward_features(images), found, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    said = capsys.readouterr().out
    # digits are gray, so they cannot be shown as 5 bands
    shown = "8 images of the run" if channels == 3 else "8 made images"
    assert re.search(rf"{kind}\S* \S+ loads it: largest difference of the features \S+( and .*)? on {shown}", said)


@pytest.mark.parametrize(
    ("arch", "channels"),
    [pytest.param(*each, marks=() if each == ("test_vit", 5) else pytest.mark.slow) for each in NETWORKS],
)
def test_transformers_gives_the_same_features(
    arch: str, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    path = tmp_path / "it.safetensors"
    backbone = backbone_in(path, arch, channels)
    images = images_for(backbone)
    want, found = expected(backbone, images)
    out = write(path, "transformers", tmp_path / "it")
    model = transformers.AutoModel.from_pretrained(str(out)).eval()
    # As for a model on the Hub; version 5.24 also asks the Hub for local folders.
    monkeypatch.setattr("transformers.models.auto.auto_factory.hf_api", lambda: type("", (), {"repo_exists": bool}))
    as_backbone = transformers.AutoBackbone.from_pretrained(str(out)).eval()
    with torch.no_grad():
        got, (mapped,) = model(images), as_backbone(images).feature_maps
    torch.testing.assert_close(got.pooler_output.flatten(1), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.last_hidden_state, found, rtol=0, atol=1e-5)
    if arch == "test_vit":
        found = found[:, 1:].transpose(1, 2).reshape(3, -1, 2, 2)
    elif arch == "convnext_atto":
        found = functional.layer_norm(found.permute(0, 2, 3, 1), found.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(mapped, found, rtol=0, atol=1e-5)
    card = (out / "README.md").read_text()
    assert f"transformers.{type(as_backbone).__name__}.from_pretrained" in card
    assert re.search(r"\*\*Check:\*\* transformers \S+ \(AutoModel and \w+Backbone\) loads it: largest", card)
    values = np.random.default_rng(0).integers(0, 256, (40, 40, channels), np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(str(out))
    view = processor(values, input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]
    want = eval_view(torch.from_numpy(values.transpose(2, 0, 1).copy()), 32, pixels_of(channels))
    torch.testing.assert_close(view, want, rtol=0, atol=0.03)  # transformers rounds at another place after resizing


def test_a_network_without_a_transformers_class_is_loaded_through_timm(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    path = tmp_path / "it.safetensors"
    backbone = backbone_in(path, "test_convnext", 5)  # its norms have another epsilon than those of transformers
    images = images_for(backbone)
    out = write(path, "transformers", tmp_path / "it")
    with torch.no_grad():
        got = transformers.AutoModel.from_pretrained(str(out)).eval()(images).pooler_output
    torch.testing.assert_close(got, expected(backbone, images)[0], rtol=0, atol=1e-5)
    card = (out / "README.md").read_text()
    assert "Through timm; AutoBackbone does not load it." in card
    assert "(AutoModel, through timm; AutoBackbone does not load it) loads it" in card
    write(path, "timm", out)
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 5])
def test_an_export_to_transformers_replaces_only_files_that_fastrm_wrote(channels: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    path, out = tmp_path / "it.safetensors", tmp_path / "out"
    backbone_in(path, "test_vit", channels)
    files = {
        file.name for kind in ("timm", "transformers", "transformers") for file in write(path, kind, out).iterdir()
    }
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    for name in files:
        kept = (out / name).read_bytes()
        (out / name).write_text("mine")
        with pytest.raises(UsageError, match=re.escape(f"{name}, which fastrm did not write")):
            write(path, "transformers", out)
        assert (out / name).read_text() == "mine"
        (out / name).write_bytes(kept)


class Conv(nn.Conv2d):
    """The Conv2d of Detectron2, which includes its norm."""

    def __init__(self, into: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(into, out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(super().forward(x))
        return normed


class Block(nn.Module):
    """The BasicBlock of Detectron2, with a shortcut if the number of channels changes."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv(into, out, 3, stride), Conv(out, out, 3)
        self.shortcut = Conv(into, out, 1, stride) if into != out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x).relu())
        return (out + (x if self.shortcut is None else self.shortcut(x))).relu()


class Detectron2ResNet18(nn.Module):
    """The names and the computation of detectron2/modeling/backbone/resnet.py for depth 18."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = Conv(channels, 64, 7, 2)
        for stage, (into, out) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], start=2):
            setattr(self, f"res{stage}", nn.Sequential(Block(into, out, 1 if stage == 2 else 2), Block(out, out, 1)))

    def forward(self, images: Tensor) -> Tensor:
        x = functional.max_pool2d(self.stem.conv1(images).relu(), 3, 2, 1)
        for stage in (self.res2, self.res3, self.res4, self.res5):
            x = stage(x)
        return x


@pytest.mark.parametrize("channels", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_detectron2_and_mmdet_give_the_same_features(
    channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "it.safetensors"
    backbone = backbone_in(path, "resnet18", channels)
    images = images_for(backbone)
    _, want = expected(backbone, images)
    content = pickle.loads(write(path, "detectron2", tmp_path / "it.pkl").read_bytes())
    assert content["matching_heuristics"] is True
    assert isinstance(content["__author__"], str)
    network = Detectron2ResNet18(channels)
    state = {name: torch.from_numpy(value) for name, value in content["model"].items()}
    left = network.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in left.missing_keys)
    # MMDetection uses the names of torchvision. Its loader ignores tensors that do not fit, so each one is compared.
    theirs = torch.load(write(path, "mmdet", tmp_path / "it.pth"), weights_only=True)
    other = torchvision.models.resnet18()
    other.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    other.fc = nn.Identity()
    other.load_state_dict(theirs)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.eval()(images), want.mean(dim=(2, 3)), rtol=0, atol=1e-5)
    said = capsys.readouterr().out
    for library, name in (("detectron2", "it.pkl"), ("mmdet", "it.pth")):
        if library not in sys.modules:
            assert f"not checked: {library} is not installed" in said
            assert f"not checked: {library} is not installed" in (tmp_path / f"{name}.md").read_text()
    assert "'MODEL.RESNETS.STRIDE_IN_1X1', False" in (tmp_path / "it.pkl.md").read_text()
    write(path, "detectron2", tmp_path / "it.pkl")
    (tmp_path / "it.pkl").write_bytes(pickle.dumps({"mine": "fastrm"}))
    with pytest.raises(UsageError, match=r"it\.pkl is there and not an export"):
        write(path, "detectron2", tmp_path / "it.pkl")


def test_tensor_names_follow_the_rules_of_detectron2() -> None:
    """The names follow the rules of detectron2's tools/convert-torchvision-to-d2.py."""
    from fastrm.exports.detection import detectron2_name

    with torch.device("meta"):
        names = [name for name in torchvision.models.resnet50().state_dict() if not name.startswith("fc.")]
    for name in names:
        want = name if "layer" in name else f"stem.{name}"
        for number in (1, 2, 3, 4):
            want = want.replace(f"layer{number}", f"res{number + 1}")
        for number in (1, 2, 3):
            want = want.replace(f"bn{number}", f"conv{number}.norm")
        want = want.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        assert detectron2_name(name) == want


@pytest.mark.parametrize(
    ("arch", "kind", "says"),
    [
        ("test_vit", "detectron2", "detectron2 holds resnet18, resnet34"),
        ("test_resnet", "mmdet", "mmdet holds resnet18, resnet34"),
        ("test_vit", "torchvision", "torchvision holds ResNets only"),
    ],
)
def test_a_network_that_a_format_cannot_hold_is_refused(arch: str, kind: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    backbone_in(path, arch)
    with pytest.raises(UsageError, match=says):
        write(path, kind, tmp_path / f"out{TARGETS[kind].endings[0]}")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault", ["another weight", "unreadable", "a missing value"])
def test_an_export_with_other_features_is_not_written(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "it.safetensors", tmp_path / "out" / "it.pth"
    backbone_in(path, "test_resnet")
    write(path, "timm", out)
    before = {file.name: file.read_bytes() for file in out.parent.iterdir()}
    true = TARGETS["timm"].write

    def wrong(subject: Any, staged: Path) -> None:
        true(subject, staged)
        state = torch.load(staged, weights_only=True)
        state["layer4.0.bn2.bias"] += {"another weight": 0.01, "unreadable": 0.0, "a missing value": np.nan}[fault]
        torch.save(state, staged)
        if fault == "unreadable":
            staged.write_bytes(staged.read_bytes()[:1000])

    monkeypatch.setitem(TARGETS, "timm", TARGETS["timm"]._replace(write=wrong))  # type: ignore[index]
    said = fails(lambda arguments: write(path, "timm", out), [], capsys)
    assert "timm cannot load the export" in said if fault == "unreadable" else "is another network in timm" in said
    assert {file.name: file.read_bytes() for file in out.parent.iterdir()} == before
    assert {file.name for file in tmp_path.iterdir()} == {"it.safetensors", "out"}


def test_an_export_is_not_called_checked_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "it.safetensors"
    backbone_in(path, "test_resnet")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(TARGETS, "timm", TARGETS["timm"]._replace(library="torchvision"))  # type: ignore[index]
    card = write(path, "timm", tmp_path / "out") / "README.md"
    assert capsys.readouterr().out.endswith("not checked: torchvision is not installed\n")
    assert "**Check:** not checked: torchvision is not installed." in card.read_text()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"--format transformers needs the package transformers: .* pip install"):
        write(path, "transformers", tmp_path / "other")
    assert not (tmp_path / "other").exists()


SMALL = {"arch": "test_resnet", "image_size": 32, "stem": "imagenet", "batch_size": 16, "max_steps": 1, "workers": 0,
         "epochs": 1, "warmup_epochs": 0.0, "hidden_dim": 16, "output_dim": 8, "predictor_hidden_dim": 16,
         "eval_every": 0, "log_to": ()}  # fmt: skip


@pytest.mark.usefixtures("few_digits")
def test_a_run_exports_its_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = fastrm.pretrain("digits", out=tmp_path / "plain", **SMALL)
    out = tmp_path / "run"
    result = fastrm.pretrain("digits", out=out, export=("timm",), **SMALL)
    for name, value in result.student.state_dict().items():
        assert torch.equal(value, plain.student.state_dict()[name])
    assert "loads it: largest difference" in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 32)
    exported = timm.create_model(f"local-dir:{out / 'export' / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), result.student(images), rtol=0, atol=1e-5)
    assert "| method | mocov3 |" in (out / "export" / "timm" / "README.md").read_text()
    # The complete run gets another format.
    fastrm.pretrain("digits", out=out, export=("timm", "safetensors"), **SMALL)
    with torch.no_grad():
        again = fastrm.load(out / "export" / "safetensors.safetensors")(images)
        torch.testing.assert_close(again, result.student(images), rtol=0, atol=1e-5)
    capsys.readouterr()
    fastrm.pretrain("digits", out=out, export=("safetensors", "timm"), **SMALL)
    assert "holds this run, complete" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("few_digits")
def test_a_new_run_removes_the_exports_of_an_old_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    fastrm.pretrain("digits", out=out, export=("timm", "safetensors"), **SMALL)
    (out / "export" / "mine.txt").write_text("mine")
    fastrm.pretrain("digits", out=out, resume="never", **SMALL)
    assert [path.name for path in (out / "export").rglob("*")] == ["mine.txt"]


@pytest.mark.usefixtures("few_digits")
def test_an_impossible_export_is_reported_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**SMALL, "stem": "small", "out": tmp_path / "run"}
    for kind, says in (("timm", "small stem"), ("mmdet", "resnet18, resnet34")):
        with pytest.raises(UsageError, match=f"--export {kind}: .*{says}"):
            fastrm.pretrain("digits", export=("safetensors", kind), **small)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"--export transformers: .* needs the package transformers"):
        fastrm.pretrain("digits", export=("transformers",), **small)
    assert not list(tmp_path.rglob("*.*"))
    theirs = tmp_path / "run" / "export" / "safetensors.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(UsageError, match=r"--export .*safetensors\.safetensors is there and not an export"):
        fastrm.pretrain("digits", export=("safetensors",), **small)
    assert [path for path in tmp_path.rglob("*.*") if path.is_file()] == [theirs]


@pytest.mark.usefixtures("few_digits")
def test_an_export_that_fails_at_the_end_leaves_the_complete_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = TARGETS["timm"].write, []

    def once(subject: Any, staged: Path) -> None:
        true(subject, staged)
        calls.append(staged)
        if len(calls) == 2:
            (staged / "model.safetensors").write_bytes(b"")

    monkeypatch.setitem(TARGETS, "timm", TARGETS["timm"]._replace(write=once))  # type: ignore[index]
    with pytest.raises(
        TrainingError, match=r"--export timm: timm cannot load .*; the run is complete, with its weights"
    ):
        fastrm.pretrain("digits", out=tmp_path / "run", export=("timm",), **SMALL)
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "export").exists()


def test_exports_are_checked_on_the_images_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, photo = tmp_path / "it.safetensors", tmp_path / "photo.png"
    backbone_in(path, "test_resnet", data=str(tmp_path / "gone"))
    Image.radial_gradient("L").convert("RGB").save(photo)
    write(path, "safetensors", tmp_path / "out.safetensors", "--images", str(photo))
    assert re.search(r"fastrm \S+ loads it: .* on 1 images from --images", capsys.readouterr().out)
    write(path, "safetensors", tmp_path / "out.safetensors")
    assert "on 8 made images, with the spectrum of photographs" in capsys.readouterr().out
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    said = fails(lambda _: write(path, "timm", tmp_path / "out", "--images", str(photo), str(broken)), [], capsys)
    assert f"--images {broken} cannot be used: cannot identify image file" in said
    assert not (tmp_path / "out").exists()


def test_synthetic_images_have_the_spectrum_of_photographs(tmp_path: Path) -> None:
    from fastrm.exports.check import made

    class Found:
        image_size, backbone = 64, build_backbone("test_resnet", image_size=64, channels=5)

    images = made(Found()).images  # type: ignore[arg-type]
    assert images.shape == (8, 5, 64, 64)
    torch.testing.assert_close(images.std(dim=(2, 3)), torch.ones(8, 5))
    power = np.abs(np.fft.fft(images.numpy(), axis=3)).reshape(-1, 64).mean(axis=0)
    assert 3 < power[2] / power[16] < 16
