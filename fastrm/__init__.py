"""fastrm: self-supervised image pre-training with residual momentum, and the fused operations under it."""

from pathlib import Path

from fastrm.version import __version__ as __version__

# The sources keep fastrm.kernels in kernels/ beside this folder; an installed package has it inside.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
