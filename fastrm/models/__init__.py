"""Backbones and heads."""

from fastrm.models.backbone import Backbone, build_backbone
from fastrm.models.heads import mlp
from fastrm.models.weights import read_backbone

__all__ = ["Backbone", "build_backbone", "mlp", "read_backbone"]
