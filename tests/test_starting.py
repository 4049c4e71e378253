"""Starting from published weights: matching tensors are used and counted, and too few are refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import fastrm
from fastrm import evaluate, export, report, train
from fastrm.data.formats import RGB
from fastrm.data.loader import Batch
from fastrm.errors import UsageError
from fastrm.methods import build_method
from fastrm.models import build_backbone
from fastrm.models.starting import starting_weights
from fastrm.optim import build_optimizer
from fastrm.optim.schedules import Rates
from fastrm.pretrained import read_pretrained
from fastrm.probes import Estimate
from fastrm.run.step import Step
from fastrm.settings.config import build
from fastrm.settings.flags import read_flags

Nest = Callable[[dict[str, Tensor], dict[str, Tensor]], Any]


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with this prefix before each name."""
    return {prefix + name: value for name, value in state.items()}


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A second network in the file, all zeros, which must not be used."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


QUEUE = {"module.queue": torch.ones(9)}
DECODER = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(99, 999)}
HEAD = {"mlp.0.weight": torch.zeros(7, 9), "last_layer.weight_v": torch.zeros(50, 9)}
# By the layout of published files: a function from the weights, and those of a second network, to the content.
LAYOUTS: dict[str, Nest] = {
    "plain": lambda own, _: own,
    "MoCo": lambda own, other: {
        "state_dict": under("module.encoder_q.", own)
        | under("module.encoder_k.", other)
        | {"module.queue": torch.ones(9)}
    },
    "DINO": lambda own, other: {
        "student": under("module.backbone.", own) | under("module.head.", HEAD),
        "teacher": under("backbone.", other) | under("head.", HEAD),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "epoch": 3,
    },
    "MAE": lambda own, _: {
        "model": own | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(99, 999)}
    },
    "solo-learn": lambda own, other: {
        "state_dict": under("backbone.", own) | under("momentum_backbone.", other) | under("projector.", HEAD)
    },
    "MMSelfSup": lambda own, _: {"meta": {"version": 1}, "state_dict": under("backbone.", own)},
    # The options of the program, and NumPy's numbers, are objects.
    "timm": lambda own, other: {
        "state_dict": own,
        "state_dict_ema": other,
        "args": argparse.Namespace(opt="sgd", output=Path("out")),
        "metric": np.float64(0.5),
    },
}


def backbone_of(arch: str, **options: Any) -> Any:
    """An untrained backbone."""
    torch.manual_seed(1)
    return build_backbone(arch, **{"image_size": 96, "stem": "imagenet", **options})


@pytest.mark.parametrize("arch", ["resnet10t", "test_vit", "test_convnext"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_tensors_of_published_layouts_are_used(layout: str, arch: str, tmp_path: Path) -> None:
    backbone = backbone_of(arch)
    torch.manual_seed(0)
    own = timm.create_model(arch, num_classes=0, **backbone.options).state_dict()
    torch.save(LAYOUTS[layout](own, copy_of(own)), tmp_path / "it.pth")
    found, said = starting_weights(backbone, tmp_path / "it.pth", partial=False)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())
    count = sum(value.numel() for value in own.values()) / 1e6
    assert f"{len(own)} of {len(own)} tensors ({count:.1f} of {count:.1f} M parameters) of {tmp_path}/it.pth" in said


def test_objects_that_are_not_plain_data_are_not_read(tmp_path: Path) -> None:
    """Also a module as a whole, whose weights are then missing; and no code of the file runs."""

    class Command:
        def __reduce__(self) -> Any:
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    net = torchvision.models.resnet18()
    torch.save({"model": net.state_dict(), "args": argparse.Namespace(lr=1.0), "x": Command()}, tmp_path / "it.pth")
    found, said = starting_weights(backbone_of("resnet18"), tmp_path / "it.pth", partial=False)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in found.items())
    assert "120 of 120 tensors" in said
    assert not (tmp_path / "ran").exists()
    torch.save(net, tmp_path / "whole.pth")
    with pytest.raises(UsageError, match=r"it holds torchvision\.models\.resnet\.ResNet, and only plain data is read"):
        starting_weights(backbone_of("resnet18"), tmp_path / "whole.pth", partial=True)
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(3)}}}
    torch.save({"model": net, "optimizer": momentum}, tmp_path / "more.pth")
    with pytest.raises(UsageError, match=r"0 of 120 .*; it holds torchvision\.models\.resnet\.ResNet, and only"):
        starting_weights(backbone_of("resnet18"), tmp_path / "more.pth", partial=True)


