"""For ``fastrm.load``, and for whatever reads tensors by name."""

from __future__ import annotations

from pathlib import Path

from fastrm.exports.base import About, Target, write_state
from fastrm.models import Backbone
from fastrm.models.module import needs_module


def loading(_: Backbone, about: About, out: Path) -> str:
    """With a module of the same class, where it is of one."""
    module = f", arch={about['arch']}(…)" if needs_module(about["arch"]) else ""
    return f'fastrm.load("{out.name}", which="{about["which"]}"{module})'


TARGET = Target((".safetensors",), write_state, loading)
