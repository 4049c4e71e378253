"""The diffs in examples/drop_in apply, add at most five lines, and change no loss and no weight."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "drop_in"
NAMES = ("averaged_model", "dino", "dino_prototypes", "lightly_moco", "official_moco", "supervised_ema", "timm_ema")

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="needs lightly"),
    pytest.mark.skipif(shutil.which("git") is None, reason="needs git, which applies the changes"),
]


@pytest.fixture(scope="module")
def compare() -> Any:
    """The module examples/drop_in/compare.py."""
    sys.path.insert(0, str(FOLDER))
    try:
        import compare
    finally:
        sys.path.remove(str(FOLDER))
    return compare


def test_every_trainer_has_a_diff(compare: Any) -> None:
    assert tuple(compare.NAMES) == NAMES


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_diff_changes_no_loss_and_no_weight(name: str, compare: Any) -> None:
    added = re.findall(r"^\+(?!\+\+).+$", (FOLDER / f"{name}.diff").read_text(), flags=re.MULTILINE)
    assert 0 < len(added) <= 5
    losses, weights = compare.differences(name, steps=2, arch="test_resnet")
    # FeatureQueue stores float32, with an error of 6e-8 per feature. An error e of a similarity is an error of e /
    # temperature in the loss.
    bound = 6e-7 if "FeatureQueue" in "".join(added) else 1e-12
    assert losses <= bound
    assert weights <= bound


def test_the_comparison_detects_a_wrong_momentum(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = compare.versions("averaged_model")
    versions[1].ema_avg_fn = lambda momentum: versions[0].get_ema_multi_avg_fn(momentum + 1e-6)
    monkeypatch.setattr(compare, "versions", lambda _: versions)
    assert compare.differences("averaged_model", steps=3, arch="test_resnet")[1] > 1e-10


def test_the_comparison_prints_a_table(
    compare: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--arch", "test_resnet", "--steps", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["compare.py", "timm_ema", *flags])
    compare.main()
    row = r"\| timm_ema \| \S+ \| \S+ \| \d+ \| \d+ \| teacher \| [\d.]+ \| [\d.]+ \| [\d.]+ \|"
    assert re.search(row, capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["compare.py", "lightning"])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert stop.value.code == 2
    assert "there is no lightning" in capsys.readouterr().err
