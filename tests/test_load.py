"""fastrm.load: runs and exports are loaded in one call, ready to use."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import fastrm
from fastrm import evaluate, export, train
from fastrm.embed import EmbedConfig
from fastrm.errors import UsageError
from fastrm.evaluate import EvaluateConfig
from fastrm.models import Backbone, build_backbone, module_name
from fastrm.models.weights import metadata, write_backbone
from fastrm.pretrained import Pretrained
from fastrm.run import checkpoint
from fastrm.settings.config import Config
from tests.conftest import run_of_one_step

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of_one_step("test_resnet", 32, tmp_path_factory.mktemp("runs") / "it")


def held(run: Path, which: str) -> dict[str, Tensor]:
    """The tensors of the student's or teacher's network in the checkpoint of a run."""
    prefix = f"{which}.backbone.net."
    tensors = checkpoint.load(run)["method"]
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_run_its_checkpoint_and_its_exports_load_as_the_same_network(which: str, run: Path, tmp_path: Path) -> None:
    model = fastrm.load(str(run), which)
    assert isinstance(model, Backbone)
    assert not any(part.training for part in model.modules())
    want = held(run, which)
    assert all(torch.equal(value, want[name]) for name, value in model.net.state_dict().items())
    with torch.no_grad():
        pooled, features = model(IMAGES), model.forward_features(IMAGES)
    assert pooled.shape == (3, model.dim)
    torch.testing.assert_close(pooled, features.mean(dim=(2, 3)))
    files = [run / "checkpoint.pt"]
    out = tmp_path / "it.safetensors"
    export.export(export.ExportConfig(checkpoint=run, format="safetensors", which=which, out=out))
    files.append(out)
    if which == "student":
        files.append(run / "backbone.safetensors")
    for file in files:
        with torch.no_grad():
            assert torch.equal(fastrm.load(file, which=which)(IMAGES), pooled), file


def test_a_pth_file_describes_its_network(small: Callable[..., Config], tmp_path: Path) -> None:
    made = tmp_path / "run"
    train.train(small(max_steps=1, batch_size=4, out=made))
    out = tmp_path / "it.pth"
    export.export(export.ExportConfig(checkpoint=made, format="timm", which="teacher", out=out))
    want = held(made, "teacher")
    assert all(torch.equal(value, want[name]) for name, value in fastrm.load(out, "teacher").net.state_dict().items())


def test_files_that_cannot_be_loaded_are_reported(run: Path, tmp_path: Path) -> None:
    for path, which, says in (
        (run / "backbone.safetensors", "teacher", "which='teacher': .* holds the student only"),
        (run, "both", "--which both is unknown; choose one of student, teacher"),
        (tmp_path / "gone", "student", "gone does not exist"),
        (tmp_path, "student", "has no checkpoint.pt"),
        (tmp_path / "gone.safetensors", "student", "does not exist"),
    ):
        with pytest.raises(UsageError, match=says):
            fastrm.load(path, which=which)
    torch.save({"state_dict": {"x": torch.ones(2)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "theirs.pth")
    with pytest.raises(UsageError, match=r"only plain data is read; weights of other programs need --arch"):
        fastrm.load(tmp_path / "theirs.pth")
    with pytest.raises(UsageError, match=r"is a folder with none of backbone.safetensors, model.safetensors"):
        fastrm.load(tmp_path, arch="test_resnet")
    with pytest.raises(UsageError, match=r"is of timm's test_resnet; arch=Linear must be left out"):
        fastrm.load(run, arch=nn.Linear(2, 2))


def test_loading_does_not_change_the_random_state(run: Path) -> None:
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    fastrm.load(run)
    np.testing.assert_array_equal(torch.rand(2), want)


def test_a_run_of_an_unknown_method_is_loaded(run: Path, tmp_path: Path) -> None:
    """Backbones need no method: they can be loaded and exported. The gap needs it, and is refused."""
    state = checkpoint.load(run)
    state["config"]["method"] = "of-my-own"
    state["method"] = {name: value for name, value in state["method"].items() if ".projector." not in name}
    state["checksum"] = checkpoint.checksum(state)
    own = tmp_path / "own"
    own.mkdir()
    torch.save(state, own / "checkpoint.pt")
    with torch.no_grad():
        assert torch.equal(fastrm.load(own)(IMAGES), fastrm.load(run)(IMAGES))
    out = tmp_path / "it.safetensors"
    card = export.export(export.ExportConfig(checkpoint=own, format="safetensors", out=out))
    assert "student of of-my-own" in card.read_text()
    with pytest.raises(UsageError, match="--method of-my-own is unknown"):
        evaluate.evaluate(evaluate.EvaluateConfig(checkpoint=own, gap=True, workers=0, device="cpu"))


@pytest.mark.parametrize(
    ("asked", "opened"),
    [
        ({}, ("photos.csv", "/sets", "path", "kind")),
        ({"label_column": "species"}, ("photos.csv", "/sets", "path", "species")),
        ({"data": "other.csv"}, ("other.csv", "/sets", None, None)),
        ({"data": "other.csv", "image_column": "file"}, ("other.csv", "/sets", "file", None)),
        ({"data_root": Path("/mine")}, ("photos.csv", Path("/mine"), "path", "kind")),
    ],
)
def test_without_data_the_images_of_the_run_are_used(
    asked: dict[str, Any], opened: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The column settings of the run are used only with the data of the run."""
    settings = {"data": "photos.csv", "data_root": "/sets", "image_column": "path", "label_column": "kind"}
    trained = Pretrained(path=Path(), networks={}, about={"data": "photos.csv"}, arch="x", settings=settings)
    monkeypatch.setattr(
        "fastrm.pretrained.open_source",
        lambda data, root, *, image_column, label_column: (data, root, image_column, label_column),
    )
    for options in (EvaluateConfig(**asked), EmbedConfig(out=Path("f.npy"), **asked)):
        assert trained.images(options) == opened
    with pytest.raises(UsageError, match="--data is missing"):
        replace(trained, about={}, settings=None).images(EvaluateConfig())


