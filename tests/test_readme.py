"""The README's Python runs as it stands, and its commands name what exists."""

from __future__ import annotations

import re
from pathlib import Path

from fastrm.config import RECIPES
from fastrm.train import read_flags

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run() -> None:
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_train_commands_parse() -> None:
    commands = re.findall(r"python -m fastrm\.train (--[^`\n#]*)", README)
    assert ["--arch", "resnet50", "--data", "/imagenet"] in [command.split() for command in commands]
    for command in commands:
        read_flags(command.split())


def test_named_recipes_exist() -> None:
    assert set(re.findall(r"--recipe ([\w-]+)", README)) <= set(RECIPES)
