"""The model card beside an export."""

from __future__ import annotations

from pathlib import Path

from fastrm import own
from fastrm.data.formats import PixelFormat
from fastrm.evaluated import evaluated, rows
from fastrm.exports.base import Subject
from fastrm.files import published_name
from fastrm.version import __version__


def model_card(subject: Subject, kind: str, loading: str, checked: str) -> str:
    """Return a description of the weights in Markdown: training, scores, images, loading.

    Args:
        subject: the network.
        kind: the format.
        loading: Python code that loads the file.
        checked: the sentence on the comparison with the library.
    """
    about = subject.about
    size, arch, method = about["image_size"], about["arch"], about["method"]  # no method: weights of others
    front = f"---\nlibrary_name: {kind}\ngenerator: {own.MARK} {__version__}\n"
    front += f"tags: [image-feature-extraction, self-supervised, {arch}]\n---\n"
    lines = [
        front,
        f"# {arch}" + (f", {about['which']} of {method} with residual momentum" if method else ""),
        "",
        f"{'Pre-trained without labels' if method else 'Written'} by fastrm {about['fastrm']}. "
        f"Images in, {subject.backbone.dim} pooled features out.",
        "",
        "```python",
        loading,
        "```",
        "",
        f"**Check:** {checked}.",
        "",
        *_images(subject.pixels, size),
        *_trained_how(subject),
        *_scored(subject),
        *_licence(subject),
    ]
    return "\n".join(lines) + "\n"


def _images(pixels: PixelFormat, size: str) -> list[str]:
    """The images that the network takes, and the code that makes them from stored values."""
    plain = pixels.plain()
    mean, std = plain["mean"], plain["std"]
    what = "RGB" if pixels.rgb else f"{pixels.channels} channel{'s' * (pixels.channels != 1)}"
    if not pixels.limits:
        return [f"**Images:** {what}, {size}x{size} pixels, as the run's own augmentation made them."]
    pages = " (the bands of all pages, one page after the other)" if pixels.pages == "bands" else ""
    limits = "; ".join(f"{dtype} {low} and {high}" for dtype, (low, high) in plain["limits"].items())
    return [
        f"**Images:** {what} in [0, 1], {size}x{size} pixels, less the mean {mean}, divided by {std}.",
        "",
        f"What becomes 0 and what becomes 1, per channel or in all, by a file's dtype: {limits}. From a NumPy "
        f"array [{size}, {size}, {pixels.channels}] of such values{pages} to what the network takes:",
        "",
        "```python",
        "def prepared(values):",
        f"    low, high = {plain['limits']}[values.dtype.name]",
        "    scaled = numpy.nan_to_num((values - numpy.array(low)) / numpy.subtract(high, low), posinf=0, neginf=0)",
        f"    normalised = (scaled - {mean}) / {std}",
        "    return torch.from_numpy(normalised).permute(2, 0, 1)[None].float()",
        "```",
    ]


def _trained_how(subject: Subject) -> list[str]:
    if subject.settings is None:
        return []
    flat = {**subject.settings, "data": published_name(subject.settings["data"])}
    names = [
        *("data", "recipe", "method", "residual_weight", "residual_at", "residual_warmup_epochs", "teacher_momentum"),
        *("teacher_momentum_end", "temperature", "optimizer", "lr", "weight_decay", "batch_size", "epochs", "seed"),
    ]
    rows = [f"| {name} | {flat[name]} |" for name in names if flat.get(name) is not None]
    weight = flat.get("residual_weight") or 0
    term = f"The residual term, 2 - 2 cos between student and teacher on the same view, has the weight {weight:g}."
    return ["", f"## Training, {subject.step} steps", "", "| setting | value |", "|---|---|", *rows, "", term]


def _scored(subject: Subject) -> list[str]:
    """The tables of scores of these weights, if there are any."""
    lines = []
    for images, scores in evaluated(subject.folder, subject.step).items():
        head, *body = rows(scores, f"{images}, % right")
        lines += ["", *(f"| {' | '.join(row)} |" for row in (head, ["---", *["--:"] * (len(head) - 1)], *body))]
    note = "With 95 % intervals by the bootstrap over test images, paired where two networks are compared."
    return ["", "## Scores", "", note, *lines] if lines else []


def _licence(subject: Subject) -> list[str]:
    """The licence of the weights."""
    if subject.settings is None:
        found = f": {subject.license}" if subject.license else ""
        return ["", "## Licence", "", f"That of the weights that this file was made from applies{found}."]
    lines = [
        "The weights are yours: fastrm's licence does not cover them. Name the licence under which you share them."
    ]
    if start := subject.settings.get("init_from"):
        lines.append(f"They started from {_named(str(start))}, whose licence may apply to them.")
    return ["", "## Licence", "", *lines]


def _named(start: str) -> str:
    """The name of the start weights, without their folder."""
    return start if start.startswith(("timm:", "hf:")) else Path(start).name
