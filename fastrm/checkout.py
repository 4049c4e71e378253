"""Where the sources keep fastrm.kernels: in kernels/ at their root, of which nothing else becomes importable."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

NAME = "fastrm.kernels"


class _Kernels:
    """A finder that knows this one package, of which Python then finds the modules by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As :meth:`importlib.abc.MetaPathFinder.find_spec`."""
        if name != NAME:
            return None
        return spec_from_file_location(name, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)])


def find_kernels() -> None:
    """Let Python find the package where it is not inside this one, as it is in an installed fastrm.

    It is asked first, so that another checkout which is installed as editable does not lend its own.
    """
    here = Path(__file__).parent
    if not (here / "kernels").is_dir():
        sys.meta_path.insert(0, _Kernels(here.parent / "kernels"))
