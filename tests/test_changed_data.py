"""Resuming a run: the same images may have moved, and other images need --allow-changed-data."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrm import train
from fastrm.data import open_source
from fastrm.data.inventory import Inventory, inventory
from fastrm.data.scan import scan
from fastrm.errors import UsageError
from fastrm.optim import Schedule
from fastrm.run import checkpoint
from fastrm.run.resume import Start, resume
from fastrm.run.saver import Saver
from fastrm.settings.config import Config, resolved
from tests.test_train import assert_as_uninterrupted, records

Small = Callable[..., Config]


@pytest.fixture
def images(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the 96 images in class folders that a test may change."""
    return Path(shutil.copytree(pictures / "classes", tmp_path / "images"))


def listed(data: Path | str) -> Inventory:
    """The inventory of a run on ``data`` with 24 images per step."""
    source, broken = scan(open_source(str(data)), workers=1)
    return inventory(source.train, left_out=len(broken), steps_per_epoch=len(source.train) // 24)


def saved(small: Small, data: Path, step: int) -> Path:
    """Save a checkpoint without training, and return the run folder."""
    config = small(data=str(data))
    assert config.run.out is not None
    config.run.out.mkdir()
    saver = Saver(config.run.out, {"method": torch.nn.Linear(1, 1)}, keep=2, keep_every=None)
    saver.describe(0, config.flat(), listed(data))
    saver.save(step)
    saver.wait()
    return config.run.out


def resumed(small: Small, data: Path | str, **leaves: Any) -> Start:
    """Resume the saved run with ``data`` and these settings."""
    config = small(data=str(data), **leaves)
    assert config.run.out is not None
    return resume(config.flat(), config.run.out, listed(data), {"method": torch.nn.Linear(1, 1)})


def test_a_run_continues_with_the_same_images_at_another_path(small: Small, images: Path, tmp_path: Path) -> None:
    leaves = {"batch_size": 24, "accumulate": 1}
    train.train(small(data=str(images), max_steps=1, **leaves))
    train.train(small(data=str(images), max_steps=2, out=tmp_path / "whole", **leaves))
    images.rename(tmp_path / "elsewhere")
    train.train(small(data=f"{tmp_path}/elsewhere/", max_steps=2, **leaves))
    assert_as_uninterrupted(tmp_path / "run", tmp_path / "whole")


def test_other_spellings_of_one_path_are_the_same_data(
    small: Small, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(small, images, 3)
    (tmp_path / "link").symlink_to(images)
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "train").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    for spelling in (f"{images}/", "link", "link/", "./images/../images", "images", "split", "split/train"):
        begun = resumed(small, spelling)
        assert (begun.step, begun.notes, begun.images.shift) == (3, (), 0), spelling
    monkeypatch.chdir(images)
    assert resumed(small, ".").notes == ()


def test_changed_images_are_refused_with_both_counts(small: Small, images: Path) -> None:
    first, second, *_ = sorted(images.rglob("*.jpg"))
    out = saved(small, images, 3)
    second.unlink()
    with pytest.raises(UsageError, match=r"96 images then, 95 now; 0 new .*, 1 missing .*--allow-changed-data") as said:
        resumed(small, images)
    assert str(out / "checkpoint.pt") in str(said.value)
    shutil.copy(first, second)
    with pytest.raises(UsageError, match=r"96 images then, 96 now; 1 new or changed, 1 missing or changed\. Restore"):
        resumed(small, images)
    with pytest.raises(UsageError, match=r"96 images then, 1,437 now; 1,\d\d\d new or changed, 96 missing"):
        resumed(small, "digits")
    assert resumed(small, images, resume="never").step == 0


def test_a_file_that_broke_since_the_checkpoint_is_reported(small: Small, images: Path) -> None:
    saved(small, images, 3)
    broken = min(images.rglob("*.jpg"))
    broken.write_bytes(b"x" * broken.stat().st_size)
    with pytest.raises(UsageError, match=r"95 now; 0 new .*; 0 files were left out as broken, and 1 are now"):
        resumed(small, images)


def test_a_checkpoint_without_an_inventory_continues_with_a_notice(small: Small, images: Path, tmp_path: Path) -> None:
    path = saved(small, images, 3) / "checkpoint.pt"
    state = checkpoint.load(path)
    del state["images"], state["config"]["allow_changed_data"]
    torch.save(state | {"checksum": checkpoint.checksum(state)}, path)
    with pytest.raises(UsageError, match=r"--data was .*images, is digits"):
        resumed(small, "digits")
    begun = resumed(small, f"{images}/")
    assert begun.step == 3
    note = "checkpoint.pt is from an older version: it does not say whether the images are the same"
    assert begun.notes == (note,)
    assert resumed(small, "digits", allow_changed_data=True).step == 3


def test_with_other_images_epochs_never_count_backwards(
    small: Small, images: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(steps: int | None, **leaves: Any) -> Any:
        return train.train(small(data=str(images), batch_size=24, epochs=3, max_steps=steps, **leaves))

    run(5)  # 1.25 epochs of 4 steps each
    for path in sorted((pictures / "flat").glob("top*.jpg"))[:48]:
        shutil.copy(path, images / "digit0")
    run(7, allow_changed_data=True)
    said = "notice     other images from epoch 2 on: 96 images then, 144 now; 48 new or changed, 0 missing or changed"
    assert said in capsys.readouterr().out
    # Now the run is one on the new images: it resumes without the flag, and ends like an uninterrupted one.
    run(None, out=tmp_path / "whole", resume=str(tmp_path / "run"))
    run(9)
    summary = run(None)
    epochs = [record["epoch"] for record in records(tmp_path / "run")]
    np.testing.assert_allclose(epochs, [0.25, 0.5, 0.75, 1, 1.25, *(2 + i / 6 for i in range(1, 7))])
    assert (summary["step"], summary["epoch"]) == (11, 3.0)
    ends = [checkpoint.load(tmp_path / name)["method"] for name in ("run", "whole")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_same_shards_at_another_path_have_the_same_inventory(images: Path, tmp_path: Path) -> None:
    for number, part in enumerate(("digit0", "digit1")):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(images / part, part)
    (tmp_path / "moved").mkdir()
    for number in (0, 1):
        shutil.copy(tmp_path / f"{number}.tar", tmp_path / "moved")
    names = ("{0,1}.tar", "moved/*.tar", "moved", "{1,0}.tar")
    every, globbed, folder, turned = (listed(tmp_path / name).hashes.tolist() for name in names)
    assert every == globbed == folder != turned
    assert set(every) == set(turned)


def test_an_inventory_detects_changed_and_reordered_images() -> None:
    assert len(set(listed("digits").hashes.tolist())) > 1400
    plain = Inventory(hashes=torch.tensor([1, 2, 3]), left_out=0, steps_per_epoch=3)
    continued, words = plain.continued(plain.state_dict(), 5)
    assert torch.equal(continued.hashes, plain.hashes)
    assert (continued.shift, words) == (0, "")
    mixed = Inventory(hashes=torch.tensor([2, 1, 3]), left_out=0, steps_per_epoch=3)
    moved, words = mixed.continued(plain.state_dict(), 7)
    assert words == "3 images then, 3 now in another order"
    assert (7 + moved.shift) / 3 == 3  # the rest of the third epoch, of which one step was made, is dropped
    assert mixed.continued(plain.state_dict(), 6)[0].shift == 0


def test_schedules_are_shifted_after_a_change_of_images(small: Small) -> None:
    """After a shift, every schedule has the value of the unshifted one at the same epoch."""
    config = resolved(small(batch_size=24, warmup_epochs=1.0, residual_warmup_epochs=2.0, max_steps=None), 1)
    plain = Schedule(config.optim, config.method, 24, 6)
    shifted = replace(plain, shift=6)
    for name in ("lr", "teacher_momentum", "residual_weight", "epoch", "place"):
        assert [getattr(shifted, name)(step) for step in range(18)] == [getattr(plain, name)(s) for s in range(6, 24)]
    assert (shifted.total, plain.total) == (18, 24)
    assert [step for step in range(1, 19) if shifted.ends_epoch(step, 2)] == [6, 18]
