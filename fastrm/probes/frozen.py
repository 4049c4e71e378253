"""Scores of frozen networks, in one pass over the bank and one over the test images.

All processes share the images: each reads a part of them, once for all networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from fastrm.data import Source
from fastrm.machine.distributed import on_this_machine, world
from fastrm.machine.meeting import everyone
from fastrm.machine.memory import capacity
from fastrm.probes.features import BATCH, Setting, Share, labels_of, of_round, pooled, rounds, shares, width_of
from fastrm.probes.knn import KNN
from fastrm.probes.linear import fitted_heads
from fastrm.probes.scores import Classifier, Estimate, Tally
from fastrm.terminal.progress import Task, bar

_HELD = 0.5
"""Fraction of the memory for the features of several networks at a time; the other networks follow."""


def frozen_scores(
    networks: Mapping[str, nn.Module],
    source: Source,
    setting: Setting,
    *,
    knn: bool = False,
    linear: bool = False,
    others: Mapping[str, Sequence[Classifier]] | None = None,
    name: str = "features",
) -> dict[str, dict[str, Estimate]]:
    """Accuracy on ``source.test`` of classifiers that are built from the features of ``source.bank``, by network.

    The bank's features are kept with 4 bytes per value, divided among the processes; test images are processed in
    batches. Call this in all processes, with the same networks; the scores are those of a single process.

    Args:
        networks: images to features [B, D], by name.
        source: labelled data set.
        setting: how images reach the networks.
        knn, linear: classifiers to build; the linear one is that of :func:`fitted_heads`.
        others: further classifiers per network, already trained.
        name: title of the progress bar.
    """
    assert source.bank is not None
    assert source.test is not None
    made = knn or linear
    tried = networks if made else {each: networks[each] for each in others or {}}
    scores: dict[str, dict[str, Estimate]] = {each: {} for each in networks}
    rows = len(source.bank) if made else 0
    fitting = rows if linear else 0  # a guess for the progress bar: as long as the features of the bank
    for group in _groups(tried, source, setting, rows):
        text = f"{name} ({', '.join(group)}), {rows + len(source.test):,} images"
        with bar(text, rows + fitting * len(group) + len(source.test)) as task:
            classifiers = {each: list((others or {}).get(each, ())) for each in group}
            banks = shares(group, source.bank, setting, task.advance) if made else {}
            for each, share in banks.items():
                if knn:
                    classifiers[each].append(KNN.of_share(share))
                if linear:
                    classifiers[each].append(_fitted(share, task, fitting))
            tallies = {each: Tally(found) for each, found in classifiers.items()}
            labels = labels_of(source.test, setting.device)
            widths = {each: width_of(network, source.test, setting) for each, network in group.items()}
            for number, (views, indices) in enumerate(rounds(source.test, setting)):
                for each, network in group.items():
                    tallies[each].add(pooled(network, views, widths[each]), labels[indices], indices)
                task.advance(of_round(source.test, number))
            scores |= {each: tally.estimates(shared=True) for each, tally in tallies.items()}
    return scores


def _fitted(share: Share, task: Task, size: int) -> Classifier:
    """Fit the quick linear classifier; ``size`` is its share of the progress bar."""
    begin = task.done
    return fitted_heads(
        share.features,
        share.labels,
        places=share.places,
        progress=lambda done: task.reach(begin + size * done),
    )


def _groups(
    networks: Mapping[str, nn.Module], source: Source, setting: Setting, rows: int
) -> Iterator[dict[str, nn.Module]]:
    """Yield groups of networks whose features of ``rows`` images fit into memory together."""
    assert source.bank is not None
    there = capacity(setting.device)
    here = float("inf") if there is None else _HELD * there
    free = min(everyone(here if setting.device.type == "cuda" else here / on_this_machine()))
    own = min(rows, BATCH * math.ceil(rows / (BATCH * world().size)))
    group: dict[str, nn.Module] = {}
    taken = 0
    for name, network in networks.items():
        needed = 4 * own * width_of(network, source.bank, setting)
        if group and taken + needed > free:
            yield group
            group, taken = {}, 0
        group[name] = network
        taken += needed
    if group:
        yield group