def test_numbered_layers_are_those_of_the_network_in_order(tmp_path: Path) -> None:
    """lightly's own MoCo with the backbone of its documentation."""
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad

    class MoCo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torchvision.models.resnet18()
            self.backbone = nn.Sequential(*list(self.net.children())[:-1])
            self.projection_head = MoCoProjectionHead(512, 512, 128)
            self.backbone_momentum = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
            deactivate_requires_grad(self.backbone_momentum)

    model = MoCo()
    net = model.net.state_dict()
    del model.net
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "it.ckpt")
    found, said = starting_weights(backbone_of("resnet18"), tmp_path / "it.ckpt", partial=False)
    assert len(found) == 120
    assert all(torch.equal(value, net[name]) for name, value in found.items())
    assert "120 of 120 tensors" in said
    assert "its layers are numbered, and taken in the order of the network's" in said


def test_a_resnet_of_torchvision_is_used_without_its_classifier(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "it.pth")
    found, said = starting_weights(backbone_of("resnet18"), tmp_path / "it.pth", partial=False)
    assert len(found) == 120
    assert "120 of 120 tensors" in said
    assert "2 tensors of a classifier or a head" in said


def test_folders_in_the_form_of_hugging_face_are_read(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=5).state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    found, _ = starting_weights(backbone_of("test_resnet"), tmp_path, partial=False)
    assert all(torch.equal(found[name], state[name]) for name in found)


@pytest.mark.parametrize(
    ("given", "name"), [("timm:resnet18.a1_in1k", "resnet18.a1_in1k"), ("hf:timm/x", "hf-hub:timm/x")]
)
def test_names_are_passed_to_timm_with_size_and_bands(given: str, name: str) -> None:
    backbone = backbone_of("test_vit", channels=5)
    made = timm.create_model("test_vit", num_classes=0, **backbone.options)
    with mock.patch.object(timm, "create_model", return_value=made) as create:
        found, said = starting_weights(backbone, Path(given), partial=False)
    create.assert_called_once_with(name, pretrained=True, num_classes=0, **backbone.options)
    assert found.keys() == made.state_dict().keys()
    assert given in said
    with (
        mock.patch.object(timm, "create_model", side_effect=OSError("no network here")),
        pytest.raises(UsageError, match="cannot be loaded: no network here"),
    ):
        starting_weights(backbone, Path(given), partial=False)


