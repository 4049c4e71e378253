"""Damaged and malicious files and settings: they are read correctly, or end in a UsageError, and nothing runs."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import os
import struct
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, features

from fastrm import pretrained
from fastrm.data.augmentation import SUPERVISED
from fastrm.data.dali import encoded, uncompressed
from fastrm.data.decode import BROKEN, BrokenImage
from fastrm.data.draws import BatchSampler, Request
from fastrm.data.encoded import FileImages
from fastrm.data.eval_loader import _EvalImages
from fastrm.data.inventory import Inventory
from fastrm.data.named import open_named
from fastrm.data.shard_index import ShardImages
from fastrm.data.shards import open_shards
from fastrm.data.stored import Look, as_rgb, examined, header
from fastrm.data.torch_loader import _Views
from fastrm.errors import UsageError
from fastrm.run import checkpoint
from fastrm.run.resume import resume
from fastrm.settings.config import Config, build, from_flat
from tests.conftest import natural_pictures


@st.composite
def mutations(draw: st.DrawFn, content: bytes, *, head: int | None = None) -> bytes:
    """``content`` with some bytes changed, inserted, removed or cut off, within the first ``head`` bytes if given."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(changed), head or len(changed))))
        kind = draw(st.sampled_from(["set", "set", "put in", "cut out", "cut off"]))
        if kind == "set":
            extreme = st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
            new = draw(st.binary(min_size=1, max_size=4) | extreme)
            changed[at : at + len(new)] = new
        elif kind == "put in":
            changed[at:at] = draw(st.binary(max_size=20))
        elif kind == "cut out":
            del changed[at : at + draw(st.integers(1, 64))]
        else:
            del changed[at:]
    return bytes(changed)


# Checkpoints


@cache
def small_checkpoint() -> bytes:
    """The bytes of a valid checkpoint."""
    state = {
        "format": checkpoint.FORMAT, "config": build(data="digits").flat(), "step": 3,
        "method": dict(torch.nn.Linear(2, 2).state_dict()), "random": [{"cpu": torch.get_rng_state()}],
    }  # fmt: skip
    state["checksum"] = checkpoint.checksum(state)
    written = io.BytesIO()
    torch.save(state, written)
    return written.getvalue()


