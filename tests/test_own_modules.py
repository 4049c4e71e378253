"""Networks that users pass as modules: their outputs, how they are copied and trained, and which are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import fastrm
from fastrm import evaluate, export
from fastrm.errors import UsageError
from fastrm.methods import build_method
from fastrm.models import build_backbone, module_name
from fastrm.models.module import needs_module
from fastrm.settings.config import Config
from tests.test_cli import fails

Small = Callable[..., Config]


def mapped(channels: int = 3, width: int = 8) -> nn.Sequential:
    """A network from images [B, channels, H, W] to a map [B, width, h, w]."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, 2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(6, width, 3, 2),
    )


def pooled(width: int = 8) -> nn.Sequential:
    """A network from images to [B, width]."""
    return nn.Sequential(*mapped(width=width), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def resnet18() -> nn.Module:
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return network


def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=0, img_size=32)


class Gives(nn.Module):
    """A network with one weight, whose output is a function of the mean colour [B, 3]."""

    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.given = forward

    def forward(self, images: Tensor) -> Any:
        return self.given(images.mean(dim=(2, 3)) * self.weight)


@pytest.mark.parametrize(
    ("made", "dim", "map_dim", "transformer"),
    [(resnet18, 512, None, False), (mapped, 8, 8, False), (pooled, 8, None, False), (vit, 64, None, True)],
)
def test_width_map_and_kind_of_a_module_are_detected(
    made: Callable[[], nn.Module], dim: int, map_dim: int | None, transformer: bool
) -> None:
    module = made()
    backbone = build_backbone(module, image_size=32)
    assert (backbone.dim, backbone.map_dim, backbone.transformer, backbone.channels) == (dim, map_dim, transformer, 3)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        want, found = module.eval()(images), backbone.eval()(images)
        torch.testing.assert_close(found, want.mean(dim=(2, 3)) if map_dim else want)
        if map_dim:
            assert torch.equal(backbone.forward_features(images), want)
            assert all(torch.equal(a, b) for a, b in zip(backbone.encode(images), (found, want), strict=True))
        else:
            with pytest.raises(UsageError, match=rf"{type(module).__name__} returns \[B, {dim}\] and no map"):
                backbone.forward_features(images)


def test_a_channels_last_map_is_permuted() -> None:
    module = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, global_pool="", img_size=32, depths=(1, 1)
    )
    backbone = build_backbone(module, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = module.eval()(images)
        assert torch.equal(backbone.forward_features(images), features.permute(0, 3, 1, 2))
        torch.testing.assert_close(backbone(images), features.mean(dim=(1, 2)))
    assert (backbone.dim, backbone.transformer) == (features.shape[3], True)


def test_a_module_is_copied_and_not_changed() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mapped()
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, images: Tensor) -> Any:
            self.calls += 1
            self.seen += 1
            return self.inner(images) + 0 * torch.rand(())  # random numbers in evaluation mode too

    module = Counting()
    module.inner[1].eval()
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    backbone = build_backbone(module, image_size=32)
    assert torch.equal(torch.rand(3), want)
    assert all(torch.equal(value, backbone.net.state_dict()[name]) for name, value in before.items())
    assert backbone.net.calls == 0
    with torch.no_grad():
        backbone.net.inner[0].weight.add_(1)
    backbone(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert (module.calls, module.training, module.inner[1].training) == (0, True, False)
    assert all(part.training for part in backbone.modules())


def test_channels_equal_those_of_the_first_convolution() -> None:
    assert build_backbone(mapped(5), image_size=32).channels == 5

    class Late(nn.Module):
        """A network whose first convolution by name is not the first that runs."""

        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Conv2d(4, 2, 3), nn.Conv2d(3, 4, 3)

        def forward(self, images: Tensor) -> Any:
            return self.second(self.first(images))

    assert build_backbone(Late(), image_size=32).channels == 3
    assert build_backbone(Late(), image_size=32, channels=8).channels == 3  # the network's own number
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * 2 * 2, 5))
    assert build_backbone(flat, image_size=32, channels=8).channels == 8  # here the number of the images


def test_frozen_parameters_stay_frozen_and_weights_become_float32() -> None:
    module = mapped()
    module[0].requires_grad_(False)
    module.half()
    backbone = build_backbone(module, image_size=32)
    assert [p.requires_grad for p in backbone.parameters()] == [False, True, True, True, True]
    assert {t.dtype for t in backbone.state_dict().values()} == {torch.float32, torch.int64}
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert backbone.notes == [
        "Sequential has weights in float16; it is trained in float32 like all networks",
        "1 of the parameters of Sequential require no gradient and stay as they are",
    ]