def own() -> nn.Sequential:
    """A small network that returns a feature map [B, 8, h, w]."""
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2))


# By architecture, a function of the network and images to the pooled features and the feature map.
OUTPUTS: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "test_resnet": lambda net, x: (net.forward_features(x).mean((2, 3)), net.forward_features(x)),
    "test_convnext": lambda net, x: (net(x), net.stages(net.stem(x))),
    "test_vit": lambda net, x: (net(x), net.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (6, 6))),
    "own": lambda net, x: (net(x).mean((2, 3)), net(x)),
}


@pytest.mark.parametrize("arch", OUTPUTS)
def test_pooled_and_dense_outputs_equal_those_of_timm(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sized = {"img_size": 96} if arch == "test_vit" else {}
    net = own() if arch == "own" else timm.create_model(arch, num_classes=0, **sized)
    for part in net.modules():
        if isinstance(part, nn.LayerNorm):  # random weights show if the norm is applied twice
            nn.init.normal_(part.weight)
    made = build_backbone(net if arch == "own" else arch, image_size=96)
    made.net.load_state_dict(net.state_dict())
    known = {"arch": module_name(net) if arch == "own" else arch, "stem": "auto", "image_size": 96, "method": ""}
    write_backbone(tmp_path / "it.safetensors", made, metadata({**known, "data": ""}, "student"))
    model = fastrm.load(tmp_path / "it.safetensors", arch=own() if arch == "own" else None)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        pooled, features = OUTPUTS[arch](net.eval(), images)
        torch.testing.assert_close(model(images), pooled)
        torch.testing.assert_close(model.feature_map(images), features)


def test_a_network_without_a_map_is_refused(tmp_path: Path) -> None:
    images = torch.randn(1, 3, 32, 32)
    module = nn.Sequential(*own(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UsageError, match=r"Sequential has no map \[B, D, h, w\]"):
        build_backbone(module, image_size=32).feature_map(images)
    hiera = timm.models.hiera.Hiera(img_size=(32, 32), embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), num_classes=0)
    with pytest.raises(UsageError, match="Hiera has no map"):
        build_backbone(hiera, image_size=32).feature_map(images)
