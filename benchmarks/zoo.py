"""Trains the smallest model of each timm class for two steps with each method, and writes and reads its weights.

python -m benchmarks.zoo --out build/zoo/latest --shard 1/4

Each result is a line in ``--out``, and is not computed again: a stopped sweep continues, and shards may run in
parallel.
``--table docs/backbones.md`` writes the results into the page. The command ends with status 1 if something crashed:
each model must be trained, or refused with a reason.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from fastrm.data import Batch
from fastrm.errors import UsageError, first_line
from fastrm.export import ExportConfig, export
from fastrm.methods import Method, build_method
from fastrm.models import build_backbone, read_backbone
from fastrm.models.weights import load_weights, metadata, read_weights, write_backbone
from fastrm.optim import build_optimizer
from fastrm.optim.schedules import Rates
from fastrm.probes.gap import stages_of
from fastrm.run.step import Step
from fastrm.settings.config import Config, build

METHODS = ("mocov3", "mocov2", "byol", "densecl")
ROUND = "file"
"""Name of the column for files: weights are written, read, used as a start, and exported to timm."""
BEGUN = "crash: the process ended"
LARGEST = 30_000_000
SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
BATCH = 4


class Model(NamedTuple):
    """The smallest model of a class in one of timm's files."""

    arch: str
    module: str
    kind: str
    params: int


def counted(arch: str) -> Model:
    """A model's class and size, without memory for its weights."""
    with torch.device("meta"):
        net = timm.create_model(arch, pretrained=False)
    module = timm.model_entrypoint(arch).__module__.rpartition(".")[2]
    return Model(arch, module, type(net).__name__, sum(p.numel() for p in net.parameters()))


def smallest(found: list[Model]) -> list[Model]:
    """The smallest of each class, by class."""
    best: dict[tuple[str, str], Model] = {}
    for model in sorted(found, key=lambda m: (m.params, m.arch)):
        best.setdefault((model.module, model.kind), model)
    return [best[key] for key in sorted(best)]


def census(out: Path, archs: list[str]) -> list[Model]:
    """Class and size of every model, cached next to ``out``; missing models are counted and added."""
    path = out.parent / f"census-timm-{timm.__version__}.jsonl"
    known = {row[0]: Model(*row) for row in _lines(path)}
    for arch in archs:
        if arch not in known:
            known[arch] = counted(arch)
            _append(path, known[arch])
    return list(known.values())


def settings(arch: str, method: str, image_size: int) -> Config:
    """Settings of a small run of two steps."""
    return build(
        data="digits", arch=arch, method=method, image_size=image_size, batch_size=BATCH, epochs=1, optimizer="adamw",
        hidden_dim=16, output_dim=16, predictor_hidden_dim=16, queue_size=32, device="cpu", lr=1e-3, stem="imagenet",
    )  # fmt: skip


def size_of(arch: str) -> int:
    """The smallest image size that the model takes, or its own.

    Raises:
        UsageError: it takes none of the sizes.
    """
    published = timm.models.get_pretrained_cfg(arch, allow_unregistered=True)
    own = published.input_size[-1] if published is not None else 224
    for size in [size for size in SIZES if size < own]:
        try:
            build_backbone(arch, image_size=size, stem="imagenet")
            return size
        except UsageError:
            continue
    build_backbone(arch, image_size=own, stem="imagenet")
    return own


def two_steps(config: Config) -> Method[Any]:
    """Train, and check that the loss is finite and that the trained parameters and the teacher changed."""
    torch.manual_seed(0)
    method = build_method(config)
    start = {name: p.detach().clone() for name, p in method.named_parameters()}
    layout = torch.channels_last if config.device.channels_last else torch.contiguous_format
    step = Step(
        method, build_optimizer(method, config.optim), precision="fp32", accumulate=1, clip_norm=None, layout=layout
    )
    size = config.input.image_size
    for _ in range(2):
        views = torch.randn(2, BATCH, 3, size, size)
        (output,) = step([Batch((views[0], views[1]), [])], Rates(1e-3, 0.1, 0.9), measure=True)
        if not math.isfinite(float(output.loss)) or step.check(2):
            raise ArithmeticError(f"the loss is {float(output.loss)}, or its gradient is not finite")
    moved = {name: not torch.equal(p, start[name]) for name, p in method.named_parameters()}
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    for name, has in moved.items():
        led = "student." + name.removeprefix("teacher.") if name.startswith("teacher.") else name
        if has and led not in trained:
            raise ArithmeticError(f"{name} is frozen and moved")
    # Not all parameters change: a bias of relative positions has no gradient if a window has one position.
    for names in (trained, {"teacher." + n.removeprefix("student.") for n in trained if n.startswith("student.")}):
        if sum(moved[name] for name in names) < len(names) / 2:
            raise ArithmeticError(f"fewer than half of {len(names)} parameters changed; {min(names)} did not")
    return method


