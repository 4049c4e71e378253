"""Backbones and heads."""

from fastrm.models.backbone import Backbone, build_backbone
from fastrm.models.heads import mlp

__all__ = ["Backbone", "build_backbone", "mlp"]