class _Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def load(content: Callable[[Path], bytes]) -> dict[str, Any] | None:
    """The state that a file gives as a checkpoint, or None if it is refused; loading must write nothing."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, checkpoint.NAME)
        path.write_bytes(content(path.parent))
        state = None
        with contextlib.suppress(UsageError):
            state = checkpoint.load(path)
        assert list(path.parent.iterdir()) == [path]
        return state


@given(content=st.binary(max_size=300) | st.deferred(lambda: mutations(small_checkpoint())))
@example(content=b"")
@example(content=b"\x80\x02}q\x00.")
@example(content=b"PK\x03\x04")
def test_damaged_checkpoints_are_refused_or_loaded(content: bytes) -> None:
    state = load(lambda _: content)
    assert state is None or state["format"] == checkpoint.FORMAT


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [os.system, eval, exec, getattr, Path.touch])
def test_code_in_a_checkpoint_does_not_run(call: Callable[..., Any], zipped: bool) -> None:
    def content(folder: Path) -> bytes:
        ran = folder / "ran"
        arguments = {os.system: f"touch {ran}", Path.touch: ran, getattr: "x"}.get(call, f"open({str(ran)!r}, 'w')")
        written = io.BytesIO()
        state = {"format": checkpoint.FORMAT, "config": {}, "method": _Runs(call, arguments)}
        torch.save(state, written, _use_new_zipfile_serialization=zipped)
        return written.getvalue()

    assert load(content) is None


def test_the_valid_checkpoint_loads() -> None:
    state = load(lambda _: small_checkpoint())
    assert state is not None
    assert state["step"] == 3


ODD = st.sampled_from(
    [None, True, -1, 0, 2**63, 10**400, 0.5, -0.0, math.nan, math.inf, "", "3", "nan", "\0", "💥", "a" * 9999,
     "../../etc/passwd", [], [1], [{}], [{"cpu": 3}], [{"cpu": torch.zeros(3)}], {}, {"a": 1}, {1: 2}, b"x"],
) | st.integers() | st.floats() | st.text(max_size=5)  # fmt: skip


@given(part=st.sampled_from(["config", "step", "method", "random", "format"]), value=ODD, absent=st.booleans())
def test_checkpoints_with_wrong_content_are_refused_or_resumed(part: str, value: Any, absent: bool) -> None:
    state = torch.load(io.BytesIO(small_checkpoint()), weights_only=True)
    del state["checksum"]
    state[part] = value
    if absent:
        del state[part]
    state["checksum"] = checkpoint.checksum(state)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        out = Path(name, "run")
        out.mkdir()
        torch.save(state, out / checkpoint.NAME)
        method = torch.nn.Linear(2, 2)
        method.student = method.teacher = SimpleNamespace(backbone=None)
        patch.setattr(pretrained, "build_method", lambda *_, **__: method)
        with contextlib.suppress(UsageError):
            pretrained.open_pretrained(out, torch.device("cpu"))
        with contextlib.suppress(UsageError):
            images = Inventory(hashes=torch.zeros(2, dtype=torch.int64), left_out=0, steps_per_epoch=1)
            assert resume(build(data="digits").flat(), out, images, {"method": torch.nn.Linear(2, 2)}).step >= 0
        assert [path.name for path in out.iterdir()] == [checkpoint.NAME]


# Settings


@given(changes=st.dictionaries(st.sampled_from(sorted(Config().flat())) | st.text(max_size=3), ODD, max_size=3))
@example(changes={"epochs": 10**400})
@example(changes={"lr": "0.1"})
@example(changes={"out": 3})
@example(changes={"scan": "no"})
@example(changes={"method": []})
def test_settings_of_wrong_kinds_are_refused_or_survive_json(changes: dict[str, Any]) -> None:
    for make in (lambda: from_flat({**build(data="digits").flat(), **changes}),
                 lambda: build(**{"data": "digits", **changes})):  # fmt: skip
        with contextlib.suppress(UsageError):
            flat = make().flat()
            assert from_flat(json.loads(json.dumps(flat))).flat() == flat


# Pictures


@cache
def picture(kind: str) -> bytes:
    """The bytes of a photograph-like image in this file format, with EXIF tags."""
    image = Image.fromarray(natural_pictures(1, 36, 48)[0].permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a description", 72.5
    written = io.BytesIO()
    options = {"progressive JPEG": {"progressive": True}, "LZW TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
    image.save(written, kind.split()[-1], exif=exif, **options)
    return written.getvalue()


KINDS = ["JPEG", "progressive JPEG", "PNG", "TIFF", "LZW TIFF", "BMP", "PPM", "GIF"]
KINDS += [kind for kind in ("WEBP", "AVIF") if features.check(kind.lower())]


class Held(FileImages):
    """Images whose files are in memory."""

    def __init__(self, contents: list[bytes]) -> None:
        super().__init__([Path(f"{number}.jpg") for number in range(len(contents))], None)
        self.contents = contents

    def content(self, index: int) -> bytes:
        return self.contents[index]


def looked_at(content: bytes) -> tuple[Look | None, str | None]:
    """The result of the scan for a file, or its error message."""
    try:
        return examined(content), None
    except BrokenImage as error:
        return None, str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_scan_training_and_evaluation_agree_on_damaged_images(kind: str, data: st.DataObject) -> None:
    content = data.draw(mutations(picture(kind), head=120) | mutations(picture(kind)))
    look, why = looked_at(content)
    held = Held([content, *[picture("PNG")] * 10])
    training = _Views(held, SUPERVISED, 8, BatchSampler(11, 1, 0, 0, 1))
    indices, (views,), *_ = training[Request(0, 0, [0])]
    assert views.shape == (1, 3, 8, 8)
    passed_on: dict[str, str | None] = {}
    _, seen = _EvalImages(Held([content]), 8)[0]
    passed_on["evaluation"] = seen if isinstance(seen, str) else None
    for name, read in (("DALI", encoded), ("DALI, again", uncompressed), ("in memory", as_rgb)):
        try:
            read(content)
        except BrokenImage as error:
            passed_on[name] = str(error)
        else:
            passed_on[name] = None
    # DALI gets a plain image unchanged, and after a failure it gets the pixels.
    if passed_on["DALI"] is None:
        passed_on["DALI"] = passed_on["DALI, again"]
    if look is not None and (look.dtype != "uint8" or look.bands not in (1, 3)):
        return  # the mutation made a valid image of other values, which an RGB data set leaves out
    assert {said is None for said in passed_on.values()} == {why is None}, (why, passed_on)
    assert indices == [0 if why is None else 1]
    for said in (why, *passed_on.values(), *held.unreadable.values()):
        assert said is None or ("\n" not in said and " at 0x" not in said and len(said) <= 200)
    if look is not None:
        assert look.pages >= 1
        assert header(content).size == as_rgb(content).size[::-1] == look.size


# Shards


@cache
def shard() -> bytes:
    """The bytes of a tar file with two images and a label."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("a.jpg", picture("JPEG")), ("a.cls", b"3"), ("ü" * 120 + ".jpg", picture("JPEG"))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return written.getvalue()


