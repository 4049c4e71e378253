"""Exports give the same features in other libraries, and a run can start from the weights that others publish."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import zoo
from fastrm import evaluate, export, train
from fastrm.errors import UsageError
from fastrm.models import build_backbone, read_backbone
from fastrm.models.weights import load_weights
from fastrm.pretrained import open_pretrained
from fastrm.run import checkpoint
from fastrm.settings.config import Config
from tests.conftest import leave_few_digits, run_of_one_step
from tests.test_cli import fails

Small = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one step for each of four networks; "test_resnet" also has an evaluation."""
    sizes = {"resnet18": 96, "test_vit": 160, "test_resnet": 32, "test_convnext": 32}
    found = {arch: run_of_one_step(arch, size, tmp_path_factory.mktemp(arch)) for arch, size in sizes.items()}
    with pytest.MonkeyPatch.context() as patch:
        leave_few_digits(patch)
        evaluate.main(["--checkpoint", str(found["test_resnet"]), "--linear-quick", "--workers", "0"])
    return found


def wanted(run: Path, which: str, images: Tensor) -> Tensor:
    """Features [N, D] of the student or teacher, computed from the tensors of the checkpoint."""
    state = checkpoint.load(run)
    config = state["config"]
    backbone = build_backbone(config["arch"], image_size=config["image_size"], stem=config["stem"])
    prefix = f"{which}.backbone."
    own = {name.removeprefix(prefix): value for name, value in state["method"].items() if name.startswith(prefix)}
    backbone.load_state_dict(own)
    with torch.no_grad():
        return backbone.eval()(images)


def write(run: Path, kind: str, which: str, out: Path) -> Path:
    """Export the student or teacher of a run to ``out``."""
    export.main(["--checkpoint", str(run), "--format", kind, "--which", which, "--out", str(out)])
    return out


# Each network and format runs with the student or the teacher in the quick tests, and with the other in the slow ones.
@pytest.mark.parametrize(
    ("arch", "kind", "name", "which"),
    [
        pytest.param(*case, which, marks=() if which == by_day else pytest.mark.slow)
        for *case, by_day in (
            ("resnet18", "timm", "it.safetensors", "student"),
            ("resnet18", "timm", "it.pth", None),
            ("resnet18", "timm", "folder", "teacher"),
            ("resnet18", "torchvision", "it.pth", "teacher"),
            ("resnet18", "torchvision", "it.safetensors", "student"),
            ("resnet18", "safetensors", "it.safetensors", None),
            ("resnet18", "onnx", "it.onnx", None),
            ("test_vit", "timm", "folder", "student"),
            ("test_vit", "timm", "it.safetensors", "teacher"),
            ("test_resnet", "safetensors", "it.safetensors", "student"),
            ("test_resnet", "onnx", "it.onnx", "teacher"),
            # A norm of its backbone has the name head.norm.
            ("test_convnext", "timm", "folder", "teacher"),
            ("test_convnext", "safetensors", "it.safetensors", "student"),
        )
        for which in ("student", "teacher")
    ],
)
def test_other_libraries_load_an_export_and_give_the_same_features(
    arch: str, kind: str, name: str, which: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = runs[arch]
    out = write(run, kind, which, tmp_path / name)
    size = checkpoint.load(run)["config"]["image_size"]
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    want = wanted(run, which, images)
    assert want.std() > 1e-3
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(out))
        got = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
        about = session.get_modelmeta().custom_metadata_map
    else:
        if kind == "timm" and name == "folder":
            network = timm.create_model(f"local-dir:{out}", pretrained=True)
            settings = timm.data.resolve_model_data_config(network)
            assert [*settings["input_size"], *settings["mean"]] == [3, size, size, 0.485, 0.456, 0.406]
            about = None
        elif kind == "timm":
            network = timm.create_model(arch, num_classes=0, checkpoint_path=str(out))
        elif kind == "torchvision":
            network = torchvision.models.get_model(arch)
            network.fc = torch.nn.Identity()
            network.load_state_dict(torch.load(out, weights_only=True) if out.suffix == ".pth" else load_file(out))
        else:
            backbone, _ = read_backbone(out)
            network = backbone.net
        with torch.no_grad():
            got = network.eval()(images)
        if out.suffix == ".safetensors":
            with safe_open(out, "pt") as file:
                about = file.metadata()
        else:
            about = None
    np.testing.assert_allclose(got, want, atol=1e-5)
    if about is not None:
        assert about["which"] == which
        assert int(about["image_size"]) == size
        assert json.loads(about["std"]) == [0.229, 0.224, 0.225]
    card = (out / "README.md" if out.is_dir() else out.with_name(f"{out.name}.md")).read_text()
    assert f"# {arch}, {which} of mocov3" in card
    assert "| lr | 0.6 |" in card
    assert "has the weight 0.1." in card
    assert "## Licence\n\nThe weights are yours" in card


