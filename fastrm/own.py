"""Recognises files that fastrm wrote by their content, since it never overwrites or removes any other file.

New files carry a mark. Older files without one are recognised by their content or, if that is not sufficient, by lying
in a run folder.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastrm.errors import UsageError
from fastrm.files import as_utf8, read_json

MARK = "fastrm"
"""The mark in a file: the name of a field whose value is the version, or the name of the software."""
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
EXPORT = "fastrm_export"
"""The attribute with the mark of the state dict in an exported ``.pth``."""
_HEAD = 2**16  # bytes at the start of a file that hold its mark


def require(
    flag: str, out: Path, wrote: Callable[[Path], bool], *, what: str = "a file", holds: Path | None = None
) -> None:
    """Raise a UsageError that names the file if there is one that fastrm did not write.

    Args:
        flag: the setting with the path.
        out: its value.
        wrote: function that says whether fastrm wrote an existing file.
        what: the kind of the file, for the message.
        holds: the file to check, if it lies in the folder ``out``.
    """
    path = holds or out
    dangling = path.is_symlink() and not path.exists()
    if not dangling and (not path.exists() or safely(wrote, path)):
        return
    if holds is None:
        why = f"{out} is " + ("a link to nowhere" if dangling else f"there and not {what} that fastrm wrote")
    else:
        why = f"{out} holds {holds.relative_to(out)}, which " + (
            "is a link to nowhere" if dangling else "fastrm did not write"
        )
    raise UsageError(as_utf8(f"{flag} {why}; give another {flag}, or move it away"))


def safely(wrote: Callable[[Path], bool], path: Path) -> bool:
    """Apply ``wrote``; a file that cannot be read or has another format was not written by fastrm."""
    try:
        return wrote(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def head(path: Path) -> bytes:
    """The first 64 KiB of a file."""
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _json(path: Path, *names: str) -> dict[str, Any] | None:
    """The object in a JSON file if it has these names, otherwise None."""
    found = read_json(path)
    return found if isinstance(found, dict) and found.keys() >= set(names) else None


def config(path: Path) -> bool:
    """``config.json``, the settings of a run."""
    return _json(path, "data", "arch", "method", "residual_weight", "teacher_momentum", "resume") is not None


def run(folder: Path) -> bool:
    """Whether a folder is a run folder."""
    return (folder / "config.json").is_file() and safely(config, folder / "config.json")


def metrics(path: Path) -> bool:
    """``metrics.jsonl``, the records of a run. If not even the first record is complete, the folder decides."""
    first, end, _ = head(path).partition(b"\n")
    if not end:
        return run(path.parent)
    names = json.loads(first).keys()
    return {"step", "epoch"} <= names and any(n in names for n in ("contrastive", "knn_student", "verify_loss"))


def checkpoint(path: Path) -> bool:
    """``checkpoint.pt`` and earlier checkpoints, also truncated ones, since the settings are at the start."""
    start = head(path)
    return start.startswith(b"PK") and all(name in start for name in (b"format", b"method", b"residual_weight"))


def weights(path: Path) -> bool:
    """Safetensors with a backbone, from a run or an export."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).keys() >= {MARK, "which", "arch"}
    except safetensors.SafetensorError:
        return False


def summary(path: Path) -> bool:
    """``summary.json``, the results of a complete run."""
    return _json(path, MARK, "step", "residual_weight") is not None


def evaluation(path: Path) -> bool:
    """The results of an evaluation, under any file name."""
    found = _json(path, MARK, "sets")
    return found is not None and isinstance(found["sets"], dict)


def features(path: Path) -> bool:
    """The description of a file of features."""
    return _json(path, MARK, "about", "checkpoint") is not None


def skipped(path: Path) -> bool:
    """``skipped.txt`` in a run folder, with one broken file and the reason per line."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return run(path.parent) and all("\t" in line for line in lines)


def trace(path: Path) -> bool:
    """``trace.json``, the profile of a run; old ones have no mark, and the settings of the run decide."""
    start = head(path)
    said = f'"{MARK}":'.encode() in start
    old = b'"schemaVersion"' in start and run(path.parent) and read_json(path.parent / "config.json")["profile"] > 0
    return said or old


EVENTS = f".{MARK}"
"""Ending of the names of TensorBoard files."""


def events(path: Path) -> bool:
    """A file in ``tensorboard/``. Old files have another ending, and begin with a run's values or are empty."""
    if not path.is_file() or not path.name.startswith("events.out.tfevents."):
        return False
    start = head(path)
    known = any(name in start for name in (b"contrastive", b"knn_student", b"verify_loss")) or len(start) < 200
    return path.name.endswith(EVENTS) or (known and run(path.parent.parent))


def board(path: Path) -> bool:
    """``tensorboard/``, if it is empty or holds events of a run; other files in it are not touched."""
    there = list(path.iterdir())
    return not there or run(path.parent) or any(safely(events, file) for file in there)


