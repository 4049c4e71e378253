"""Backbones and heads."""

from fastrm.models.backbone import Backbone
from fastrm.models.build import build_backbone, untrained
from fastrm.models.heads import mlp
from fastrm.models.module import module_name
from fastrm.models.weights import read_backbone

__all__ = ["Backbone", "build_backbone", "mlp", "module_name", "read_backbone", "untrained"]
