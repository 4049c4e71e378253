"""The registry of methods: what registering a method provides, and that only fastrm/methods names any."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import fastrm
import fastrm.methods
from fastrm.data import Augmentation, View, make_loader
from fastrm.errors import UsageError
from fastrm.evaluate import _protocol
from fastrm.methods import (
    LinearProtocol,
    Method,
    MoCoV2,
    MoCoV3,
    build_method,
    find,
    names,
    recipes,
    register,
    registry,
)
from fastrm.models import build_backbone
from fastrm.run import checkpoint
from fastrm.run.said import without_effect
from fastrm.settings.config import MethodConfig, build, defaults
from tests import oracle

ROOT = Path(fastrm.methods.__file__).parent.parent


TINY: dict[str, Any] = {
    "hidden_dim": 8, "output_dim": 4, "queue_size": 96, "image_size": 16, "batch_size": 32, "epochs": 1, "workers": 0,
    "eval_every": 0, "log_to": [], "device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Remove what a test registers."""
    before = dict(registry._METHODS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)


def small(**leaves: Any) -> Any:
    """Settings of a small run."""
    tiny = {"hidden_dim": 8, "output_dim": 4, "predictor_hidden_dim": 8, "queue_size": 16}
    return build(**{"data": "digits", "arch": "test_resnet", "image_size": 32, **tiny, **leaves})


class OneView(MoCoV3):
    """A method that is derived from a published one and is not registered."""

    recipes: ClassVar = {"one-view-8ep": {"epochs": 8, "temperature": 0.5, "batch_size": 64}}
    linear_protocol = LinearProtocol(epochs=3)

    @classmethod
    def augmentation(cls, crop_min: float) -> Augmentation:
        return Augmentation(views=(View(crop_scale=(crop_min, 1.0), flip_probability=0.0),) * 2)


def test_only_the_methods_package_names_methods() -> None:
    named = re.compile(rf"\b({'|'.join(names())})\b")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in ROOT.rglob("*.py")
        if path.parent != ROOT / "methods"
        for line in path.read_text(encoding="utf-8").splitlines()
        if named.search(line)
    ]
    assert found == []


def test_a_registered_method_is_found_by_its_name() -> None:
    mine = register("mine")(type("Mine", (OneView,), {"recipes": {"mine-8ep": OneView.recipes["one-view-8ep"]}}))
    assert names()[-1] == mine.name == "mine"
    assert names()[0] == MoCoV3.name == defaults().method.method
    assert find("mine") is find(mine) is mine
    assert recipes()["mine-8ep"] == {"method": "mine", "epochs": 8, "temperature": 0.5, "batch_size": 64}
    config = small(method="mine")
    assert (config.method.method, config.optim.epochs, config.method.temperature) == ("mine", 8, 0.5)
    assert config.input.batch_size is None  # the default of 256 per process, as without a recipe
    assert small(recipe="mine-8ep").input.batch_size == 64
    assert type(build_method(config)) is mine
    assert _protocol("mine").epochs == 3


def test_a_custom_method_need_not_be_registered() -> None:
    config = small(method=OneView)
    assert (config.method.method, config.optim.epochs, "OneView" in names()) == ("OneView", 8, False)
    assert type(build_method(config, kind=OneView)) is OneView
    with pytest.raises(
        UsageError, match=r"--method OneView is unknown; choose one of mocov3, .* so that it is registered"
    ):
        build_method(config)
    common: dict[str, Any] = {"image_size": 16, "batch_size": 4, "device": "cpu", "workers": 0, "seed": 1}
    own = make_loader("digits", method=OneView, **common)
    given = make_loader("digits", method=OneView.augmentation(0.2), **common)
    assert all(torch.equal(*pair) for pair in zip(next(iter(own)).views, next(iter(given)).views, strict=True))


