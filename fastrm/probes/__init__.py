"""Measures what a backbone has learned: classifiers on its features, fine-tuning, and the student-teacher gap."""

from fastrm.probes.collapse import collapsed, effective_rank, feature_std
from fastrm.probes.features import Pixels, features
from fastrm.probes.finetune import fine_tuned
from fastrm.probes.frozen import frozen_scores
from fastrm.probes.gap import gap
from fastrm.probes.knn import KNN, knn_accuracy
from fastrm.probes.linear import LinearHeads, fitted_heads, published_linear
from fastrm.probes.neighbours import nearest, picture
from fastrm.probes.online import OnlineLinear
from fastrm.probes.scores import Estimate, accuracies

__all__ = [
    "KNN",
    "Estimate",
    "LinearHeads",
    "OnlineLinear",
    "Pixels",
    "accuracies",
    "collapsed",
    "effective_rank",
    "feature_std",
    "features",
    "fine_tuned",
    "fitted_heads",
    "frozen_scores",
    "gap",
    "knn_accuracy",
    "nearest",
    "picture",
    "published_linear",
]