def test_lazy_layers_are_initialised() -> None:
    module = nn.Sequential(nn.LazyConv2d(4, 3, 2), nn.Flatten(), nn.LazyLinear(7))
    backbone = build_backbone(module, image_size=16)
    assert [tuple(p.shape) for p in backbone.parameters()] == [(4, 3, 3, 3), (4,), (7, 196), (7,)]
    assert isinstance(module[0], nn.LazyConv2d)


def test_a_compiled_module_keeps_its_names() -> None:
    module = mapped()
    backbone = build_backbone(torch.compile(module, backend="eager"), image_size=32)
    assert backbone.net.state_dict().keys() == module.state_dict().keys()


def raising(_: Tensor) -> None:
    raise RuntimeError("sizes of tensors\nand a page more")


class Spectrum(nn.Module):
    """Scales a map by complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x) * self.weight).real


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a tuple": (lambda: Gives(lambda x: (x, x)), "arch=Gives returns a tuple; it must return one tensor of floats"),
    "a dict": (lambda: Gives(lambda x: {"out": x}), "arch=Gives returns a dict; it must return one tensor of floats"),
    "tokens": (
        lambda: Gives(lambda x: x[:, None]),
        r"returns torch.float32 \(2, 1, 3\) for 2 images; it must return one",
    ),
    "classes": (lambda: Gives(lambda x: x.argmax(1, keepdim=True)), r"returns torch.int64 \(2, 1\) for 2 images"),
    "one row": (
        lambda: Gives(lambda x: x.mean(0, keepdim=True)),
        r"returns \(1, 3\) for 2 images; .* one row per image",
    ),
    "no width": (lambda: Gives(lambda x: x[:, :0]), r"returns torch.float32 \(2, 0\)"),
    "NaN": (lambda: Gives(lambda x: x.log() * float("nan")), "arch=Gives returns values that are not finite"),
    "an error": (lambda: Gives(raising), r"arch=Gives cannot take images \(2, 3, 32, 32\): sizes of tensors; --image-"),
    "another size": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)),
        r"arch=Sequential cannot take images \(2, 3, 32, 32\): .*mat1 and mat2 shapes .*; --image-size must be one",
    ),
    "no weights": (nn.Flatten, "arch=Flatten has no parameter that requires a gradient"),
    "all frozen": (lambda: mapped().requires_grad_(False), "arch=Sequential has no parameter that requires a grad"),
    "no memory": (lambda: mapped().to("meta"), "arch=Sequential is on the meta device and has no weights"),
    "complex": (
        lambda: nn.Sequential(mapped(), Spectrum()),
        r"arch=Sequential has complex parameters \(1.weight in torch.complex64\); they must be real",
    ),
    "TorchScript": (lambda: torch.jit.script(mapped()), "cannot be copied: .* TorchScript modules .* it was made from"),
    "no copy": (lambda: Gives((x for x in ()).__next__), "arch=Gives cannot be copied: cannot pickle 'generator'"),
    "a class": (lambda: nn.Flatten, r"arch=<class .*Flatten'> must be the name of a timm network, or a torch"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_modules_that_are_not_backbones_are_refused(what: str) -> None:
    made, says = REFUSED[what]
    with pytest.raises(UsageError, match=says):
        build_backbone(made(), image_size=32)


def test_the_small_stem_is_refused_for_modules() -> None:
    with pytest.raises(UsageError, match="--stem small is for timm's ResNets given by name; arch=ResNet is a module"):
        build_backbone(resnet18(), image_size=32, stem="small")


def test_names_of_modules_differ_from_names_of_timm() -> None:
    class resnet18(nn.Module):
        pass

    assert module_name(mapped()) == "Sequential"
    assert module_name(resnet18()) == "resnet18Module"
    assert needs_module("resnet18Module")
    assert not needs_module("resnet18")


@pytest.mark.parametrize(
    ("made", "method", "layers"),  # with a transformer, MoCo-v3's projector has three more layers
    [(resnet18, "mocov3", 5), (vit, "mocov3", 8), (mapped, "densecl", 3), (pooled, "byol", 4), (mapped, "mocov2", 3)],
)
def test_two_steps_change_the_parameters_of_a_module(
    made: Callable[[], nn.Module], method: str, layers: int, small: Small
) -> None:
    module = made()
    built = build_method(small(method=method), arch=module)
    assert len(built.student.projector) == layers
    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        views = torch.randn(2, 4, 3, 32, 32)
        output = built(*views, torch.tensor(0.1))
        assert output.loss.isfinite()
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    trained = dict(built.student.backbone.net.named_parameters())
    same = [name for name, value in module.named_parameters() if torch.equal(value, trained[name])]
    assert len(same) <= len(trained) // 4  # parameters without a gradient, such as the bias of keys
    assert not any(p.requires_grad for p in built.teacher.parameters())


def test_densecl_refuses_a_module_without_a_map(small: Small) -> None:
    with pytest.raises(UsageError, match=r"densecl needs a backbone with a feature map \[B, D, h, w\]"):
        build_method(small(method="densecl"), arch=pooled())


def test_a_module_that_fails_only_in_training_is_reported(small: Small) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = pooled()

        def forward(self, images: Tensor) -> Any:
            out = self.inner(images)
            return (out, out) if self.training else out

    class Detached(Two):
        def forward(self, images: Tensor) -> Any:
            return self.inner(images).detach()

    class Viewed(Two):
        def forward(self, images: Tensor) -> Any:
            return self.inner[:-2](images).view(len(images), -1)

    class Embedded(Two):
        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Embedding(1, 4, sparse=True)

        def forward(self, images: Tensor) -> Any:
            return self.inner(images) + self.place(torch.zeros(len(images), dtype=torch.int64))[:, :1]

    with pytest.raises(UsageError, match=r"--arch Embedded cannot .*: the gradient of .*place.weight is sparse"):
        build_method(small(), arch=Embedded())
    with pytest.raises(UsageError, match=r"--arch Two cannot be trained with --method mocov3 .*not tuple"):
        build_method(small(), arch=Two())
    with pytest.raises(UsageError, match=r"--arch Detached cannot be .* the loss does not reach any of its parameters"):
        build_method(small(), arch=Detached())
    with pytest.raises(UsageError, match=r"--arch Viewed cannot .*; --no-channels-last keeps maps in the order"):
        build_method(small(), arch=Viewed())
    build_method(small(channels_last=False), arch=Viewed())


def run_of(module: nn.Module, out: Path, **settings: Any) -> Any:
    quick: dict[str, Any] = {
        "image_size": 32, "batch_size": 16, "epochs": 1, "max_steps": 2, "workers": 0, "eval_every": 0,
        "hidden_dim": 16, "output_dim": 8, "predictor_hidden_dim": 16, "warmup_epochs": 0.0, "device": "cpu",
    }  # fmt: skip
    return fastrm.pretrain("digits", arch=module, out=out, **{**quick, **settings})


@pytest.mark.usefixtures("few_digits")
def test_a_run_with_a_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with a module is trained, loaded, scored and exported. It is refused without the module or with another
    one.
    """
    out, module = tmp_path / "run", mapped()
    before = copy.deepcopy(module.state_dict())
    result = run_of(module, out)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    file, graph = tmp_path / "it.safetensors", tmp_path / "it.onnx"
    export.export(export.ExportConfig(run=out, format="safetensors", which="teacher", out=file), arch=mapped())
    with torch.no_grad():
        for which, path in (
            ("student", out),
            ("teacher", out),
            ("student", out / "backbone.safetensors"),
            ("teacher", file),
        ):
            model = fastrm.load(path, which=which, arch=mapped())
            torch.testing.assert_close(model(images), getattr(result, which)(images), rtol=1e-4, atol=1e-6)
            assert model.forward_features(images).shape == (2, 8, 7, 7)
    assert (
        f'fastrm.load("{file.name}", which="teacher", arch=Sequential(…))'
        in file.with_name(f"{file.name}.md").read_text()
    )
    wanted = evaluate.EvaluateConfig(run=out, knn=True, gap=True, workers=0, device="cpu")
    scores = evaluate.evaluate(wanted, arch=mapped())["digits"]
    assert scores["scores"].keys() == {"student", "teacher", "random", "pixels"}
    assert {"backbone", "projector", "output"} <= scores["gap"].keys()

    with pytest.raises(
        UsageError, match="run is of another Sequential than arch=Sequential: 2 tensors are of other sh"
    ):
        fastrm.load(out, arch=mapped(width=9))
    with pytest.raises(UsageError, match="--format timm holds networks of timm only, and Sequential is not one"):
        export.export(export.ExportConfig(run=out, format="timm", out=tmp_path / "timm"), arch=mapped())
    capsys.readouterr()
    for main, flags in (
        (evaluate.main, ["--knn"]),
        (export.main, ["--format", "onnx", "--out", str(graph)]),
    ):
        said = fails(main, [str(out), *flags], capsys)
        assert "is of Sequential, which timm does not have" in said
        assert "arch=Sequential(…) to fastrm.load" in said


def test_the_untrained_network_of_a_module_has_new_weights(tmp_path: Path) -> None:
    from fastrm.pretrained import read_pretrained

    run_of(pooled(), tmp_path / "run")
    given = pooled()
    nn.init.ones_(given[0].weight)
    untrained = read_pretrained(tmp_path / "run", arch=given).untrained().net
    assert untrained[0].weight.std() > 0.01
    assert (given[0].weight == 1).all()
