"""Networks for images with other bands than RGB: their weights in files, and how files describe the pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastrm
from fastrm import evaluate, export
from fastrm.data import eval_loader, open_source
from fastrm.data.formats import RGB, PixelFormat
from fastrm.data.settling import formatted
from fastrm.errors import UsageError
from fastrm.methods import build_method
from fastrm.models import build_backbone
from fastrm.models.weights import adapted, load_weights, metadata, write_backbone
from fastrm.pretrained import read_pretrained
from fastrm.probes.finetune import fraction_of
from fastrm.run import checkpoint
from fastrm.settings.config import Config

Small = Callable[..., Config]
BANDS = 8
SCENES = PixelFormat(
    channels=BANDS,
    limits={
        "uint16": (tuple(100.0 * band for band in range(BANDS)), tuple(9000.0 + band for band in range(BANDS))),
        "float32": ((0.0,), (1.5,)),
    },
    mean=tuple(0.3 + 0.01 * band for band in range(BANDS)),
    std=tuple(0.2 + 0.01 * band for band in range(BANDS)),
)
ARCHS = {
    "small": {"arch": "test_resnet", "stem": "small"},
    "resnet": {"arch": "test_resnet", "stem": "imagenet"},
    "convnext": {"arch": "test_convnext"},
    "vit": {"arch": "test_vit"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A function from a name in ARCHS to the run folder of an untrained network for 8 bands, and its two backbones."""
    made: dict[str, tuple[Path, Any]] = {}

    def of(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            config = fastrm.settings.config.build(
                **{"data": "scenes", "image_size": 32, "batch_size": 4, "hidden_dim": 16, "output_dim": 8},
                **{"predictor_hidden_dim": 16, **ARCHS[name]},
            )
            torch.manual_seed(len(made))
            method = build_method(config, channels=BANDS)
            with torch.no_grad():
                for parameter in method.teacher.parameters():
                    parameter.add_(0.01)
            write_checkpoint(folder, config, method.state_dict(), pixels=SCENES.plain())
            made[name] = folder, {"student": method.student.backbone, "teacher": method.teacher.backbone}
        return made[name]

    return of


def write_checkpoint(folder: Path, config: Config, tensors: dict[str, Tensor], **more: Any) -> None:
    """Write a checkpoint of one step with these settings and tensors."""
    state: dict[str, Any] = {"format": checkpoint.FORMAT, "config": config.flat(), "step": 1, "random": [{}], **more}
    state["method"] = tensors
    torch.save({**state, "checksum": checkpoint.checksum(state)}, folder / "checkpoint.pt")


def images(channels: int = BANDS, size: int = 32) -> Tensor:
    """Random images float32 [3, channels, size, size]."""
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(network: nn.Module) -> Tensor:
    """Features [3, D] of a network on the random images."""
    found: Tensor = network.eval()(images())
    assert found.std() > 1e-3
    return found


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("name", list(ARCHS))
def test_a_run_on_eight_bands_is_loaded(name: str, which: str, checkpoints: Callable[[str], tuple[Path, Any]]) -> None:
    run, networks = checkpoints(name)
    model = fastrm.load(run, which)
    assert model.channels == BANDS
    torch.testing.assert_close(features(model), features(networks[which]))
    trained = read_pretrained(run)
    assert trained.pixels == SCENES
    assert trained.untrained()(images()).shape == (3, model.dim)
    method = trained.method(torch.device("cpu"))
    torch.testing.assert_close(features(method.teacher.backbone), features(networks["teacher"]))


@pytest.mark.parametrize(
    ("name", "kind", "out"),
    [
        ("resnet", "timm", "folder"),
        ("resnet", "timm", "it.safetensors"),
        ("resnet", "safetensors", "it.safetensors"),
        ("small", "safetensors", "it.safetensors"),
        pytest.param("small", "onnx", "it.onnx", marks=pytest.mark.slow),
        ("convnext", "timm", "folder"),
        ("vit", "timm", "folder"),
        ("vit", "timm", "it.pth"),
    ],
)
def test_weights_of_eight_bands_survive_export_and_loading(
    name: str, kind: str, out: str, checkpoints: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    run, networks = checkpoints(name)
    path = tmp_path / out
    card = export.export(export.ExportConfig(run=run, format=kind, which="teacher", out=path)).read_text()  # type: ignore[arg-type]
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path))
        got = torch.from_numpy(session.run(["features"], {"images": images().numpy()})[0])
        about = session.get_modelmeta().custom_metadata_map
    elif kind == "timm":
        # Run the code of the card, with the full path of the file.
        (line,) = re.findall(r"^timm\.create_model\(.*\)$", card, re.MULTILINE)
        network = eval(line.replace(f'"{out}"', f'"{path}"').replace(f":{out}", f":{path}"), {"timm": timm})
        got = features(network)
        if out == "folder":
            settings = timm.data.resolve_model_data_config(network)
            assert tuple(settings["input_size"]) == (BANDS, 32, 32)
            assert (tuple(settings["mean"]), tuple(settings["std"])) == (SCENES.mean, SCENES.std)
            config = json.loads((path / "config.json").read_text())  # older versions of timm read this file
            assert config["pretrained_cfg"]["input_size"] == [BANDS, 32, 32]
            assert "first_conv" not in config["pretrained_cfg"]
            path = path / "model.safetensors"
    else:
        loaded = read_pretrained(path)
        assert loaded.pixels == SCENES
        got = features(loaded.networks["teacher"])
    torch.testing.assert_close(got, features(networks["teacher"]), rtol=1e-4, atol=1e-5)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            about = file.metadata()
    if path.suffix != ".pth":
        assert json.loads(about["channels"]) == BANDS
        assert json.loads(about["mean"]) == list(SCENES.mean)
        assert json.loads(about["limits"])["uint16"][1] == [9000.0 + band for band in range(BANDS)]


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_the_code_of_the_card_prepares_an_image(
    dtype: str, checkpoints: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    run, _ = checkpoints("resnet")
    out = tmp_path / "it.safetensors"
    card = export.export(export.ExportConfig(run=run, format="safetensors", out=out)).read_text()
    assert f"**Images:** {BANDS} channels in [0, 1], 32x32 pixels" in card
    code = next(block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "def " in block)
    names: dict[str, Any] = {"numpy": np, "torch": torch}
    exec(code, names)
    rng = np.random.default_rng(0)
    values = (rng.uniform(0, 1, (32, 32, BANDS)) * (65535 if dtype == "uint16" else 2)).astype(dtype)
    got = names["prepared"](values)
    low, high = (np.array(limit) for limit in SCENES.limits[dtype])
    want = ((values.astype(np.float64) - low) / (high - low) - SCENES.mean) / SCENES.std
    assert (got.dtype, got.shape) == (torch.float32, (1, BANDS, 32, 32))
    np.testing.assert_allclose(got[0], want.transpose(2, 0, 1), atol=1e-5)


def test_the_card_of_an_rgb_network_states_mean_and_std(tmp_path: Path, small: Small) -> None:
    path = tmp_path / "it.safetensors"
    backbone = build_backbone("test_resnet", image_size=32, stem="imagenet")
    write_backbone(path, backbone, metadata(small().flat(), "student"))
    out = tmp_path / "out.safetensors"
    said = export.export(export.ExportConfig(run=path, format="safetensors", out=out)).read_text()
    assert "**Images:** RGB in [0, 1], 32x32 pixels, less the mean [0.485, 0.456, 0.406], divided by [0.229, " in said


def test_export_to_torchvision_refuses_eight_bands(
    checkpoints: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "backbone.safetensors"
    about = {
        "which": "student",
        "arch": "resnet18",
        "stem": "imagenet",
        "image_size": "32",
        "method": "byol",
        "data": "x",
    }
    texts = {name: json.dumps(value) for name, value in SCENES.plain().items()}
    backbone = build_backbone("resnet18", image_size=32, stem="imagenet", channels=BANDS)
    write_backbone(path, backbone, {**about, "fastrm": "1", **texts})
    with pytest.raises(
        UsageError, match=r"torchvision holds .* 3 channels only, and resnet18 takes 8; safetensors and"
    ):
        export.export(export.ExportConfig(run=path, format="torchvision", out=tmp_path / "it.pth"))
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_older_versions_are_read_as_rgb(tmp_path: Path, small: Small) -> None:
    config = small()
    method = build_method(config)
    write_checkpoint(tmp_path, config, method.state_dict())
    about = metadata(config.flat(), "student")
    old = {name: value for name, value in about.items() if name in ("mean", "std") or name not in RGB.plain()}
    write_backbone(tmp_path / "old.safetensors", method.student.backbone, old)
    for path in (tmp_path, tmp_path / "old.safetensors"):
        trained = read_pretrained(path)
        assert trained.pixels == RGB
        assert trained.networks["student"].channels == 3
    for name, value in (("channels", "many"), ("limits", "[1]"), ("mean", "3")):
        write_backbone(tmp_path / "odd.safetensors", method.student.backbone, {**about, name: value})
        with pytest.raises(UsageError, match=r"odd\.safetensors has an invalid description of its pixels"):
            fastrm.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize("arch", ["test_resnet", "test_convnext", "test_vit", "resnet10t", "repvgg_a0"])
def test_weights_of_rgb_are_adapted_as_timm_does(arch: str, channels: int, tmp_path: Path) -> None:
    """The adapted weights equal those that timm loads from the same file; RepVGG has two first layers."""
    backbone = build_backbone(arch, image_size=32, stem="imagenet", channels=channels)
    size = {name: value for name, value in backbone.options.items() if name != "in_chans"}
    rgb = timm.create_model(arch, num_classes=0, **size)
    path = tmp_path / "rgb.safetensors"
    save_file(rgb.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 0, "custom_load": False, "input_size": (3, 32, 32)}
    theirs = timm.create_model(
        arch, pretrained=True, num_classes=0, in_chans=channels, pretrained_cfg_overlay=overlay, **size
    )
    state, said = adapted(backbone, load_file(path), source="--init-from it")
    assert said == f"first layer adapted from 3 to {channels} channels"
    assert load_weights(backbone, state, source="--init-from it") == []
    want, got = theirs.state_dict(), backbone.net.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in want.items())
    assert any(value.shape != rgb.state_dict()[name].shape for name, value in want.items())


def test_a_first_layer_that_timm_does_not_know_is_adapted(tmp_path: Path) -> None:
    """The first layers of a small stem and of a module, which timm cannot adapt, are adapted by timm's rule."""

    def module(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    pairs = [
        [build_backbone(module(channels), image_size=32) for channels in (3, 8)],
        [build_backbone("resnet10t", image_size=32, channels=channels) for channels in (3, 8)],
    ]
    for rgb, other in pairs:
        state, said = adapted(other, rgb.net.state_dict(), source="it")
        assert said == "first layer adapted from 3 to 8 channels"
        load_weights(other, state, source="it")
        first = next(iter(rgb.net.state_dict().values()))
        want = np.concatenate([first.numpy()] * 3, axis=1)[:, :8] * (3 / 8)
        np.testing.assert_allclose(next(iter(other.net.state_dict().values())), want, rtol=1e-6)


def test_a_method_starts_from_rgb_weights_and_notes_the_adaptation(small: Small, tmp_path: Path) -> None:
    rgb = build_backbone("test_resnet", image_size=32, stem="imagenet")
    moco = {"module.encoder_q." + name: value for name, value in rgb.net.state_dict().items()}
    path = tmp_path / "moco.pth.tar"
    torch.save({"state_dict": moco}, path)
    method = build_method(small(init_from=path), channels=BANDS)
    assert method.notes[-1].endswith("moco.pth.tar; first layer adapted from 3 to 8 channels")
    first = rgb.net.state_dict()["conv1.0.weight"]
    for network in (method.student, method.teacher):
        weight = network.backbone.net.conv1[0].weight.detach()
        torch.testing.assert_close(weight, first[:, [0, 1, 2] * 2 + [0, 1]] * 3 / 8)
    method = build_method(small(init_from=path))
    assert "channels" not in method.notes[-1]


def test_weights_of_eight_bands_are_not_adapted(small: Small, checkpoints: Callable[[str], tuple[Path, Any]]) -> None:
    folder, networks = checkpoints("resnet")
    run = folder / "checkpoint.pt"
    same = build_method(small(init_from=run), channels=BANDS)
    torch.testing.assert_close(features(same.teacher.backbone), features(networks["student"]))
    assert "adapted" not in same.notes[-1]
    for channels in (3, 4):
        says = rf"its first layer \(conv1\.0\.weight\) takes 8 channels, and the images have {channels}"
        with pytest.raises(UsageError, match=says):
            build_method(small(init_from=run), channels=channels)


def pretrain(data: Any, out: Path, **settings: Any) -> Any:
    quick: dict[str, Any] = {
        "arch": "test_vit", "image_size": 32, "batch_size": 8, "epochs": 1, "max_steps": 1, "workers": 0,
        "hidden_dim": 16, "output_dim": 8, "predictor_hidden_dim": 16, "eval_every": 0, "device": "cpu",
    }  # fmt: skip
    return fastrm.pretrain(data, out=out, **{**quick, **settings})


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A folder of 24 uint16 TIFFs of 32x32 pixels and 8 bands, in two classes."""
    tifffile = pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "scenes" / f"{number % 2}" / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 3000, (32, 32, BANDS)) + 900 * (number % 2)
        tifffile.imwrite(path, values.astype(np.uint16), photometric="minisblack", planarconfig="contig")
    return tmp_path / "scenes"


def test_a_run_on_files_of_eight_bands(scenes: Path, tmp_path: Path) -> None:
    """A run trains and is scored, and the code of the card prepares the same pixels as an evaluation."""
    out = tmp_path / "run"
    pretrain(str(scenes), out)
    trained = read_pretrained(out / "backbone.safetensors")
    assert trained.pixels.channels == BANDS
    assert trained.pixels == read_pretrained(out).pixels
    asked: dict[str, Any] = {"knn": True, "gap": True, "neighbours": tmp_path / "near.png"}
    scores = evaluate.evaluate(evaluate.EvaluateConfig(run=out, workers=0, device="cpu", **asked))["scenes"]
    assert scores["scores"].keys() == {"student", "teacher", "random", "pixels"}
    assert scores["left_out"] == 0
    path = tmp_path / "it.safetensors"
    card = export.export(export.ExportConfig(run=out, format="safetensors", out=path)).read_text()
    names: dict[str, Any] = {"numpy": np, "torch": torch}
    exec(next(block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "def " in block), names)
    source = formatted(open_source(str(scenes)), trained.pixels)
    assert source.bank is not None
    assert fraction_of(source.bank, 0.5).format == trained.pixels
    seen = torch.cat([batch.views[0] for batch in eval_loader(source.train, image_size=32, batch_size=8, workers=0)])
    for index in range(len(source.train)):
        want = names["prepared"](source.train.values(index))
        torch.testing.assert_close(seen[index : index + 1], want, rtol=1e-4, atol=1e-4)


def five(image: Any) -> tuple[Tensor, Tensor]:
    """Two float32 views [5, 32, 32] of a PIL image."""
    view = torch.from_numpy(np.array(image.resize((32, 32)), dtype=np.float32)).permute(2, 0, 1)[[0, 1, 2, 0, 1]] / 255
    return view, view.flip(-1)


def test_an_augmentation_may_make_views_of_other_channels(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    result = pretrain(pictures, tmp_path / "run", augmentation=five)
    assert result.student(images(5)).shape == (3, result.student.dim)
    again = pretrain(pictures, tmp_path / "run", augmentation=five, max_steps=2)  # the run continues
    with torch.no_grad():
        torch.testing.assert_close(fastrm.load(tmp_path / "run")(images(5)), again.student(images(5)))
    out = tmp_path / "it.safetensors"
    card = export.export(export.ExportConfig(run=tmp_path / "run", format="safetensors", out=out)).read_text()
    assert "5 channels, 32x32 pixels, as the run's own augmentation made them" in card
    with pytest.raises(UsageError, match="was trained on views of 5 channels, which a callable made"):
        evaluate.evaluate(evaluate.EvaluateConfig(run=out, knn=True, data="digits", workers=0, device="cpu"))


@pytest.mark.usefixtures("few_digits")
def test_a_network_of_other_channels_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(5, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="--arch Sequential takes images of 5 channels, and the views have 3"):
        pretrain("digits", out, arch=module)
    with pytest.raises(UsageError, match=r"takes images of 5 channels, and the images of an evaluation \(.*\) have 3"):
        pretrain("digits", out, arch=module, augmentation=five, eval_every=1)
    assert not out.exists()
    pretrain("digits", out, arch=module, augmentation=five)