def test_the_example_method_is_complete_in_less_than_forty_lines(tmp_path: Path) -> None:
    """Its loss equals ReSSL's definition in float64, and a run of two steps uses its views."""
    path = ROOT.parent / "examples" / "own_method.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    spec = importlib.util.spec_from_file_location("own_method", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert find("ressl") is module.ReSSL

    torch.manual_seed(0)
    built = build_method(small(method="ressl", residual_weight=0.0))
    views = torch.randn(2, 6, 3, 32, 32)
    with torch.no_grad():
        found = built(*views, torch.tensor(0.0)).loss.item()
        rows = [built.student(views[0]), built.teacher(views[1])]
    past = built.queues[0].features.double().numpy()
    similarities = [oracle.unit(row.output.double().numpy()) @ past.T for row in rows]
    student, teacher = (np.exp(s / tau) for s, tau in zip(similarities, (0.1, 0.04), strict=True))
    student, teacher = (x / x.sum(axis=1, keepdims=True) for x in (student, teacher))
    np.testing.assert_allclose(found, -(teacher * np.log(student)).sum(axis=1).mean(), rtol=1e-5)

    result = fastrm.pretrain("digits", arch="test_resnet", method="ressl", max_steps=2, out=tmp_path / "run", **TINY)
    assert result.scores["step"] == 2
    assert checkpoint.load(tmp_path / "run")["method"]["queues.0.pointer"] == 2 * 32


def test_a_subclass_has_its_own_name_and_does_not_repeat_recipes() -> None:
    class Mine(MoCoV2):
        pass

    assert (Mine.name, MoCoV2.name) == ("Mine", "mocov2")
    before = recipes()
    register("mine")(Mine)
    assert recipes() == before
    assert Mine.defaults("resnet50") == MoCoV2.defaults("resnet50")


def test_a_class_that_is_defined_again_replaces_the_first() -> None:
    """For example, a notebook cell runs twice."""

    def cell() -> type[Method[Any]]:
        @register("mine")
        class Mine(MoCoV2):
            recipes: ClassVar = {"mine-1ep": {"epochs": 1}}

        return Mine

    first, second = cell(), cell()
    assert first is not second
    assert find("mine") is second


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mocov2", OneView, r"--method mocov2 is fastrm.methods.mocov2.MoCoV2; choose another name"),
        ("mine", torch.nn.Linear, "Linear.*; it must be a subclass of fastrm.methods.Method"),
        ("mine", lambda: None, "it must be a subclass of fastrm.methods.Method"),
        ("", OneView, "'' is not a valid name"),
        ("a/b", OneView, "'a/b' is not a valid name; it must consist of letters"),
        (None, OneView, "None is not a valid name"),
        ("mine", type("Same", (MoCoV3,), {"recipes": {"mocov2-r50-200ep": {}}}), "--recipe mocov2-r50-200ep is one of"),
    ],
)  # fmt: skip
def test_invalid_registrations_are_refused(name: Any, given: Any, message: str) -> None:
    before = dict(registry._METHODS)
    with pytest.raises(UsageError, match=message):
        register(name)(given)
    assert before == registry._METHODS


@pytest.mark.parametrize(
    ("loss", "returns"),
    [
        (lambda rows: rows.sum(dim=1), r"such as a mean over the rows; it returns torch.float32 \(2,\)"),
        (lambda rows: rows.mean().detach(), "it returns one without, as after detach"),
        (lambda rows: 0.5, "it returns a float"),
        (lambda rows: (rows.mean(), rows), "it returns a tuple"),
        (lambda rows: rows.argmax(), r"it returns torch.int64 \(\)"),
    ],
)
def test_a_loss_that_is_not_one_number_with_a_graph_is_refused(loss: Any, returns: str) -> None:
    class Mine(OneView):
        def own_loss(self, direction: int, student: Any, key: Any) -> Any:
            return loss(student.output - key.output)

        direction = Method.direction

    with pytest.raises(UsageError, match=rf"own_loss of Mine must return one number, .*{returns}"):
        build_method(small(method=Mine), kind=Mine)


def test_a_resume_after_a_change_of_the_method_names_the_difference(tmp_path: Path) -> None:
    def mine(size: int) -> type[OneView]:
        class Mine(OneView):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                self.register_buffer("mine", torch.zeros(size))

        return Mine

    options: dict[str, Any] = {**TINY, "predictor_hidden_dim": 8, "arch": "test_resnet", "out": tmp_path / "run"}
    fastrm.pretrain("digits", method=mine(2), max_steps=1, **options)
    with pytest.raises(
        UsageError, match=r"does not fit its own settings: .* for Mine: size mismatch for mine: copying"
    ):
        fastrm.pretrain("digits", method=mine(3), max_steps=2, **options)


