"""The gap between student and teacher, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastrm.data.sources import Images
from fastrm.machine.device import in_double
from fastrm.machine.meeting import everyone
from fastrm.methods import Method
from fastrm.models import Backbone
from fastrm.probes.features import Setting, evaluating, of_round, rounds
from fastrm.probes.scores import Estimate
from fastrm.terminal.progress import bar


@contextmanager
def stages_of(backbone: Backbone, called: nn.Module | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the backbone's stages, by timm's names, while it runs; empty if timm names none.

    Only outputs that are one tensor with a row per image are collected.

    Args:
        backbone: backbone with the stages.
        called: module around it that is called with the images; None means the backbone itself.
    """
    caught: dict[str, Tensor] = {}
    modules = dict(backbone.net.named_modules())
    images = 0
    hooks: list[Any] = []

    def begin(_: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal images
        images = len(inputs[0])

    hooks.append((backbone if called is None else called).register_forward_pre_hook(begin))
    for info in getattr(backbone.net, "feature_info", None) or []:
        name = info.get("module") if isinstance(info, dict) else None

        def catch(_: nn.Module, __: Any, output: Any, name: Any = name) -> None:
            if isinstance(output, Tensor) and output.ndim > 1 and len(output) == images:
                caught[name] = output

        if name and name in modules:
            hooks.append(modules[name].register_forward_hook(catch))
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def gap(method: Method[Any], images: Images, setting: Setting) -> dict[str, Estimate]:
    """1 - mean cosine between student and teacher on the same image.

    The networks are in evaluation mode, and the images are not augmented; the gap that training logs is on augmented
    views in training mode. All processes share the images; call this in all of them.

    Returns:
        A value per place, in the order of the network. The backbone's stages come first, by timm's names and with whole
        maps, then ``backbone`` (pooled), ``projector`` and ``output``, the places of ``--residual-at``.
    """
    own: dict[str, tuple[float, float]] = {}
    count = 0
    with (
        evaluating(method),
        stages_of(method.student.backbone, method.student) as ours,
        stages_of(method.teacher.backbone, method.teacher) as theirs,
        bar(f"gap, {len(images):,} images", len(images)) as task,
    ):
        for number, (views, _) in enumerate(rounds(images, setting)):
            count += len(views)
            task.advance(of_round(images, number))
            if not len(views):
                continue
            student, teacher = method.encode_student(views), method.teacher(views)
            pairs = {name: (ours[name], theirs[name]) for name in ours}
            pairs |= {n: (getattr(student, n), getattr(teacher, n)) for n in ("backbone", "projector", "output")}
            for name, (a, b) in pairs.items():
                each = 1 - nn.functional.cosine_similarity(in_double(a.flatten(1)), in_double(b.flatten(1)))
                total, squares = own.get(name, (0.0, 0.0))
                own[name] = total + float(each.sum()), squares + float(each.square().sum())
    every, counts = zip(*everyone((own, count)), strict=True)
    names = dict.fromkeys(name for sums in every for name in sums)
    parts = {name: [sums.get(name, (0.0, 0.0)) for sums in every] for name in names}
    return {
        name: Estimate.of_mean(sum(total for total, _ in pairs), sum(squares for _, squares in pairs), sum(counts))
        for name, pairs in parts.items()
    }
