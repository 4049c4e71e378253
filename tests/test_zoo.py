"""Small networks of several families are trained, or refused with a reason. `make nightly PARTS=zoo` checks all
families.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from benchmarks import zoo
from fastrm.errors import UsageError
from fastrm.models.vit import is_vit, prepare_moco_vit

ARCHS = ["test_vit", "test_vit_relpos", "test_convnext", "test_nfnet", "test_coatnet"]


# Each family with two of the methods; the others are slow.
@pytest.mark.parametrize(
    ("arch", "method"),
    [
        pytest.param(arch, method, marks=() if (i + j) % len(zoo.METHODS) < 2 else pytest.mark.slow)
        for i, arch in enumerate(ARCHS)
        for j, method in enumerate(zoo.METHODS)
    ],
)
def test_two_steps_of_each_family(arch: str, method: str) -> None:
    size = 160 if arch == "test_coatnet" else 32
    config = zoo.settings(arch, method, size)
    if method == "densecl" and "vit" in arch:
        with pytest.raises(UsageError, match="--method densecl needs a backbone with a feature map"):
            zoo.two_steps(config)
    else:
        zoo.two_steps(config)


def test_a_stopped_sweep_continues_and_distinguishes_crashes_from_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    outcomes: dict[str, Exception | None] = {
        "mocov3": None, "mocov2": UsageError("--arch test_vit: no"), "byol": KeyError("x"), "densecl": None,
    }  # fmt: skip

    def two_steps(config: Any) -> None:
        asked.append(config.method.method)
        if error := outcomes[config.method.method]:
            raise error
        if config.method.method == "densecl":
            raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "two_steps", two_steps)
    monkeypatch.setattr(zoo, "size_of", lambda arch: 32)
    command = ["--out", str(tmp_path / "out"), "--models", "test_vit", "--only", *zoo.METHODS]
    with pytest.raises(KeyboardInterrupt):
        zoo.main(command)
    assert asked == ["mocov3", "mocov2", "byol", "densecl"]
    with pytest.raises(SystemExit) as status:
        zoo.main(command)  # the method that ended the process is not tried again
    assert len(asked) == 4
    assert status.value.code == 1
    outcomes["byol"] = None
    outcomes["densecl"] = UsageError("no map")
    with pytest.raises(SystemExit) as status:
        zoo.main([*command, "--again"])
    assert asked[4:] == ["byol", "densecl"]
    assert status.value.code == 0
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- zoo: begin -->\nold\n<!-- zoo: end -->\nafter\n")
    monkeypatch.setattr(zoo.timm, "list_models", lambda: ["test_vit"])
    zoo.main(["--out", str(tmp_path / "out"), "--table", str(page)])
    said = page.read_text()
    assert said.startswith("before\n")
    assert said.endswith("after\n")
    assert (
        "| vision_transformer.VisionTransformer | `test_vit` | 0.4 | 32 | yes | refused [1] | yes | refused [2] | - |"
        in said
    )
    assert "1. --arch ARCH: no\n2. no map\n" in said
    assert "old" not in said


def test_the_smallest_network_of_each_class_is_chosen() -> None:
    found = [zoo.Model("b", "m", "K", 2), zoo.Model("a", "m", "K", 1), zoo.Model("c", "n", "K", 9)]
    assert [model.arch for model in zoo.smallest(found)] == ["a", "c"]
    assert zoo.counted("test_vit")[1:] == ("vision_transformer", "VisionTransformer", sum(
        p.numel() for p in timm.create_model("test_vit").parameters()
    ))  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_vit_of_timm_can_be_prepared(record_property: Any) -> None:
    """All sizes are built without memory for their weights. Each part that is left out has a reason."""
    other: set[str] = set()
    reasons: dict[str, int] = {}
    for arch in timm.list_models():
        with torch.device("meta"):
            net = timm.create_model(arch, num_classes=0)
            if type(net).__name__ in other:
                continue
            if not is_vit(net):
                other.add(type(net).__name__)
                continue
            for reason in prepare_moco_vit(net):
                reasons[reason] = reasons.get(reason, 0) + 1
    record_property("left out", json.dumps(reasons))
    assert reasons
    assert "VisionTransformer" not in other
