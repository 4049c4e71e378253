"""Write the features of all images of a collection, in order, for search, clustering and classifiers.

python -m fastrm.embed runs/mine --data photos --out features.npy
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from fastrm import own
from fastrm.data import open_source, sheets
from fastrm.data.scan import counted, require_readable, scan
from fastrm.data.settling import formatted
from fastrm.data.sources import Images
from fastrm.errors import UsageError
from fastrm.files import as_utf8, check_folder, read_json, write_json, write_whole, writing
from fastrm.machine.device import choose_device
from fastrm.machine.distributed import started_alone
from fastrm.machine.joined import ordinary
from fastrm.machine.memory import enough
from fastrm.packages import optional
from fastrm.pretrained import Pretrained, open_pretrained
from fastrm.probes.embedding import about, embed, looked_up, plain, projected, umap_module
from fastrm.probes.features import Setting
from fastrm.probes.neighbours import directions
from fastrm.reports import maps
from fastrm.settings import command_line
from fastrm.settings.inputs import Workers
from fastrm.settings.kinds import Range, checked
from fastrm.settings.of_run import OfRunAndImages
from fastrm.terminal import shell
from fastrm.version import __version__

_DRAWN = 5_000  # points of a map, drawn at random from more
_AT_ONCE = 2**16  # rows of a table that are written at a time


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(OfRunAndImages):
    """Write the features of images, a row per image, with the names of the images beside them."""

    out: Path
    """Array file NAME.npy, or table NAME.parquet.
    NAME.jsonl beside it has the name and label of each row, and NAME.json describes the features.
    The same command continues where it was interrupted."""
    part: Literal["train", "test"] = "train"
    """Part of a set that has two."""
    which: Literal["student", "teacher"] = "student"
    """Network whose features are written."""
    patches: bool = False
    """Write the feature map [h, w, D] of each image instead of its mean [D]."""
    dtype: Literal["float32", "float16"] = "float32"
    """Dtype of the array."""
    queries: tuple[Path, ...] = ()
    """Images to find the nearest images of; labels are not needed."""
    neighbours: Path | None = None
    """Image file to draw. Each row has a query, and beside it the images with the nearest features by cosine."""
    k: Annotated[int, Range(at_least=1)] = 5
    """Nearest images per query."""
    map: Path | None = None
    """Image file to draw, or NAME.json. It shows at most 5,000 images as points, coloured by label.
    fastrm.report makes a NAME.json in the run folder an interactive chart."""
    projection: Literal["pca", "umap"] = "pca"
    """Places of the points of --map: by the first two principal components of the features, or by UMAP."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to compute on. auto is the GPU if there is one."""
    workers: Workers = 2
    """Processes that read the images."""


def features(options: EmbedConfig, *, arch: nn.Module | None = None) -> NDArray[Any]:
    """Write the features, and draw the neighbours and the map if the options ask for them.

    Args:
        options: network, images and files.
        arch: for a run with a module of yours, another module that is built alike.

    Returns:
        The features [N, D] or [N, h, w, D], memory-mapped from the array file; with ``--out NAME.parquet`` from
        ``NAME.npy``.

    Raises:
        UsageError: the network, the images or a file cannot be used. Files that fastrm did not write stay unchanged.
    """
    options = checked(options)
    _check(options)
    device = choose_device(options.device)
    lower = "Lower --workers" + ("; or give --device cpu" if device.type == "cuda" else "")
    with ordinary(device), enough(device, lambda: f"features of {options.path}", lower), writing(options.out):
        return _features(options, device, arch)