def test_a_card_has_the_scores_of_the_evaluation(runs: dict[str, Path], tmp_path: Path) -> None:
    out = write(runs["test_resnet"], "safetensors", "teacher", tmp_path / "it.safetensors")
    found = json.loads((runs["test_resnet"] / "evaluation.json").read_text())["sets"]["digits"]["scores"]
    card = out.with_name(f"{out.name}.md").read_text()
    assert "| digits, % right | linear_quick |" in card
    for title, network in {"teacher": "teacher", "student": "student", "untrained network": "random"}.items():
        score = found[network]["linear_quick"]
        low, high = score["interval"]
        assert f"| {title} | {100 * score['value']:.2f} ±{50 * (high - low):.2f} |" in card


def test_a_card_has_the_scores_of_the_summary_only_for_its_step(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs["test_resnet"], folder)
    step = checkpoint.load(folder)["step"]
    (folder / "evaluation.json").unlink()
    for at in (step, step + 1):
        summary = {"step": at, "knn_student": 0.625, "knn_untrained": 0.5, "knn_above_start": {}}
        summary["knn_intervals"] = {"student": [0.6, 0.65], "untrained": [0.4, 0.6]}
        (folder / "summary.json").write_text(json.dumps(summary))
        out = write(folder, "safetensors", "student", tmp_path / "it.safetensors")
        card = out.with_name(f"{out.name}.md").read_text()
        assert ("| at the end of the run, % right | kNN, k = 20 |" in card) == (at == step)
        assert ("| student | 62.50 ±2.50 |" in card) == ("| untrained network | 50.00 ±10.00 |" in card) == (at == step)


@pytest.mark.usefixtures("few_digits")
def test_an_exported_backbone_has_the_scores_of_its_run(runs: dict[str, Path], tmp_path: Path) -> None:
    out = write(runs["test_resnet"], "safetensors", "teacher", tmp_path / "it.safetensors")
    arguments = ["--linear-quick", "--workers", "0"]
    evaluate.main(["--checkpoint", str(out), *arguments])
    ours = json.loads((tmp_path / "evaluation.json").read_text())["sets"]["digits"]["scores"]
    theirs = json.loads((runs["test_resnet"] / "evaluation.json").read_text())["sets"]["digits"]["scores"]
    assert ours == {name: theirs[name] for name in ("teacher", "random", "pixels")}