def test_an_incomplete_method_is_reported() -> None:
    class Silent(Method[Any]):
        def __init__(self, backbone: Any, config: Any, *, backend: str | None = None) -> None:
            super().__init__(fastrm.methods.Encoder(backbone, torch.nn.Identity()), config, backend=backend)

    with pytest.raises(UsageError, match=r"--method Silent .*: Silent has no own_loss"):
        build_method(small(method=Silent), kind=Silent)

    class ThreeViews(MoCoV2):
        views = 3

    with pytest.raises(UsageError, match=r"--method ThreeViews takes 3 views or more of an image; .* gives 2"):
        make_loader("digits", method=ThreeViews, image_size=16, batch_size=4, device="cpu", workers=0, seed=1)


def test_a_method_that_takes_three_views_is_trained_on_three(tmp_path: Path) -> None:
    seen = []

    class ThreeViews(MoCoV2):
        views = 3

        @classmethod
        def augmentation(cls, crop_min: float) -> Augmentation:
            return Augmentation(views=(View(crop_scale=(crop_min, 1.0)),) * 3)

        def forward(self, first: Tensor, second: Tensor, third: Tensor, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
            seen.append((first.shape, second.shape, third.shape))
            return super().forward(first, second + third, *rest, **options)

    result = fastrm.pretrain("digits", arch="test_resnet", method=ThreeViews, out=tmp_path / "run", max_steps=1, **TINY)
    assert result.scores["method"] == "ThreeViews"
    assert seen[-1] == ((32, 3, 16, 16),) * 3


def test_weights_of_an_unknown_method_are_scored(capsys: pytest.CaptureFixture[str]) -> None:
    assert _protocol("mocov2") == MoCoV2.linear_protocol
    assert capsys.readouterr().out == ""
    assert _protocol("theirs") == LinearProtocol()
    assert "the method theirs is not known here; trained as for mocov3" in capsys.readouterr().out


READ_OUTSIDE = {  # settings that the queue's dtype, the schedules and the step read
    "queue_dtype", "teacher_temperature_start", "teacher_temperature_warmup_epochs", "freeze_prototypes_epochs",
}  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_each_method_declares_the_settings_that_it_reads(name: str) -> None:
    read: set[str] = set()

    class Recorded(MethodConfig):
        def __getattribute__(self, attribute: str) -> Any:
            read.add(attribute)
            return super().__getattribute__(attribute)

    small = {"hidden_dim": 8, "output_dim": 4, "predictor_hidden_dim": 8, "queue_size": 16, "prototypes": 4}
    find(name)(build_backbone("test_resnet", image_size=32), Recorded(method=name, **small))
    special = set().union(*(find(other).uses for other in names()))
    assert read & special == find(name).uses - READ_OUTSIDE


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"method": "byol", "queue_size": 64},
            "--queue-size 64 has no effect with --method byol: only mocov2 and densecl read it",
        ),
        (
            {"method": "mocov2", "prototypes": 64},
            "with --method mocov2: only dino reads it",
        ),
        ({"clip_each": True}, "--clip-each has no effect without --clip-norm"),
        ({"optimizer": "sgd", "trust_coefficient": 0.1}, "--trust-coefficient has no effect without --optimizer lars"),
        ({"init_partial": True}, "--init-partial has no effect without --init-from"),
        ({"residual_weight": 0.0, "residual_warmup_epochs": 1.0}, "--residual-warmup-epochs has no effect without"),
        ({"method": "dino", "epochs": 1}, "the prototypes are never trained: --freeze-prototypes-epochs 1 of --epochs"),
    ],
)
def test_a_setting_without_effect_is_reported(settings: dict[str, Any], told: str) -> None:
    config = build(data="digits", **settings)
    (notice,) = without_effect(config, find(config.method.method))
    assert told in notice


def test_settings_with_an_effect_are_not_reported() -> None:
    for name in names():
        changed = {"temperature": 0.3} if "temperature" in find(name).uses else {}
        config = build(data="digits", method=name, epochs=3, lr=0.1, hidden_dim=16, **changed)
        assert not [*without_effect(config, find(name))]
    for recipe in recipes():
        config = build(data="digits", recipe=recipe)
        assert not [*without_effect(config, find(config.method.method))]

    class Own(find("byol")):  # type: ignore[misc]
        """A subclass that may read settings which BYOL does not."""

    assert not [*without_effect(build(data="digits", method=Own, queue_size=64), Own)]
