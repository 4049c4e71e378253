"""For whatever runs ONNX graphs."""

from __future__ import annotations

from pathlib import Path

import torch

from fastrm.errors import UsageError, first_line
from fastrm.exports.base import About, Target
from fastrm.files import as_utf8, write_whole
from fastrm.models import Backbone
from fastrm.packages import optional


def write(backbone: Backbone, about: About, out: Path) -> None:
    """``images`` float32 [batch, C, size, size] to ``features`` float32 [batch, D]; the metadata are in the file."""
    onnx, _ = (optional(name, extra="onnx", wanted_by="--format onnx") for name in ("onnx", "onnxscript"))
    size = int(about["image_size"])
    try:
        program = torch.onnx.export(
            backbone,
            (torch.zeros(2, backbone.channels, size, size),),
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch's exporter raises what the network's own code leads it to
        raise UsageError(f"--format onnx cannot hold {about['arch']}: {first_line(error)}") from None
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {name: as_utf8(text) for name, text in about.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda partial: partial.write_bytes(model.SerializeToString()))


def loading(_: Backbone, __: About, out: Path) -> str:
    """With onnxruntime."""
    return f'onnxruntime.InferenceSession("{out.name}").run(["features"], {{"images": images}})'


TARGET = Target((".onnx",), write, loading)
