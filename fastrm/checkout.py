"""Makes ``kernels/`` at the root of a checkout importable as ``fastrm.kernels``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

NAME = "fastrm.kernels"


class _Kernels:
    """A finder for this package only; Python finds its modules itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See :meth:`importlib.abc.MetaPathFinder.find_spec`."""
        if name != NAME:
            return None
        return spec_from_file_location(name, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)])


def find_kernels() -> None:
    """Register the finder, unless the package is inside this one, as in an installed fastrm.

    It comes first, so that another checkout with an editable installation is not used instead.
    """
    here = Path(__file__).parent
    if not (here / "kernels").is_dir():
        sys.meta_path.insert(0, _Kernels(here.parent / "kernels"))