def read_shard(content: bytes) -> None:
    """Open a shard and read its images: it raises UsageError, or gives bytes of the file and labels that are not
    negative.
    """
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "inner", "shard.tar")
        path.parent.mkdir()
        path.write_bytes(content)
        try:
            images = open_shards([path], str(path), keep=False).train
            assert isinstance(images, ShardImages)
        except UsageError:
            pass
        else:
            for index in range(len(images)):
                with contextlib.suppress(*BROKEN):
                    assert images.content(index) in content
            assert images.labels is None or (images.labels >= 0).all()
        assert sorted(Path(name).rglob("*")) == [path.parent, path]


@given(content=st.deferred(lambda: mutations(shard()) | mutations(shard(), head=600)))
def test_damaged_shards_are_refused_or_read(content: bytes) -> None:
    read_shard(content)


@pytest.mark.parametrize("label", [b"-1", b"9" * 30, b"", b"1e3", b"\xff", b"\xd9\xa3"])
@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../../b", "\n", "."])
def test_names_links_and_labels_in_a_shard_reach_no_other_file(name: str, label: bytes) -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for kind, end in ((tarfile.REGTYPE, ".jpg"), (tarfile.SYMTYPE, ".png"), (tarfile.LNKTYPE, ".bmp"),
                          (tarfile.GNUTYPE_SPARSE, ".ppm"), (tarfile.REGTYPE, ".cls")):  # fmt: skip
            info = tarfile.TarInfo(name + end)
            info.type, info.linkname = kind, "/etc/passwd"
            content = b"" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else label
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    read_shard(written.getvalue())


# IDX files


@cache
def idx(ndim: int) -> bytes:
    """The bytes of an IDX file with ``ndim`` dimensions."""
    shape = (6, 5, 4)[:ndim]
    return struct.pack(f">HBB{ndim}I", 0, 8, ndim, *shape) + bytes(range(math.prod(shape)))


@given(which=st.sampled_from(["train-images-idx3", "train-labels-idx1", "t10k-labels-idx1"]), zipped=st.booleans(),
       damaged_after=st.booleans(), data=st.data())  # fmt: skip
def test_damaged_idx_files_are_refused_or_read(
    which: str, zipped: bool, damaged_after: bool, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        for part in ("train", "t10k"):
            for kind, ndim in (("images-idx3", 3), ("labels-idx1", 1)):
                content = idx(ndim)
                hit = which == f"{part}-{kind}"
                if hit and not (zipped and damaged_after):
                    content = data.draw(mutations(content))
                if hit and zipped:
                    content = gzip.compress(content, mtime=0)
                    content = data.draw(mutations(content)) if damaged_after else content
                Path(name, f"{part}-{kind}-ubyte{'.gz' if hit and zipped else ''}").write_bytes(content)
        before = sorted(os.listdir(name))
        try:
            source = open_named("fashion-mnist", Path(name))
        except UsageError:
            pass
        else:
            assert source.train.labels is not None
            assert len(source.train) == len(source.train.labels) > 0
            assert np.asarray(source.train.picture(0)).shape[2] == 3
        assert sorted(os.listdir(name)) == before
