"""Sphinx configuration. The API pages are built from the docstrings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import fastrm  # noqa: E402 -- found by the line above
from fastrm.methods import recipes  # noqa: E402

project = "fastrm"
copyright = "fastrm's developers, MIT licence"
release = fastrm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_generated", "study/**"]
html_theme = "furo"
html_title = f"fastrm {release}"
html_copy_source = False
html_static_path = ["_static"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

_SHOWN = {
    "epochs": "epochs", "batch_size": "batch", "optimizer": "optimizer", "lr": "learning rate per 256",
    "weight_decay": "weight decay", "teacher_momentum": "teacher momentum", "teacher_momentum_end": "at the end",
    "temperature": "temperature", "queue_size": "queue", "hidden_dim": "hidden", "output_dim": "output",
}  # fmt: skip


def recipes_tables() -> str:
    """The published settings as Markdown: a table per method, with a column per recipe."""
    lines = []
    of_method: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, values in recipes().items():
        of_method.setdefault(values["method"], {})[name] = values
    for named in of_method.values():
        lines += [f"| | {' | '.join(f'`{name}`' for name in named)} |", "|---|" + "--:|" * len(named)]
        for key, title in _SHOWN.items():
            if any(key in values for values in named.values()):
                lines.append(f"| {title} | {' | '.join(str(values.get(key, '')) for values in named.values())} |")
        lines.append("")
    return "\n".join(lines)


def setup(app: Any) -> None:
    """Write the generated part of the recipes page, and add the style sheet."""
    app.add_css_file("tables.css")
    generated = Path(app.srcdir, "_generated")
    generated.mkdir(exist_ok=True)
    (generated / "recipes.md").write_text(recipes_tables(), encoding="utf-8")
