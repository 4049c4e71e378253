"""Every flag of every entry point with hostile values: it is accepted, or refused in one error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrm import evaluate, export, train
from fastrm.data import Source, open_source
from fastrm.data import __main__ as sheet
from fastrm.errors import UsageError
from fastrm.methods import build_method
from fastrm.models.weights import metadata
from fastrm.pretrained import Pretrained
from fastrm.settings import command_line
from fastrm.settings.config import build, flag
from fastrm.settings.flags import Flags
from fastrm.terminal import shell

VALUES = [
    "", " ", "-1", "0", "9" * 19, "9" * 400, "1e400", "-1e-400", "nan", "inf", "-inf", "1_0", "٣", "💥", "a" * 10_000,
    "../../etc/passwd", ".", "~nobody_here/x", "a\0b", "a\nb", "\udcff", "--", "-", "None", "[]", "{}",
    "{0..9}.tar",
    "{0..99999999999}.tar", "True", "%s", "*",
]  # fmt: skip
# The nightly profile tries all values, and the ordinary one a few.
FEW = settings(max_examples=max(3, settings().max_examples // 12), suppress_health_check=list(HealthCheck))
SMALL = {"arch": "test_resnet", "image_size": 32, "hidden_dim": 16, "output_dim": 8, "predictor_hidden_dim": 16,
         "workers": 0, "batch_size": 16, "data": "digits"}  # fmt: skip


class Started(Exception):
    """Raised where the run would start."""


@cache
def few_digits() -> Source:
    """The data set "digits" with 32 images."""
    source = open_source("digits")
    few = source.train.subset(torch.arange(32).numpy())
    return dataclasses.replace(source, train=few, bank=few, test=few)


@cache
def run_of_digits() -> Pretrained:
    """An untrained run on digits."""
    config = build(**SMALL)
    method = build_method(config)
    networks = {"student": method.student.backbone, "teacher": method.teacher.backbone}
    settings, about = config.flat(), metadata(config.flat(), "student")
    return Pretrained(
        path=Path("x"), networks=networks, about=about, arch="test_resnet", settings=settings, step=1,
        state=method.state_dict(),
    )  # fmt: skip


def flags(kind: type) -> list[str]:
    """All flags of an entry point."""
    return [flag(name) for name in command_line.flag_names(kind)]


def words(flag: str, value: str, others: dict[str, Any]) -> list[str]:
    """The arguments of an entry point, with one flag set to ``value``."""
    given_ = {"--" + name.replace("_", "-"): str(other) for name, other in others.items()}
    return [word for name, other in given_.items() if name != flag for word in (name, other)] + [flag, value]


def below(folder: Path) -> list[Path]:
    """All paths below a folder."""
    return sorted(folder.rglob("*"))


@pytest.fixture
def refused_or_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[Sequence[str]], None], list[str]], None]]:
    """A function that calls an entry point in an empty folder, and checks that a refusal leaves it unchanged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = iter(range(10**6))

    def call(main: Callable[[Sequence[str]], None], argv: list[str]) -> None:
        base = tmp_path / str(next(folders))
        deep = base / "a" / "b" / "c"
        deep.mkdir(parents=True)
        monkeypatch.chdir(deep)
        before = below(base)
        try:
            main(argv)
        except UsageError:
            assert below(base) == before
        except Started:
            pass

    yield call
    assert not (tmp_path / "cache").exists()


def stop(*_: Any, **__: Any) -> None:
    """Stands in for the first part of a run that writes."""
    raise Started


@pytest.mark.parametrize("flag", flags(Flags))
@FEW
@given(value=st.sampled_from(VALUES))
def test_flags_of_train(flag: str, value: str, refused_or_taken: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastrm.run.session.Results", stop)  # created after all checks, when the folder exists
        refused_or_taken(train.main, words(flag, value, SMALL))


@pytest.mark.parametrize("flag", flags(evaluate.EvaluateConfig))
@FEW
@given(value=st.sampled_from(VALUES))
def test_flags_of_evaluate(flag: str, value: str, refused_or_taken: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if flag != "--checkpoint":
            patch.setattr(evaluate, "open_pretrained", lambda *_, **__: run_of_digits())
        patch.setattr(evaluate, "gap", stop)
        patch.setattr(
            "fastrm.pretrained.open_source",
            lambda data, root, **columns: few_digits() if data == "digits" else open_source(data, root, **columns),
        )
        refused_or_taken(evaluate.main, ["--gap", *words(flag, value, {"checkpoint": "x"})])


@pytest.mark.parametrize("flag", flags(export.ExportConfig))
@FEW
@given(value=st.sampled_from(VALUES))
def test_flags_of_export(flag: str, value: str, refused_or_taken: Any) -> None:
    others = {"checkpoint": "x", "format": "safetensors", "out": "x.safetensors"}
    with pytest.MonkeyPatch.context() as patch:
        if flag != "--checkpoint":
            patch.setattr(export, "read_pretrained", lambda *_, **__: run_of_digits())
        refused_or_taken(export.main, words(flag, value, others))


@pytest.mark.parametrize("flag", flags(sheet.Options))
@FEW
@given(value=st.sampled_from(VALUES))
def test_flags_of_the_contact_sheet(flag: str, value: str, refused_or_taken: Any) -> None:
    others = {"data": "digits", "out": "views.png", "image_size": 16, "images": 2}
    refused_or_taken(sheet.main, words(flag, value, others))


@pytest.mark.parametrize("value", ["a\nb", "a" * 10_000, "💥"])
def test_an_error_message_is_short_and_printable(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shell.run(lambda: train.main(["--data", value]))
    said = capsys.readouterr().err
    assert said.startswith("error: --data")
    assert len(said.splitlines()) <= 2
    assert len(said) < 1000