def _features(options: EmbedConfig, device: torch.device, arch: nn.Module | None) -> NDArray[Any]:
    trained = open_pretrained(options.path, device, arch=arch or options.arch, **options.of_others)
    backbone = trained.network(options.which, f"--which {options.which}")
    setting = Setting(trained.image_size, device, options.workers)
    queries = _queries(options, trained)
    name, images = _images(options, trained)
    wanted = about(backbone, images, setting, patches=options.patches, dtype=options.dtype)
    array, beside = (options.out.with_suffix(end) for end in (".npy", ".json"))
    described, earlier = plain(wanted), _earlier(options.out)
    if earlier is not None and earlier["about"] == described and array.is_file():
        found = np.asarray(np.load(array, mmap_mode="r"))
        print(f"complete   {array} has these features")
    else:
        # The description is written first, so that an interrupted array is recognised as fastrm's.
        array.unlink(missing_ok=True)
        of = {"checkpoint": str(options.path), "which": options.which, "data": options.data}
        written = {own.MARK: __version__, "about": described, **of}
        write_json(beside, written)
        _list(options.out.with_suffix(".jsonl"), images)
        found = embed(backbone, images, setting, array, wanted, patches=options.patches)
        if images.unreadable:
            unread = {as_utf8(images.name(index)): why for index, why in images.unreadable.items()}
            write_json(beside, {**written, "not_read": unread})
            print(f"not read   {len(unread)} images, whose rows are NaN; {beside} says why")
    print(f"features   {array}: {' x '.join(map(str, found.shape))}, {found.dtype}")
    if options.out.suffix == ".parquet":
        _table(options.out, found, images)
        print(f"table      {options.out}")
    if options.neighbours is not None and queries is not None:
        sheets.save("--neighbours", options.neighbours, _nearest(options, backbone, queries, setting, images, found))
        print(f"{options.neighbours}: the query images, each with its nearest images")
    if options.map is not None:
        shown = _map(options, trained, found, images, name)
        maps.save("--map", options.map, shown)
        print(f"map        {options.map}: {shown.about}")
    return found


def _check(options: EmbedConfig) -> None:
    out = options.out
    if not started_alone():
        raise UsageError("fastrm.embed runs in one process; start it without torchrun")
    if out.suffix not in (".npy", ".parquet"):
        raise UsageError(f"--out {out} must end in .npy or .parquet")
    if out.suffix == ".parquet":
        if options.patches:
            raise UsageError(f"--patches is written to arrays only; give --out {out.with_suffix('.npy')}")
        optional("pyarrow", extra="tables", wanted_by=f"--out {out}")
    check_folder("--out", out)
    if bool(options.queries) != (options.neighbours is not None):
        raise UsageError("--queries and --neighbours must be given together: query images, and the image file to draw")
    if options.projection != "pca" and options.map is None:
        raise UsageError(f"--projection {options.projection} is for a map; give --map FILE too")
    if options.projection == "umap":
        umap_module()
    for name, check in (("neighbours", sheets.check), ("map", maps.check)):
        if (path := getattr(options, name)) is not None:
            check(f"--{name}", path)
            if options.patches:
                raise UsageError(f"--{name} needs one row per image; leave --patches out")
    if options.map == out.with_suffix(".json"):
        raise UsageError(f"--map {options.map} is the file that describes the features of --out {out}; give another")
    mine = _earlier(out) is not None
    for end in (".npy", ".parquet", ".json", ".jsonl"):
        own.require("--out", out.with_suffix(end), lambda _: mine)


def _earlier(out: Path) -> dict[str, Any] | None:
    """The description beside features that fastrm wrote; None if there are none."""
    path = out.with_suffix(".json")
    return read_json(path) if path.is_file() and own.safely(own.features, path) else None


def _images(options: EmbedConfig, trained: Pretrained) -> tuple[str, Images]:
    """The name of the set, and its readable images; what is left out is reported."""
    source, broken = scan(trained.images(options), workers=options.workers)
    source = formatted(source, trained.pixels)
    images = source.train if options.part == "train" else source.test
    if images is None:
        raise UsageError(f"--part test: {source.name} has one part")
    print(f"data       {source.about}")
    if broken:
        print(f"left out   {counted(broken)}")
    return source.name, images


