"""Graphs for programs that run ONNX."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastrm.errors import UsageError, first_line
from fastrm.exports.base import Loaded, Subject, Target
from fastrm.files import as_utf8, write_whole
from fastrm.packages import optional


def refuse(_: Subject) -> None:
    """Raise a UsageError if a package is missing that torch's exporter needs."""
    for name in ("onnx", "onnxscript"):
        optional(name, extra="onnx", wanted_by="--format onnx")


def write(subject: Subject, out: Path) -> None:
    """Write a graph from ``images`` float32 [batch, C, size, size] to ``features`` float32 [batch, D], with metadata.

    Raises:
        UsageError: torch's exporter cannot trace the network.
    """
    import onnx

    size = subject.image_size
    try:
        program = torch.onnx.export(
            subject.backbone,
            (torch.zeros(2, subject.backbone.channels, size, size),),
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the code of the network decides what the exporter raises
        raise UsageError(f"--format onnx cannot hold {subject.name}: {first_line(error)}") from None
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {name: as_utf8(text) for name, text in subject.about.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda partial: partial.write_bytes(model.SerializeToString()))


def loading(_: Subject, out: Path) -> str:
    """Code that runs the graph with onnxruntime."""
    return f'onnxruntime.InferenceSession("{out.name}").run(["features"], {{"images": images}})'


def load(_: Subject, out: Path) -> Loaded:
    """Load the graph with onnxruntime, for the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])

    def network(images: Tensor) -> dict[str, Tensor]:
        return {"features": torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])}

    return Loaded(network)


TARGET = Target((".onnx",), refuse, write, loading, "onnxruntime", load)
