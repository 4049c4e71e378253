"""More than two views, of several sizes: which network encodes which, and the losses over pairs against definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrm
from fastrm import train
from fastrm.data import Augmentation, View, augmentation_of
from fastrm.data.views import local_side
from fastrm.errors import UsageError
from fastrm.methods import BYOL, Method, build_method
from fastrm.methods.verify import verify
from fastrm.models.vit import patch_size
from fastrm.settings.config import Config, build
from tests import oracle

SMALL: dict[str, Any] = {
    "data": "digits", "arch": "test_resnet", "image_size": 32, "temperature": 0.3, "hidden_dim": 24, "output_dim": 8,
    "predictor_hidden_dim": 24, "queue_size": 11,
}  # fmt: skip
TINY: dict[str, Any] = {
    "arch": "test_resnet", "image_size": 32, "batch_size": 16, "epochs": 1, "workers": 0, "hidden_dim": 16,
    "output_dim": 8, "predictor_hidden_dim": 16, "queue_size": 32, "warmup_epochs": 0.0, "log_every": 1,
    "eval_every": 0, "stem": "imagenet",
}  # fmt: skip


def made(method: str, **leaves: Any) -> Method[Any]:
    """A small method whose teacher differs from its student."""
    torch.manual_seed(0)
    built = build_method(build(**{**SMALL, "method": method, **leaves}))
    with torch.no_grad():
        for parameter in built.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


def seen(method: Method[Any], views: list[Tensor]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs of the student for all views and of the teacher for the large views, one array per view; the state is
    restored.
    """
    state = {name: value.clone() for name, value in method.state_dict().items()}
    with torch.no_grad():
        large, small = torch.cat([v for v in views if v.shape[2] == 32]), [v for v in views if v.shape[2] < 32]
        ours = [*method.encode_student(large).output.split(4), *method.encode_student(torch.cat(small)).output.split(4)]
        theirs = method.encode_teacher(large).output.split(4)
    method.load_state_dict(state)
    return [x.double().numpy() for x in ours], [x.double().numpy() for x in theirs]


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("order", [(32, 32, 16, 16), (16, 32, 16, 32)])
@pytest.mark.parametrize("name", ["mocov3", "byol", "mocov2"])
def test_the_loss_is_the_mean_over_pairs_of_views(name: str, order: tuple[int, ...], weight: float) -> None:
    method = made(name, residual_weight=weight, symmetric=True)
    drawn = [torch.randn(4, 3, side, side) for side in order]
    views = [v for v in drawn if v.shape[2] == 32] + [v for v in drawn if v.shape[2] < 32]
    ours, theirs = seen(method, views)
    queues = [queue.features.double().numpy() for queue in method.queues]

    def own(v: int, k: int) -> float:
        if name == "byol":
            return float(oracle.residual(ours[v], theirs[k]).mean())
        scale = 2 * 0.3 if name == "mocov3" else 0.5
        return scale * float(oracle.info_nce(ours[v], theirs[k], queues[1 - k] if queues else None, 0.3).mean())

    pairs = [(v, k) for v, k in product(range(4), range(2)) if v != k]
    want = 2 * sum(own(*pair) for pair in pairs) / len(pairs)
    term = sum(float(oracle.residual(ours[v], theirs[v]).mean()) for v in (0, 1)) / 2
    output = method(drawn[0], drawn[1], torch.tensor(weight), measure=True, more=drawn[2:])
    np.testing.assert_allclose(output.contrastive.item(), want, rtol=1e-4)
    assert output.residual is not None
    np.testing.assert_allclose(output.residual.item(), term, rtol=1e-4)
    np.testing.assert_allclose(output.loss.item(), want + weight * term, rtol=1e-4)
    assert len(output.keys) == len(queues)
    assert torch.equal(output.features.isfinite().all(), torch.tensor(True))


def test_one_direction_keeps_the_second_large_view_for_the_teacher() -> None:
    method = made("mocov2", residual_weight=0.5)
    views = [torch.randn(4, 3, side, side) for side in (32, 32, 16)]
    students, teachers = method.encode(views, measure=False)
    assert [s is None for s in students] == [False, True, False]
    assert [t is None for t in teachers] == [False, False, True]
    s, t = ([None if e is None else e.output.detach().double().numpy() for e in side] for side in (students, teachers))
    queue = method.queues[0].features.double().numpy()
    want = sum(float(oracle.info_nce(s[v], t[1], queue, 0.3).mean()) for v in (0, 2)) / 2
    output = method.losses(students, teachers, torch.tensor(0.5), False)
    np.testing.assert_allclose(output.contrastive.item(), want, rtol=1e-4)
    np.testing.assert_allclose(output.loss.item(), want + 0.5 * oracle.residual(s[0], t[0]).mean(), rtol=1e-4)
    assert torch.equal(output.keys[0], teachers[1].output)


def test_small_views_of_one_size_are_encoded_together() -> None:
    method, runs = made("byol"), []
    method.student.backbone.net.conv1.register_forward_hook(lambda _, inputs, __: runs.append(tuple(inputs[0].shape)))
    large, small = torch.randn(2, 4, 3, 32, 32), torch.randn(3, 4, 3, 16, 16)
    method(*large, torch.tensor(1.0))
    assert runs == [(4, 3, 32, 32)] * 2
    runs.clear()
    method(*large, torch.tensor(1.0), more=list(small))
    assert runs == [(8, 3, 32, 32), (12, 3, 16, 16)]