def page(path: Path) -> bool:
    """The page of a report."""
    start = head(path)
    old = b"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
    return f"<meta name='generator' content='{MARK} ".encode() in start or start.startswith(old)


def pages(path: Path) -> bool:
    """``report/`` in a run folder, with no page or a page by fastrm."""
    return path.is_dir() and (not (path / "index.html").exists() or page(path / "index.html"))


SHEET_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Formats of contact sheets by file ending; they can hold the comment by which fastrm recognises them."""
SHEET = b"contact sheet of fastrm"
"""The comment in a contact sheet."""


def sheet(path: Path) -> bool:
    """A contact sheet of ``fastrm.data``."""
    with open(path, "rb") as file:  # fast, because it is called for each image in a folder
        return SHEET in file.read(512)


MAP = "map"
"""The kind of a file with a map of images."""


def points(path: Path) -> bool:
    """A map of images, as points."""
    return re.match(rf'\{{\s*"{MARK}": "[^"]*",\s*"{MAP}": '.encode(), head(path)) is not None


def card(path: Path) -> bool:
    """A model card."""
    start = head(path).decode("utf-8", "replace")
    front = re.match(r"---\n(.*?)\n---\n", start, re.DOTALL)
    old = "\nPre-trained without labels by fastrm " in start
    return front is not None and (f"\ngenerator: {MARK} " in front[0] or old)


def exported(path: Path) -> bool:
    """Exported safetensors, as opposed to the backbone in a run folder."""
    return weights(path) and not (path.name == "backbone.safetensors" and run(path.parent))


def onnx(path: Path) -> bool:
    """An exported ONNX graph, whose metadata are at its end."""
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _HEAD))
        end = file.read()
    return f"\x0a{chr(len(MARK))}{MARK}".encode() in end and b"image_size" in end


def state(path: Path) -> bool:
    """An exported ``.pth``; old ones have no mark, and are recognised by the model card beside them."""
    beside = path.with_suffix(".md")
    if beside.is_file() and card(beside) and f'"{path.name}"' in beside.read_text(encoding="utf-8"):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return EXPORT.encode() in archive.read(name)
    except zipfile.BadZipFile:
        return False


def pickled(path: Path) -> bool:
    """A ``.pkl`` for Detectron2. It is not loaded, because a pickle can run code."""
    start = head(path)
    return start.startswith(b"\x80") and b"__author__" in start[:64] and MARK.encode() in start[:64]


def preprocessor(path: Path) -> bool:
    """The ``preprocessor_config.json`` of an export for transformers."""
    return _json(path, MARK, "image_processor_type") is not None


def export_config(path: Path) -> bool:
    """The ``config.json`` of an export for timm or transformers; old ones do not say it, but lie beside its weights."""
    if _json(path, MARK, "architecture") or _json(path, MARK, "model_type"):
        return True
    neighbour = path.with_name("model.safetensors")
    return _json(path, "architecture", "pretrained_cfg") is not None and neighbour.is_file() and weights(neighbour)


EXPORTS = "export"
"""The folder in a run folder with the exports of ``--export``."""
_OF_EXPORT: dict[str, Callable[[Path], bool]] = {
    "config.json": export_config,
    "preprocessor_config.json": preprocessor,
    ".md": card,
    ".safetensors": exported,
    ".pth": state,
    ".onnx": onnx,
    ".pkl": pickled,
}


def of_export(path: Path) -> bool:
    """A file of an export, by its name or its ending."""
    wrote = _OF_EXPORT.get(path.name) or _OF_EXPORT.get(path.suffix)
    return wrote is not None and wrote(path)


BEST, BEST_SCORE = "checkpoint-best.pt", "best.json"
"""The checkpoint with the best score, and the file with that score."""


def best(path: Path) -> bool:
    """``best.json``, the step with the best score."""
    return _json(path, MARK, "step", "score", "value") is not None


RUN: dict[str, Callable[[Path], bool]] = {
    "config.json": config,
    METRICS: metrics,
    TENSORBOARD: board,
    "checkpoint.pt": checkpoint,
    BEST: checkpoint,
    BEST_SCORE: best,
    "backbone.safetensors": weights,
    "summary.json": summary,
    "skipped.txt": skipped,
    "trace.json": trace,
    "evaluation.json": evaluation,
    "report": pages,
}
"""Files that fastrm writes to a run folder, in addition to ``checkpoint-STEP.pt``."""


def names(folder: Path) -> Iterable[tuple[Path, Callable[[Path], bool]]]:
    """Yield the entries of a folder whose names fastrm uses, with the function that recognises its own."""
    for path in sorted(folder.iterdir()):
        known = checkpoint if re.fullmatch(r"checkpoint-\d+\.pt", path.name) else RUN.get(path.name)
        if known is not None:
            yield path, known
