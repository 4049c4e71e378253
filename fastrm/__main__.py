"""The commands: ``python -m fastrm`` lists them, ``python -m fastrm COMMAND ...`` runs one."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from fastrm.errors import UsageError
from fastrm.settings.near import near
from fastrm.terminal.shell import run
from fastrm.version import __version__

COMMANDS = {
    "train": "pre-train a backbone on images without labels",
    "evaluate": "score the student and the teacher of a run: kNN, linear, fine-tuning, nearest neighbours",
    "export": "export a trained backbone to timm, torchvision or ONNX",
    "embed": "write the features of all images, find the nearest images of a query, draw a map",
    "report": "show one run, or compare several, on one HTML page",
    "data": "draw some images and their augmented views",
    "doctor": "report what this machine will use, and what is missing",
}
"""The commands, which are modules of this package, and their descriptions."""


def main(argv: Sequence[str] | None = None) -> None:
    """List the commands, or print the version.

    Raises:
        UsageError: an argument is unknown.
    """
    words = sys.argv[1:] if argv is None else argv
    if list(words) == ["--version"]:
        print(f"fastrm {__version__}")
    elif not words or list(words) in (["--help"], ["-h"]):
        print("python -m fastrm COMMAND; add --help to a command for its options\n")
        for name, what in COMMANDS.items():
            print(f"  {name:10}{what}")
        print("\npython -m fastrm --version prints the version; python -m fastrm.COMMAND is the same as with a space")
    else:
        meant = near(words[0], COMMANDS)
        known = f"did you mean {meant}?" if meant else f"choose one of {', '.join(COMMANDS)}"
        raise UsageError(f"{' '.join(words[0].split())[:80]} is no command; {known}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        runpy.run_module(f"fastrm.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
    else:
        run(main)
