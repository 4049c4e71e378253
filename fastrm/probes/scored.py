"""All scores of several networks on labelled images: frozen, with trained classifiers, and fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from fastrm.data import Source
from fastrm.machine.distributed import world
from fastrm.machine.meeting import everyone
from fastrm.methods import LinearProtocol
from fastrm.models import Backbone
from fastrm.probes.features import Pixels, Setting, features
from fastrm.probes.finetune import fine_tuned
from fastrm.probes.frozen import frozen_scores
from fastrm.probes.linear import published_linear
from fastrm.probes.scores import Estimate, accuracies
from fastrm.terminal.progress import bar

Scores = dict[str, dict[str, Estimate]]
"""Estimates by network, then by score."""


def scored(
    networks: Mapping[str, Backbone],
    source: Source,
    setting: Setting,
    *,
    knn: bool,
    quick: bool,
    protocol: LinearProtocol | None,
    semi: float | None,
) -> Scores:
    """Score networks and raw pixels, with the differences to the network ``start``.

    Raw pixels get only scores that train no network. Call this in all processes, with the same networks.

    Args:
        networks: by name.
        source: labelled data set.
        setting: how images reach the networks.
        knn, quick: as for :func:`frozen_scores`.
        protocol: settings of the linear classifiers on crops; None trains none.
        semi: fraction of the labels for fine-tuning whole networks; None trains none.
    """
    frozen: dict[str, nn.Module] = {**networks, "pixels": Pixels()}
    scores = frozen_scores(frozen, source, setting, knn=knn, linear=quick, name=source.name)
    rank, size = world()
    own = {name: network for at, (name, network) in enumerate(networks.items()) if at % size == rank}
    for further in everyone(_trained(own, source, setting, protocol=protocol, semi=semi)):
        for name, found in further.items():
            scores[name] |= found
    start = scores.pop("start", {})
    for found in scores.values():
        for score in found.keys() & start.keys():
            found[score] = replace(found[score], above_start=found[score].above(start[score]))
    scores["start"] = start
    return {name: found for name, found in scores.items() if found}


def _trained(
    networks: Mapping[str, Backbone],
    source: Source,
    setting: Setting,
    *,
    protocol: LinearProtocol | None,
    semi: float | None,
) -> Scores:
    """Train classifiers or fine-tune, for the networks of this process, and score the results."""
    scores: Scores = {name: {} for name in networks}
    assert source.test is not None
    if protocol is not None and networks:
        with bar(f"linear classifiers, {protocol.epochs} epochs") as task:
            classifiers = published_linear(networks, source, setting, protocol, progress=task.reach)
        for name, classifier in classifiers.items():
            with bar(f"test of the linear classifier, {name}", len(source.test)) as task:
                found = features(networks[name], source.test, setting, task.advance)
                scores[name] |= accuracies(found, [classifier])
    if semi is not None:
        for name, network in networks.items():
            with bar(f"fine-tuning of the {name}") as task:
                tuned, classifier = fine_tuned(network, source, setting, semi, progress=task.reach)
            with bar(f"test after fine-tuning, {name}", len(source.test)) as task:
                tested = accuracies(features(tuned, source.test, setting, task.advance), [classifier])
            scores[name][f"semi_{semi:g}"] = tested["semi"]
    return scores