@pytest.mark.parametrize("method", ["mocov3", "mocov2", "byol", "densecl"])
def test_every_method_trains_on_views_of_two_sizes(method: str, small: Callable[..., Config], tmp_path: Path) -> None:
    options = {**TINY, "method": method, "max_steps": 1, "verify_every": 1}
    train.train(small(augmentation="2x32,3x16", **options))
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert np.isfinite(record["loss"])
    assert max(record["verify_loss"], record["verify_gradient"]) < 1e-3


def test_the_fused_losses_are_verified_on_all_views() -> None:
    method = made("mocov3", residual_weight=0.5)
    views = tuple(torch.randn(4, 3, side, side) for side in (32, 32, 16))
    found = verify(method, views, torch.tensor(0.5))
    assert max(found.values()) < 1e-4


@pytest.mark.parametrize(
    ("views", "method", "says"),
    [
        ("1x32,3x16", "byol", "two views or more of the largest size, for the teacher; of the 4 views .* 1 has 32x32"),
        ("3x32,1x16", "mocov2", "takes two views of the largest size, .* 3 have 32x32 pixels"),
        ("1x32", "mocov3", "takes 2 views or more of an image; the augmentation gives 1"),
    ],
)
def test_views_that_cannot_be_trained_on_are_refused(
    views: str, method: str, says: str, small: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        train.train(small(**{**TINY, "method": method, "symmetric": True, "augmentation": views}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_vit_resamples_its_positions_for_multiples_of_its_patch(small: Callable[..., Config], tmp_path: Path) -> None:
    vit = {**TINY, "arch": "test_vit", "stem": "auto", "method": "byol", "max_steps": 1}
    with pytest.raises(UsageError, match=r"--arch test_vit cannot take views of 20x20 pixels: .*divisible by patch"):
        train.train(small(**{**vit, "augmentation": "2x32,2x20"}))
    assert not (tmp_path / "run").exists()
    assert np.isfinite(train.train(small(**{**vit, "augmentation": "2x32,2x16"}))["loss"])


class OneSize(nn.Module):
    """A network that accepts only images of 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, 8))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def test_a_callable_may_give_views_of_several_sizes(tmp_path: Path) -> None:
    def views(sides: tuple[int, ...]) -> Callable[[Any], Any]:
        return lambda image: tuple(torch.rand(3, side, side) for side in sides)

    options = {**TINY, "method": BYOL, "max_steps": 1}
    del options["arch"]
    result = fastrm.pretrain(
        "digits", arch="test_resnet", augmentation=views((16, 32, 32)), out=tmp_path / "run", **options
    )
    assert np.isfinite(result.scores["loss"])
    options["stem"] = "auto"
    with pytest.raises(UsageError, match="--arch OneSize cannot take views of 16x16 pixels") as caught:
        fastrm.pretrain("digits", arch=OneSize(), augmentation=views((32, 32, 16)), out=tmp_path / "other", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_a_custom_method_gets_further_views_in_more(tmp_path: Path) -> None:
    shapes = []

    class Own(BYOL):
        def forward(
            self, first: Tensor, second: Tensor, residual_weight: Tensor, measure: bool = False, more: Any = ()
        ) -> Any:
            shapes.append([tuple(view.shape[1:]) for view in (first, second, *more)])
            return super().forward(first, second, residual_weight, measure)

    class Two(BYOL):
        def forward(self, first: Tensor, second: Tensor, residual_weight: Tensor, measure: bool = False) -> Any:  # type: ignore[override]
            return super().forward(first, second, residual_weight, measure)

    options = {**TINY, "augmentation": "2x32,2x16", "max_steps": 1, "out": tmp_path / "run"}
    fastrm.pretrain("digits", method=Own, **options)
    assert shapes[-1] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 2
    with pytest.raises(UsageError, match="--method Two takes 2 views of an image; the augmentation gives 4"):
        fastrm.pretrain("digits", method=Two, **{**options, "out": tmp_path / "two"})


def test_local_views_of_dino_follow_the_image_and_the_patch() -> None:
    assert [local_side(224, 16), local_side(224, 2), local_side(32, 4), local_side(64, 2)] == [96, 96, 12, 28]
    names = ("vit_small_patch16_224", "xcit_small_12_p8_224", "resnet50")
    assert [patch_size(name) for name in names] == [16, 8, None]
    plain = augmentation_of("dino", 0.4)
    assert [(v.size, v.crop_scale) for v in plain.views] == [(None, (0.4, 1.0))] * 2 + [(96, (0.05, 0.4))] * 8
    more = augmentation_of("dino", 0.25, "2x224,10x96")
    assert [(v.size, v.crop_scale) for v in more.views] == [(224, (0.25, 1.0))] * 2 + [(96, (0.05, 0.25))] * 10
    assert [view.solarize_probability for view in more.views] == [0.0, 0.2] + [0.0] * 10
    assert augmentation_of("dino", 0.4, "2x32").views == tuple(
        View(**{**vars(view), "size": 32}) for view in plain.views[:2]
    )
    assert isinstance(plain, Augmentation)


def test_images_too_small_for_local_views_are_refused() -> None:
    with pytest.raises(UsageError, match="--image-size 16 is too small for local views"):
        augmentation_of("dino", 0.4, None, 16, 16)