def test_no_file_of_weights_has_the_folder_of_the_images(
    small: Small, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, place = tmp_path / "run", str(pictures)
    monkeypatch.chdir(tmp_path)
    train.train(small(data=str(pictures / "split"), max_steps=1, out=run))
    formats = {"safetensors": "it.safetensors", "timm": "it.pth", "transformers": "folder"}
    for kind, name in formats.items():
        write(run, kind, "student", tmp_path / name)
    files = [run / "backbone.safetensors", *tmp_path.glob("it.*"), *(tmp_path / "folder").iterdir()]
    assert len(files) == 1 + 2 * 2 + 3
    assert not [path for path in files if place.encode() in path.read_bytes()]
    # The run itself finds its images; a file has only their name, also where another folder has that name.
    asked = ["--knn", "--workers", "0"]
    evaluate.main([str(run), *asked])
    Path("split").mkdir()
    capsys.readouterr()
    said = fails(evaluate.main, ["it.safetensors", *asked], capsys)
    assert "--data is missing; it.safetensors has the name of its images, split, and not their folder" in said
    evaluate.main(["it.safetensors", *asked, "--data", str(pictures / "split")])


@pytest.mark.parametrize(
    ("arch", "arguments", "says"),
    [
        ("test_resnet", ["--format", "timm", "--out", "deep/folder"], ["timm's test_resnet cannot hold", "small stem"]),
        ("test_resnet", ["--format", "torchvision", "--out", "a.pth"], ["holds ResNets only", "test_resnet"]),
        ("test_vit", ["--format", "torchvision", "--out", "a.pth"], ["holds ResNets only", "test_vit"]),
        ("resnet18", ["--format", "onnx", "--out", "a.pth"], ["--out a.pth must end in .onnx"]),
        ("resnet18", ["--format", "safetensors", "--out", "a"], ["--out a must end in .safetensors"]),
        ("resnet18", ["--format", "keras", "--out", "a.h5"], ["--format", "keras"]),
        ("resnet18", ["--format", "timm"], ["--out"]),
        ("resnet18", ["--format", "timm", "--out", "file/a.safetensors"], ["--out file/a.safetensors cannot be"]),
    ],
)
def test_an_impossible_export_is_reported_and_writes_nothing(
    arch: str,
    arguments: list[str],
    says: list[str],
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    said = fails(export.main, ["--checkpoint", str(runs[arch]), *arguments], capsys)
    assert all(part in said for part in says), said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_without_metadata_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.ones(2)}, plain)
    with pytest.raises(UsageError, match="does not say which network"):
        open_pretrained(plain, CPU)
    plain.write_bytes(b"no safetensors")
    with pytest.raises(UsageError, match="cannot be read as safetensors"):
        open_pretrained(plain, CPU)
    out = write(runs["test_resnet"], "safetensors", "teacher", tmp_path / "it.safetensors")
    with pytest.raises(UsageError, match="--which student"):
        write(out, "safetensors", "student", tmp_path / "other.safetensors")


def official(layout: str) -> tuple[dict[str, object], dict[str, Tensor], str]:
    """A checkpoint in a published layout, the weights of its backbone, and timm's name of the backbone."""
    torch.manual_seed(7)
    if layout == "mocov3-vit":
        arch, prefix = "test_vit", "module.base_encoder."
        network = timm.create_model(arch, num_classes=0, img_size=160)
        head = {f"head.{i}.weight": torch.randn(4, 4) for i in (0, 3, 6)}
    else:
        arch, prefix = "resnet18", {"moco": "module.encoder_q.", "mocov3": "module.base_encoder.", "plain": ""}[layout]
        network = torchvision.models.resnet18()
        network.fc = torch.nn.Identity()
        head = {"fc.0.weight": torch.randn(4, 4), "fc.2.weight": torch.randn(4, 4)}
    weights = {
        name: value + 0.01 if value.is_floating_point() else value for name, value in network.state_dict().items()
    }
    state: dict[str, object] = {prefix + name: value for name, value in {**weights, **head}.items()}
    if layout == "plain":
        return state, weights, arch
    other = {"moco": "module.encoder_k.", "mocov3": "module.momentum_encoder."}.get(layout, "module.momentum_encoder.")
    state |= {other + name: torch.zeros_like(value) for name, value in weights.items()}
    state |= {"module.queue": torch.randn(8, 16), "module.predictor.0.weight": torch.randn(2, 2)}
    return {"epoch": 100, "arch": arch, "state_dict": state, "optimizer": {"state": {}}}, weights, arch


