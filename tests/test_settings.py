"""Settings in files and in Python, words of other programs, and the list of commands."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from fastrm import __main__ as commands
from fastrm import evaluate, export, report, train
from fastrm.errors import UsageError
from fastrm.settings import command_line
from fastrm.settings.config import Config, build, from_flat
from fastrm.settings.config_file import read_settings
from fastrm.settings.fields import KINDS
from fastrm.settings.flags import read_flags
from fastrm.settings.kinds import Range, check_fields, checked, problem
from fastrm.settings.near import SYNONYMS, near
from fastrm.settings.of_run import given
from fastrm.version import __version__
from tests.test_cli import fails

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("demo.toml", {"data": "photo-patches", "arch": "test_resnet", "epochs": 6}),
        ("few_thousand.toml", {"method": "mocov2", "queue_size": 1024, "crop_min": 0.4}),
    ],
)
def test_the_settings_files_of_the_examples_are_valid(file: str, settings: dict[str, Any]) -> None:
    read = build(**{"data": "photos", **read_settings(ROOT / "examples" / file)}).flat()
    assert {name: read[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (int, [0, -3, 10**400], {"1": "'1' is a str; it must be int", 1.0: "1.0 is a float", None: "None is a None"}),
        (float, [0.5, 3], {"1": "'1' is a str; it must be float", True: "True is a bool; it must be float"}),
        (bool, [True, False], {1: "1 is a int; it must be bool", "on": "'on' is a str"}),
        (int | None, [None, 3], {True: "True is a bool; it must be int", 1.5: "1.5 is a float; it must be int"}),
        (Path, [Path("x")], {"x": "'x' is a str; it must be Path", Path("a" * 999): "cannot be used as a path"}),
        (Literal["a", "b"], ["a"], {"c": "c is unknown; choose one of a, b", 3: "3 is unknown", None: "None is un"}),
        (tuple[Literal["a", "b"], ...], [(), ("b", "a")], {"a": "'a' is a str; it must be a list", ("c",): "c is unk"}),
        (
            Annotated[float, Range(above=0, at_most=1)],
            [1, 1e-300],
            {0: "0 is out of range; it must be above 0 and at most 1", 1.1: "1.1 is out", math.nan: "nan is out"},
        ),
        (
            Annotated[int, Range(at_least=8)],
            [8, 2**80],
            {7: "7 is out of range; it must be at least 8", 10**400: "00 is out of range", "8": "'8' is a str"},
        ),
        (Annotated[float, Range(at_least=0)] | None, [0, None], {math.inf: "inf is out of range", -0.1: "-0.1 is out"}),
    ],
    ids=str,
)  # fmt: skip
def test_the_type_of_a_field_states_its_valid_values(kind: Any, right: list[Any], wrong: dict[Any, str]) -> None:
    assert [value for value in right if problem(value, kind) is not None] == []
    for value, says in wrong.items():
        found = problem(value, kind)
        assert found is not None
        assert says in found


def test_every_number_has_a_range() -> None:
    """Infinity, NaN, and integers that no float can represent, are refused for every number."""
    assert [name for name, kind in KINDS.items() if problem(10**400, kind) is None] == []
    assert [name for name, kind in KINDS.items() if problem(math.inf, kind) is None] == []
    assert [name for name, kind in KINDS.items() if problem(math.nan, kind) is None] == []


@pytest.mark.parametrize(
    ("leaves", "name", "held"),
    [
        ({"compile": True}, "compile", "on"),
        ({"compile": False}, "compile", "off"),
        ({"compile": "auto"}, "compile", "auto"),
        ({"log_to": ["wandb", "mlflow"]}, "log_to", ["wandb", "mlflow"]),
        ({"log_to": ()}, "log_to", []),
        ({"data": Path("somewhere")}, "data", "somewhere"),
        ({"resume": Path("some/run")}, "resume", "some/run"),
        ({"out": "some/run"}, "out", "some/run"),
    ],
)
def test_values_are_accepted_in_the_forms_of_python(leaves: dict[str, Any], name: str, held: Any) -> None:
    flat = build(**{"data": "digits", **leaves}).flat()
    assert flat[name] == held
    assert from_flat(json.loads(json.dumps(flat))).flat() == flat


@pytest.mark.parametrize("name", ["scan", "loader", "kernels"])
def test_a_bool_is_refused_for_choices_without_on_and_off(name: str) -> None:
    assert build(data="digits", scan=False).input.scan is False
    if name != "scan":
        with pytest.raises(UsageError, match=f"--{name} True is unknown; choose one of auto"):
            build(**{"data": "digits", name: True})


def test_loggers_are_a_list_of_flags() -> None:
    assert read_flags([]).run.log_to == ("tensorboard",)
    assert read_flags(["--log-to", "wandb", "mlflow", "--keep-best"]).run.log_to == ("wandb", "mlflow")
    assert read_flags(["--log-to", "--keep-best"]).run.log_to == ()


@pytest.mark.parametrize("meant", sorted(set(SYNONYMS.values())))
def test_every_synonym_means_a_setting(meant: str) -> None:
    assert meant in KINDS
    assert not SYNONYMS.keys() & KINDS.keys()


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("learning_rate", "lr"), ("batch", "batch_size"), ("output", "out"), ("model", "arch"), ("dataset", "data"),
        ("momentum", "teacher_momentum"), ("gpus", "device"), ("num_workers", "workers"), ("wd", "weight_decay"),
        ("tau", "temperature"), ("optimiser", "optimizer"), ("epoch", "epochs"),
    ],
)  # fmt: skip
def test_a_near_miss_suggests_the_setting(word: str, meant: str) -> None:
    flag = word.replace("_", "-")
    assert near(word, KINDS) == near(f"--{flag}", KINDS) == meant
    with pytest.raises(UsageError, match=f"--{flag}.*did you mean --{meant.replace('_', '-')}\\?"):
        read_flags(["--data", "digits", f"--{flag}", "1"])
    with pytest.raises(UsageError, match=rf"unknown settings: {word} \(did you mean {meant}\?\)"):
        build(**{"data": "digits", word: 1})


def test_nonsense_has_no_suggestion() -> None:
    assert near("--xyzzy", KINDS) is None
    assert near("--momentum", ["knn", "linear"]) is None


def written(folder: Path, name: str, content: str) -> list[str]:
    """Write a settings file, and return the flags that read it."""
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return ["--config", str(path)]


def test_settings_of_a_run_are_used_except_its_folder(tmp_path: Path) -> None:
    then = build(
        data="digits", method="mocov2", arch="test_resnet", epochs=7, lr=0.5, batch_size=64, out="old", resume="never",
        log_to=["wandb"], compile=False, data_root="somewhere", scan=False,
    )  # fmt: skip
    file = written(tmp_path, "config.json", json.dumps(then.flat()))
    assert read_flags(file).flat() == {**then.flat(), "out": None, "resume": "auto"}
    flags = [*file, "--lr", "2", "--out", "new", "--log-to", "mlflow", "--scan"]
    now = {**then.flat(), "out": "new", "resume": "auto", "lr": 2.0, "log_to": ["mlflow"], "scan": True}
    assert read_flags(flags).flat() == now
    assert read_flags([*flags[2:], f"--config={file[1]}"]).flat() == now


def test_a_file_overrides_defaults_and_flags_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = ['data = "~/pictures"', 'method = "mocov2"', "epochs = 12", "weight_decay = 1", "compile = true"]
    file = written(tmp_path, "mine.toml", "\n".join([*lines, 'log_to = ["wandb"]', 'out = "~/runs/mine"']))
    flat = read_flags(file).flat()
    assert flat["data"] == f"{tmp_path}/pictures"
    assert flat["out"] == f"{tmp_path}/runs/mine"
    assert (flat["optimizer"], flat["lr"]) == ("sgd", 0.03)  # the values of the method
    assert (flat["weight_decay"], flat["compile"], flat["log_to"], flat["epochs"]) == (1, "on", ["wandb"], 12)
    assert read_flags([*file, "--method", "mocov3"]).optim.optimizer == "lars"
    # the recipe is a flag, and so overrides the file
    named = read_flags([*file, "--recipe", "mocov3-r18-cifar100-1000ep"]).flat()
    assert (named["method"], named["weight_decay"], named["epochs"], named["compile"]) == ("mocov3", 1e-6, 1000, "on")
    assert read_flags(["--config", "~/mine.toml"]).flat() == flat


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.toml", "lr = -1", "--lr -1 is out of range; it must be above 0"),
        ("a.toml", "lr = nan", "--lr nan is out of range"),
        ("a.toml", 'lr = "0.1"', "--lr '0.1' is a str; it must be float"),
        ("a.toml", "learning_rate = 1", "'learning_rate' is no setting; did you mean lr?"),
        ("a.toml", "[model]\narch = 3", "'model' is no setting"),
        ("a.toml", 'optimizer = "a\\nb"', "--optimizer a b is unknown; choose one of lars"),
        ("a.toml", 'method = "swav"', "--method swav is unknown; choose one of mocov3"),
        ("a.toml", 'recipe = "best"', "--recipe best is unknown; choose one of mocov3-r50-100ep"),
        ("a.toml", "lr", "it is no TOML"),
        ("a.toml", "epochs = 1979-05-27", "--epochs datetime.date(1979, 5, 27) is a date; it must be int"),
        ("a.json", "{", "it is no JSON"),
        ("a.json", "[" * 100_000, "it is no JSON"),
        ("a.json", "[]", "it holds no settings by name"),
        ("a.json", '{"seed": true}', "--seed True is a bool; it must be int"),
        ("a.json", '{"batch_size": 1e999}', "--batch-size inf is a float; it must be int"),
        ("a.yaml", "lr: 1", "it must end in .json, as a run's config.json does, or .toml"),
    ],
)
def test_an_error_in_a_file_names_the_file(
    name: str, content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(train.main, ["--data", "digits", *written(tmp_path, name, content)], capsys)
    assert said.startswith(f"error: --config {tmp_path / name}: {says}")
    assert len(said.splitlines()) == 1


def test_a_missing_or_invalid_settings_file_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.toml")
    assert "cannot be read: No such file" in fails(train.main, ["--config", missing], capsys)
    (tmp_path / "latin.toml").write_bytes(b'data = "\xe9"')
    assert "it is no TOML" in fails(train.main, ["--config", str(tmp_path / "latin.toml")], capsys)
    assert "--config" in fails(train.main, ["--config"], capsys)


@pytest.mark.parametrize(
    ("kind", "others"),
    [(evaluate.EvaluateConfig, ["--knn"]), (export.ExportConfig, ["--format", "timm", "--out", "x"])],
)
def test_a_run_is_named_as_an_argument_or_as_the_checkpoint(kind: Any, others: list[str]) -> None:
    for argv in (["runs/mine", *others], [*others, "runs/mine"], ["--checkpoint", "runs/mine", *others]):
        assert command_line.parse(kind, argv, prog="command").path == Path("runs/mine")
    with pytest.raises(UsageError, match="name a run folder, or one of its files: RUN, or --checkpoint RUN"):
        _ = command_line.parse(kind, others, prog="command").path
    with pytest.raises(UsageError, match="a and --checkpoint b are both given"):
        _ = command_line.parse(kind, ["a", "--checkpoint", "b", *others], prog="command").path


def test_a_report_accepts_several_runs_or_a_checkpoint() -> None:
    def of(*argv: str) -> list[Path]:
        options = command_line.parse(report.ReportConfig, argv, prog="command")
        return given(options.runs, options.checkpoint)

    assert of("a", "b") == [Path("a"), Path("b")]
    assert of("a") == of("--checkpoint", "a") == [Path("a")]


def test_check_fields_names_the_flag() -> None:
    check_fields(evaluate.EvaluateConfig(run=Path("x"), knn=True))
    with pytest.raises(UsageError, match="--workers -1 is out of range; it must be at least 0 and at most 256"):
        check_fields(evaluate.EvaluateConfig(run=Path("x"), knn=True, workers=-1))


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    commands.main([])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in commands.COMMANDS)
    modules = {path.stem for path in (ROOT / "fastrm").glob("*.py") if "shell.run(main)" in path.read_text()}
    assert modules | {"data"} == commands.COMMANDS.keys()
    commands.main(["--version"])
    assert capsys.readouterr().out == f"fastrm {__version__}\n"
    assert "did you mean train?" in fails(commands.main, ["trian"], capsys)
    assert "choose one of train, evaluate" in fails(commands.main, ["xyzzy"], capsys)


def test_a_command_is_run_by_its_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastrm", "report", "nowhere"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nowhere is not a run folder: it has no metrics.jsonl\n"


def test_commands_without_torch_do_not_import_it() -> None:
    code = "import sys, fastrm.report, fastrm.__main__, fastrm.settings.flags; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "False\n", done.stderr


def test_the_settings_cover_every_field() -> None:
    assert Config().flat().keys() == KINDS.keys()


def test_commands_accept_the_forms_of_python(tmp_path: Path) -> None:
    given_: Any = {"runs": [str(tmp_path / "a"), tmp_path / "b"], "out": "page"}
    options = checked(report.ReportConfig(**given_))
    assert (options.runs, options.out) == ((tmp_path / "a", tmp_path / "b"), Path("page"))
    scored: Any = {"checkpoint": "runs/mine", "data": Path("pictures"), "knn": True}
    assert checked(evaluate.EvaluateConfig(**scored)) == evaluate.EvaluateConfig(
        checkpoint=Path("runs/mine"), data="pictures", knn=True
    )
    with pytest.raises(UsageError, match="nowhere does not exist"):
        evaluate.evaluate(evaluate.EvaluateConfig(**{**scored, "checkpoint": "nowhere"}))