def test_position_embeddings_of_another_size_are_resampled(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", num_classes=0, img_size=160).state_dict()
    torch.save({"model": state}, tmp_path / "it.pth")
    backbone = backbone_of("test_vit")
    found, said = starting_weights(backbone, tmp_path / "it.pth", partial=False)
    want = resample_abs_pos_embed(state["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(found["pos_embed"], want)
    assert "pos_embed resampled" in said


def test_too_few_tensors_are_refused_with_counts_unless_requested(tmp_path: Path) -> None:
    other = timm.create_model("resnet18", num_classes=0).state_dict()
    half = {name: value for name, value in other.items() if "layer4" not in name}
    torch.save(half, tmp_path / "half.pth")
    # All tensors of the file match, but only 2.8 of the 11.2 million parameters of the network.
    with pytest.raises(
        UsageError, match=r"90 of 120 tensors \(2\.8 of 11\.2 M parameters\) match; 30 tensors are missing"
    ):
        starting_weights(backbone_of("resnet18"), tmp_path / "half.pth", partial=False)
    found, said = starting_weights(backbone_of("resnet18"), tmp_path / "half.pth", partial=True)
    assert found.keys() == half.keys()
    assert "90 of 120" in said
    more = other | {f"another.{i}.weight": torch.zeros(1000, 1000) for i in range(2)}
    torch.save(more, tmp_path / "more.pth")
    with pytest.raises(UsageError, match="2 tensors are foreign"):  # 85 % of the file match
        starting_weights(backbone_of("resnet18"), tmp_path / "more.pth", partial=False)
    with pytest.raises(UsageError, match="0 of"):
        starting_weights(backbone_of("test_vit"), tmp_path / "half.pth", partial=True)


def test_a_small_stem_starts_from_a_network_with_another_stem(tmp_path: Path) -> None:
    """One tensor with 1,728 of 11 million values does not match. It stays random, and equal in both networks."""
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "it.pth")
    config = build(
        data="digits", arch="resnet18", image_size=32, hidden_dim=8, output_dim=8, init_from=tmp_path / "it.pth"
    )
    method = build_method(config)
    assert any("119 of 120 tensors" in note and "conv1.weight" in note for note in method.notes)
    student, teacher = (network.backbone.net.state_dict() for network in (method.student, method.teacher))
    assert all(torch.equal(student[name], teacher[name]) for name in student)


def test_a_custom_module_starts_from_its_weights(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    torch.save({"net": {"net": module.state_dict()}}, tmp_path / "it.pth")
    backbone = build_backbone(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), image_size=32, stem="auto")
    found, said = starting_weights(backbone, tmp_path / "it.pth", partial=False)
    assert "7 of 7 tensors" in said
    backbone.net.load_state_dict(found)


@pytest.mark.usefixtures("few_digits")
def test_a_run_scores_its_starting_weights_and_reports_falling_below(
    small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kNN accuracy of the start is recorded and compared in metrics, summary and evaluation, also after an
    interruption.
    """
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "it.pth")
    monkeypatch.chdir(tmp_path)
    seen = iter([0.7, 0.8, 0.6, 0.5])
    monkeypatch.setattr(
        "fastrm.hooks.evaluation.frozen_scores", lambda networks, *_, **__: scores(networks, next(seen))
    )

    def scores(networks: dict[str, nn.Module], student: float) -> dict[str, dict[str, Estimate]]:
        values = dict.fromkeys(networks, 0.25) | {"student": student}
        right = {name: np.arange(20) < round(20 * value) for name, value in values.items()}
        return {name: {k: Estimate.of(right[name]) for k in ("knn20", "knn200")} for name in right}

    options = {"init_from": Path("it.pth"), "eval_every": 1, "epochs": 3, "batch_size": 64, "out": tmp_path / "run"}
    train.train(small(**options, max_steps=2))
    assert "start      kNN accuracy 70.0%" in capsys.readouterr().out
    train.train(small(**options, max_steps=None))
    said = " ".join(capsys.readouterr().out.split())
    assert "is below the 70.0% of the starting weights" in said
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["knn_start"] for record in records if "knn_start" in record} == {0.7}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["knn_start"], summary["knn_student"]) == (0.7, 0.5)
    # Four of the twenty images are right only at the start. The interval uses which ones, also after the interruption.
    above = Estimate.of(np.arange(20) < 10).above(Estimate.of(np.arange(20) < 14))
    assert above is not None
    assert summary["knn_above_start"]["student"] == above.json()
    assert summary["knn_intervals"].keys() == {"student", "teacher", "start", "untrained", "pixels"}
    assert "start weights 70.0 %" in said
    assert "student -20.0 points from the start weights" in said

    monkeypatch.undo()
    monkeypatch.chdir("/")
    evaluate.main([str(tmp_path / "run"), "--linear-quick", "--eval-images", "60", "--workers", "0"])
    table = capsys.readouterr().out
    titles = [line[:26].strip() for line in table.splitlines()]
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sets"]["digits"]["scores"]
    networks = ["untrained network", "raw pixels", "start weights", "student", "teacher"]
    assert titles[-7:] == [*networks, "student above the start", "teacher above the start"]
    score = {name: parts["linear_quick"] for name, parts in found.items()}
    assert "above_start" not in score["start"]
    difference = score["student"]["value"] - score["start"]["value"]
    assert score["student"]["above_start"]["value"] == pytest.approx(difference)
    report.main([str(tmp_path / "run")])
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    # in the evaluation and in the run's own scores
    assert all(page.count(f"<td>{title}</td>") == 2 for title in titles[-7:])
    export.main([str(tmp_path / "run"), "--format", "safetensors", "--out", str(tmp_path / "it.safetensors")])
    card = (tmp_path / "it.safetensors.md").read_text()
    assert all(f"| {title} | " in card for title in titles[-7:])
    (tmp_path / "it.pth").unlink()
    evaluate.main([str(tmp_path / "run"), "--linear-quick", "--eval-images", "60", "--workers", "0"])
    assert "are not scored: --init-from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optimizer", "arch"), [("lars", "test_resnet"), ("sgd", "test_convnext"), ("adamw", "test_vit")]
)
def test_layer_decay_scales_steps_as_in_timm(optimizer: str, arch: str, small: Callable[..., Any]) -> None:
    """The first step changes each tensor as without layer decay, times timm's scale of its layer."""
    decay, changes = 0.5, []
    for layer_decay in (1.0, decay):
        config = small(
            optimizer=optimizer, arch=arch, layer_decay=layer_decay, weight_decay=0.0, method="mocov2", image_size=32
        )
        torch.manual_seed(0)
        method = build_method(config).train().double()
        before = {name: p.detach().clone() for name, p in method.named_parameters()}
        step = Step(
            method, build_optimizer(method, config.optim), precision="fp32", accumulate=1, clip_norm=None,
            layout=torch.contiguous_format,
        )  # fmt: skip
        views = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        step([Batch(tuple(views), [])], Rates(0.1, 0.1, 0.75), measure=False)
        changes.append({name: p.detach() - before[name] for name, p in method.named_parameters()})
    plain, decayed = changes
    with_classifier = timm.create_model(arch, num_classes=5)
    names = {p: name for name, p in with_classifier.named_parameters()}
    scale = {
        names[p]: group["lr_scale"]
        for group in param_groups_layer_decay(with_classifier, layer_decay=decay)
        for p in group["params"]
    }
    moved = 0
    for name, change in plain.items():
        who, _, inner = name.partition(".backbone.net.")
        share = scale[inner] if inner else 1.0
        if who in ("student", "teacher") or not inner:
            torch.testing.assert_close(decayed[name], share * change, rtol=1e-6, atol=1e-12, msg=name)
            moved += share < decay and bool(change.any())
    assert moved > 10


def test_layer_decay_is_refused_for_a_module_without_layers(small: Callable[..., Any]) -> None:
    config = small(layer_decay=0.7)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(UsageError, match=r"--layer-decay 0\.7: Sequential does not define its layers"):
        build_optimizer(build_method(config, arch=net), config.optim)


def test_a_run_from_weights_has_a_tenth_of_the_learning_rate_and_a_shorter_warm_up() -> None:
    plain, weights = {"data": "x", "epochs": 100}, {"data": "x", "epochs": 100, "init_from": Path("a.pth")}
    assert (build(**plain).optim.lr, build(**plain).optim.warmup_epochs) == (0.6, 10)
    assert (build(**weights).optim.lr, build(**weights).optim.warmup_epochs) == (pytest.approx(0.06), 5)
    given = build(**weights, lr=0.3, warmup_epochs=2.0).optim
    assert (given.lr, given.warmup_epochs) == (0.3, 2)
    recipe = build(**weights, recipe="mocov3-r50-300ep").optim
    assert (recipe.lr, recipe.warmup_epochs) == (0.3, 10 / 3 * 3)
    for words in (["--init-from", "a.pth"], ["--init-from=a.pth"], ["--init_from", "a.pth"]):
        assert read_flags(["--data", "x", *words]).optim.lr == pytest.approx(0.06)
    assert read_flags(["--data", "x", "--init-from", "a.pth", "--lr", "0.5"]).optim.lr == 0.5


def test_mocov3_trains_a_projection_from_weights(tmp_path: Path) -> None:
    """Without weights the projection is random and frozen (Chen et al., arXiv 2104.02057, section 4)."""
    options = {"data": "x", "arch": "test_vit", "image_size": 48, "hidden_dim": 8, "output_dim": 4}
    state = timm.create_model("test_vit", num_classes=0, img_size=48).state_dict()
    held = ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed")
    del state["patch_embed.proj.bias"]
    torch.save(state, tmp_path / "it.pth")
    for weights, free in ({}, ()), ({"init_from": tmp_path / "it.pth"}, (held[0], held[2])):
        method = build_method(build(**options, **weights))
        net = method.student.backbone.net
        assert [name for name in held if net.get_parameter(name).requires_grad] == list(free)
        assert not any(p.requires_grad for p in method.teacher.parameters())


@pytest.mark.usefixtures("few_digits")
def test_a_run_with_layer_decay_resumes_exactly_and_reports_its_learning_rates(
    small: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "it.pth")
    options = {"init_from": tmp_path / "it.pth", "layer_decay": 0.5, "epochs": 2}
    train.train(small(**options, max_steps=3, out=tmp_path / "once"))
    said = " ".join(capsys.readouterr().out.split())
    assert "from weights, 0.06 with 0 epochs of warm-up (defaults from scratch: 0.6 and 0.2)" in said
    assert "times 0.5 per layer of the backbone, from the last to the first, which gets 0.031 of it" in said
    for steps in (1, 3):
        train.train(small(**options, max_steps=steps, out=tmp_path / "twice"))
    once, twice = (safetensors.torch.load_file(tmp_path / name / "backbone.safetensors") for name in ("once", "twice"))
    assert all(torch.equal(value, twice[name]) for name, value in once.items())


@pytest.mark.usefixtures("few_digits")
def test_a_run_normalises_images_as_its_start_weights_expect(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mean and standard deviation are those of a folder's description, a run or a checkpoint, unless they are given."""
    folder = tmp_path / "folder"
    folder.mkdir()
    state = timm.create_model("test_resnet", num_classes=5).state_dict()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    known = {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": known}))
    torch.save(state, tmp_path / "silent.pth")
    told = (0.5,) * 3, (0.25,) * 3
    run = tmp_path / "from0"
    for number, (start, options, want) in enumerate(
        [
            (folder, {}, told),
            (run, {}, told),
            (run / "checkpoint.pt", {}, told),
            (run / "backbone.safetensors", {"mean": (0.1,), "std": (0.2,)}, ((0.1,) * 3, (0.2,) * 3)),
            (tmp_path / "silent.pth", {}, (RGB.mean, RGB.std)),
        ]
    ):
        out = tmp_path / f"from{number}"
        train.train(small(init_from=start, max_steps=1, out=out, **options))
        pixels = read_pretrained(out).pixels
        assert (pixels.mean, pixels.std) == want, start
        assert ("normalised as for the start weights" in " ".join(capsys.readouterr().out.split())) == (want == told)


@pytest.mark.usefixtures("few_digits")
def test_published_weights_are_scored_exported_and_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are timm's by name, a file with --arch, and a folder in Hugging Face's form."""
    torch.manual_seed(3)
    net = timm.create_model("test_resnet", num_classes=5).eval()
    torch.save({"state_dict": under("module.encoder_q.", net.state_dict())}, tmp_path / "moco.pth")
    (tmp_path / "folder").mkdir()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "folder" / "model.safetensors")
    known = {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.25] * 3, "license": "mit"}
    config = {"architecture": "test_resnet", "pretrained_cfg": known}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        want = net.forward_head(net.forward_features(images), pre_logits=True)
    for model in (
        fastrm.load(tmp_path / "moco.pth", arch="test_resnet", image_size=96),
        fastrm.load(tmp_path / "folder"),
    ):
        torch.testing.assert_close(model(images), want)
    trained = read_pretrained(tmp_path / "folder")
    assert (trained.image_size, trained.pixels.mean, trained.license) == (96, (0.5,) * 3, "mit")
    given = read_pretrained(tmp_path / "moco.pth", arch="test_resnet", mean=(0.5,), std=(0.25,))
    assert given.pixels == trained.pixels

    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def made(name: str, pretrained: bool = False, **options: Any) -> Any:
        model = create(name.partition(".")[0], **options)
        model.load_state_dict(net.state_dict() if pretrained else {}, strict=False)
        return model

    monkeypatch.setattr(timm, "create_model", made)
    options = ["--data", "digits", "--knn", "--eval-images", "60", "--workers", "0", "--device", "cpu"]
    for words in (
        ["timm:test_resnet.r160_in1k", "--image-size", "32"],
        ["moco.pth", "--arch", "test_resnet", "--image-size", "32"],
    ):
        evaluate.main([*words, *options])
        said = capsys.readouterr().out
        assert "network    90 of 90 tensors" in said
        assert ("normalised with ImageNet's" in said) == (words[0] == "moco.pth")
        assert {"weights", "untrained", "pixels"} <= set(said.split())
        assert json.loads(Path("evaluation.json").read_text())["sets"]["digits"]["scores"]["weights"]["knn20"]
    named = read_pretrained(Path("timm:test_resnet.r160_in1k")).pixels
    assert named.mean == timm.models.get_pretrained_cfg("test_resnet.r160_in1k").mean != RGB.mean
    with pytest.raises(UsageError, match="--gap needs student and teacher"):
        evaluate.main(["moco.pth", "--arch", "test_resnet", "--data", "digits", "--gap"])
    capsys.readouterr()
    evaluate.main(["moco.pth", "--arch", "test_resnet", "--image-size", "32", "--mean", "0.5", *options])
    assert "normalised" not in capsys.readouterr().out
    with pytest.raises(UsageError, match="--mean has 2 numbers; it must have 1, or 3"):
        evaluate.main(["moco.pth", "--arch", "test_resnet", "--mean", "0.5", "0.4", *options])
    with pytest.raises(UsageError, match="need --arch"):
        evaluate.main(["moco.pth", "--data", "digits", "--knn"])
    with pytest.raises(UsageError, match="--arch resnetty is not a timm model"):
        evaluate.main(["moco.pth", "--arch", "resnetty", "--data", "digits", "--knn"])
    with pytest.raises(UsageError, match=r"--checkpoint moco.pth is of another network"):
        evaluate.main(["moco.pth", "--arch", "test_vit", "--data", "digits", "--knn"])
    with pytest.raises(UsageError, match=r"--checkpoint timm:resnet18.nope cannot be loaded: Invalid pretrained tag"):
        fastrm.load("timm:resnet18.nope")
    export.main(["moco.pth", "--arch", "test_resnet", "--format", "safetensors", "--out", "it.safetensors"])
    card = Path("it.safetensors.md").read_text()
    assert "# test_resnet\n\nWritten by fastrm" in card  # fastrm did not train it
    assert "## Licence\n\nThat of the weights that this file was made from applies" in card
    assert torch.equal(fastrm.load("it.safetensors").net.conv1[0].weight, net.conv1[0].weight)
    with pytest.raises(UsageError, match=r"--mean and --std are for weights of other programs.*it\.safetensors"):
        evaluate.main(["it.safetensors", "--mean", "0.5", *options])