def _queries(options: EmbedConfig, trained: Pretrained) -> Images | None:
    """The query images, which are read before the work; None if there are none."""
    if not options.queries:
        return None
    queries = formatted(open_source([*options.queries], keep=False), trained.pixels).train
    require_readable("--queries", queries, range(len(queries)))
    return queries


def _list(path: Path, images: Images) -> None:
    """Write the name of each row, and its label if there are labels."""
    labels = None if images.labels is None else images.labels.tolist()

    def write(partial: Path) -> None:
        with open(partial, "w", encoding="utf-8") as file:
            for index in range(len(images)):
                # Bytes of a name that are not UTF-8 are lone surrogates, which JSON can write as ASCII.
                row = {"name": images.name(index)} | ({} if labels is None else {"label": labels[index]})
                file.write(json.dumps(row) + "\n")

    write_whole(path, write)


def _table(path: Path, found: NDArray[Any], images: Images) -> None:
    """Write names, labels and features as Parquet."""
    arrow, parquet = (
        optional(name, extra="tables", wanted_by=f"--out {path}") for name in ("pyarrow", "pyarrow.parquet")
    )
    labels = images.labels
    kind = arrow.list_(arrow.from_numpy_dtype(found.dtype), found.shape[1])
    fields = [("name", arrow.string()), *([] if labels is None else [("label", arrow.int64())]), ("features", kind)]
    schema = arrow.schema(fields).with_metadata({own.MARK: __version__})

    def write(partial: Path) -> None:
        with parquet.ParquetWriter(partial, schema) as writer:
            for start in range(0, len(found), _AT_ONCE):
                rows = found[start : start + _AT_ONCE]
                values = arrow.array(np.ascontiguousarray(rows).reshape(-1))
                columns: dict[str, Any] = {"name": [as_utf8(images.name(start + i)) for i in range(len(rows))]}
                columns |= {} if labels is None else {"label": labels[start : start + len(rows)]}
                columns["features"] = arrow.FixedSizeListArray.from_arrays(values, found.shape[1])
                writer.write_table(arrow.table(columns, schema=schema))

    write_whole(path, write)


def _nearest(
    options: EmbedConfig, backbone: nn.Module, queries: Images, setting: Setting, images: Images, found: NDArray[Any],
) -> Image.Image:  # fmt: skip
    """Draw the contact sheet of the queries."""
    rows, indices = directions(backbone, queries, setting)
    near = looked_up(found, rows.cpu(), k=options.k).tolist()
    each = zip(indices, near, strict=True)
    pairs = [(queries.name(i), [queries.picture(i), *map(images.picture, row)]) for i, row in each]
    drawn = [sheets.Row(name, "", [sheets.Tile(sheets.whole(picture)) for picture in seen]) for name, seen in pairs]
    return sheets.draw(drawn, titles=["picture", "nearest"])


def _map(options: EmbedConfig, trained: Pretrained, found: NDArray[Any], images: Images, data: str) -> maps.Map:
    """Place the readable images in a plane; of many, a random sample."""
    known = np.flatnonzero(np.isfinite(found[:, 0]))
    chosen = np.sort(np.random.default_rng(0).permutation(known)[:_DRAWN])
    points, axes = projected(found[chosen], options.projection)
    count = f"{len(chosen):,}" + (f" of {len(found):,}" if len(chosen) < len(found) else "")
    step = trained.step
    network = str(options.path) if step is None else f"the {options.which} after {step:,} steps"
    return maps.Map(
        as_utf8(f"{count} images of {data} by the features of {network}"),
        axes,
        points,
        [as_utf8(images.name(index)) for index in chosen.tolist()],
        None if images.labels is None else images.labels[chosen],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    features(command_line.parse(EmbedConfig, argv, prog="python -m fastrm.embed"))


if __name__ == "__main__":
    shell.run(main)