@pytest.mark.parametrize(
    "layout", ["mocov3", "mocov3-vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("moco", "plain"))]
)
def test_a_run_starts_from_published_weights(layout: str, small: Small, tmp_path: Path) -> None:
    state, weights, arch = official(layout)
    path = tmp_path / "published.pth.tar"
    torch.save(state, path)
    size = 160 if arch == "test_vit" else 32
    heads = {"hidden_dim": 16, "output_dim": 8, "predictor_hidden_dim": 16}
    train.train(small(arch=arch, image_size=size, batch_size=4, max_steps=1, lr=1e-30, init_from=path, **heads))
    trained = open_pretrained(tmp_path / "run", CPU)
    for network in trained.networks.values():
        own = network.net.state_dict()
        for name, value in weights.items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(own[name], value, rtol=0, atol=1e-6)


def test_a_run_starts_from_another(runs: dict[str, Path], small: Small, tmp_path: Path) -> None:
    train.train(small(max_steps=1, lr=1e-30, init_from=runs["test_resnet"], stem="small"))
    first, then = (open_pretrained(p, CPU).networks["student"].net for p in (runs["test_resnet"], tmp_path / "run"))
    torch.testing.assert_close(then.conv1.weight, first.conv1.weight, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("few_digits")
def test_a_run_starts_from_the_backbone_of_a_convnext(
    runs: dict[str, Path], small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run starts from a folder, a backbone file or a checkpoint; head.norm is a tensor of the backbone."""
    first = open_pretrained(runs["test_convnext"], CPU).networks["student"].net.state_dict()
    assert "head.norm.weight" in first
    for number, name in enumerate(("", "backbone.safetensors", "checkpoint.pt")):
        path, out = runs["test_convnext"] / name, tmp_path / str(number)
        train.train(small(arch="test_convnext", max_steps=1, lr=1e-30, init_from=path, out=out))
        said = "".join(capsys.readouterr().out.split())  # lines are wrapped at the width of the terminal
        assert f"startsfrom{len(first)}of{len(first)}tensors(" in said
        assert f"of{path}" in said
        assert "classifier" not in said
        then = open_pretrained(out, CPU).networks["teacher"].net.state_dict()
        for tensor, value in first.items():
            torch.testing.assert_close(then[tensor], value, rtol=0, atol=1e-6)
    backbone = runs["test_convnext"] / "backbone.safetensors"
    evaluate.main(["--checkpoint", str(backbone), "--knn", "--workers", "0", "--data", "digits"])
    assert "knn" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["test_convnext", "test_efficientnet", "mobilenetv3_small_050", "edgenext_xx_small"])
def test_weights_of_a_family_survive_every_format(arch: str) -> None:
    """Weights are written, read, used as a start, exported to timm, and read from timm's own classifier.

    benchmarks.zoo checks all families.
    """
    zoo.there_and_back(arch, zoo.size_of(arch))


@pytest.mark.parametrize(
    ("arch", "classifier"),
    [
        ("test_convnext", ["head.fc.bias", "head.fc.weight"]),
        ("deit_tiny_distilled_patch16_224", ["head.bias", "head.weight", "head_dist.bias", "head_dist.weight"]),
        ("mobilenetv3_small_050", ["classifier.bias", "classifier.weight"]),
        ("resnet10t", ["fc.bias", "fc.weight"]),
    ],
)
def test_only_the_tensors_of_the_classifier_are_left_out(arch: str, classifier: list[str]) -> None:
    backbone = build_backbone(arch, image_size=96, stem="imagenet").eval()
    other = timm.create_model(arch, num_classes=7, **backbone.options).eval()
    assert sorted(load_weights(backbone, other.state_dict(), source="it")) == classifier
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        want = other.forward_head(other.forward_features(images), pre_logits=True)
        torch.testing.assert_close(backbone(images), want)
    state = backbone.net.state_dict()
    name = next(name for name in state if name.startswith("head") or "norm" in name or "bn" in name)
    with pytest.raises(UsageError, match=f"1 tensors are missing .first {re.escape(name)}"):
        load_weights(backbone, {other: value for other, value in state.items() if other != name}, source="it")
    with pytest.raises(UsageError, match=r"1 tensors are foreign .first norm_of_another"):
        load_weights(backbone, {**state, "norm_of_another.weight": torch.zeros(2)}, source="it")


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_export_to_onnx_names_the_package_to_install(
    name: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf"--format onnx needs the package {name}: .*; pip install onnx onnxscript"):
        write(runs["test_resnet"], "onnx", "student", tmp_path / "it.onnx")


def test_a_network_that_onnx_cannot_hold_is_reported(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise NotImplementedError("no such operator\nand a page more")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(UsageError, match=r"--format onnx cannot hold test_resnet: no such operator$"):
        write(runs["test_resnet"], "onnx", "student", tmp_path / "it.onnx")


def test_weights_that_do_not_fit_are_reported_and_nothing_is_written(
    runs: dict[str, Path], small: Small, tmp_path: Path
) -> None:
    for arch, says in (("resnet10t", "--init-from .* is of another network"), ("test_vit", "another network")):
        with pytest.raises(UsageError, match=says):
            train.train(small(arch=arch, image_size=160, init_from=runs["resnet18"]))
    with pytest.raises(UsageError, match="does not exist"):
        train.train(small(init_from=tmp_path / "none.pth"))
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(UsageError, match="cannot be read"):
        train.train(small(init_from=tmp_path / "junk.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="no tensors by name"):
        train.train(small(init_from=tmp_path / "list.pth"))
    assert not (tmp_path / "run").exists()