def there_and_back(arch: str, image_size: int) -> None:
    """Write the weights, read them, start another run from them, and export them to timm."""
    config = settings(arch, "mocov2", image_size)
    torch.manual_seed(1)
    method = build_method(config)
    images = torch.randn(2, 3, image_size, image_size)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder, "backbone.safetensors")
        write_backbone(path, method.student.backbone, metadata(config.flat(), "student"))
        want = method.student.backbone.eval()(images)
        again, _ = read_backbone(path)
        with stages_of(again.eval()) as caught:
            torch.testing.assert_close(again(images), want, rtol=1e-4, atol=1e-5)
        if not all(len(stage.flatten(1)) == 2 for stage in caught.values()):
            raise AssertionError("a stage has no row per image")
        other = build_method(config)
        if left_out := load_weights(other.student.backbone, read_weights(path).tensors, source="--init-from"):
            raise AssertionError(f"{left_out} were treated as a classifier")
        torch.testing.assert_close(other.student.backbone.eval()(images), want, rtol=1e-4, atol=1e-5)
        classifier = timm.create_model(arch, num_classes=5, **again.options).state_dict()
        load_weights(again, classifier, source="a classifier of timm's")
        export(ExportConfig(checkpoint=path, format="timm", out=Path(folder, "timm")))
        network = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
        exported = network.forward_head(network.forward_features(images), pre_logits=True).flatten(1)
        torch.testing.assert_close(exported, want, rtol=1e-4, atol=1e-5)


def outcome(ask: Callable[[], object]) -> str:
    """``ok``, ``refused: …`` or ``crash: …``."""
    try:
        ask()
    except UsageError as error:
        return f"refused: {first_line(error)}"
    except Exception as error:
        return f"crash: {type(error).__name__}: {first_line(error)}"
    return "ok"


def tried(
    model: Model, columns: tuple[str, ...], known: dict[tuple[str, str], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the results of a model for the columns that are missing."""
    left = [column for column in columns if (model.arch, column) not in known]
    if not left:
        return
    size = 0

    def find_size() -> None:
        nonlocal size
        size = size_of(model.arch)

    if (built := outcome(find_size)) != "ok":
        yield from ({**model._asdict(), "column": column, "size": None, "outcome": built} for column in left)
        return
    for column in left:
        ask: Callable[[], object] = (
            (lambda: there_and_back(model.arch, size))
            if column == ROUND
            else (lambda column=column: two_steps(settings(model.arch, column, size)))
        )
        yield {**model._asdict(), "column": column, "size": size, "outcome": BEGUN}
        yield {**model._asdict(), "column": column, "size": size, "outcome": outcome(ask)}


def table(models: list[Model], known: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Results in Markdown: one row per class, and the reasons below."""
    columns = (*METHODS, ROUND)
    rows = ["| timm class | smallest model | M parameters | pixels | " + " | ".join(columns) + " |"]
    rows.append("|---|---|--:|--:|" + "---|" * len(columns))
    reasons: dict[str, int] = {}
    tally: Counter[str] = Counter()
    for model in models:
        cells, size = [], "-"
        for column in columns:
            answer = known.get((model.arch, column))
            if model.params > LARGEST:
                cells.append("larger")
                continue
            if answer is None:
                cells.append("-")
                continue
            size = str(answer["size"] or "-")
            word, _, reason = answer["outcome"].partition(": ")
            tally[word] += 1
            note = f" [{reasons.setdefault(_general(reason, model.arch), len(reasons) + 1)}]" if reason else ""
            cells.append("yes" if word == "ok" else word + note)
        rows.append(
            f"| {model.module}.{model.kind} | `{model.arch}` | {model.params / 1e6:.1f} | {size} | "
            + " | ".join(cells)
            + " |"
        )
    counts = ", ".join(f"{count} {'trained' if word == 'ok' else word}" for word, count in tally.items())
    listed = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([f"Of the answers below: {counts}.", "", *rows, "", "Reasons:", "", *listed, ""])


def _general(reason: str, arch: str) -> str:
    """A reason without the parts that differ between models."""
    return re.sub(r"--image-size \d+", "--image-size N", reason.replace(arch, "ARCH"))[:300]


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _append(path: Path, answer: Any) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(answer) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/zoo/latest"), help="folder of the answers")
    parser.add_argument("--shard", default="1/1", help="part of the classes, such as 2/4")
    parser.add_argument("--only", nargs="+", choices=(*METHODS, ROUND), default=(*METHODS, ROUND))
    parser.add_argument("--models", nargs="+", help="only these models, whatever their class and size")
    parser.add_argument("--table", type=Path, help="page whose table is written again; nothing is trained")
    parser.add_argument("--again", action="store_true", help="repeat models that crashed")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    number, _, parts = options.shard.partition("/")
    models = smallest(census(options.out, options.models or timm.list_models()))
    answers = [row for path in sorted(options.out.glob("answers-*.jsonl")) for row in _lines(path)]
    known = {(row["arch"], row["column"]): row for row in answers}
    if options.again:
        known = {key: row for key, row in known.items() if not row["outcome"].startswith("crash")}
    if options.table:
        page = options.table.read_text()
        start, end = "<!-- zoo: begin -->\n", "<!-- zoo: end -->"
        before, after = page.split(start)[0], page.split(end)[1]
        options.table.write_text(before + start + "\n" + table(models, known) + "\n" + end + after)
        return
    if options.models:
        models = [model for model in census(options.out, []) if model.arch in options.models]
    crashes = sum(row["outcome"].startswith("crash") for row in known.values())
    for model in models[int(number) - 1 :: int(parts)]:
        if model.params > LARGEST and not options.models:
            continue
        for answer in tried(model, tuple(options.only), known):
            _append(options.out / f"answers-{number}.jsonl", answer)
            if answer["outcome"] == BEGUN:  # the process of this result died
                continue
            crashes += answer["outcome"].startswith("crash")
            print(f"{answer['column']:8} {model.arch:40} {answer['size']} {answer['outcome']}", flush=True)
    raise SystemExit(crashes > 0)


if __name__ == "__main__":
    main()
