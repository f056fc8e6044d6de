"""Holding out images for validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fpnx.labels.annotations import ImageLabels
from fpnx.training.batches import random_seed

__all__ = ["held_out"]


def held_out(names: Sequence[str], labels: Sequence[ImageLabels], share: float, seed: int) -> list[int]:
    """Indices of the images that are held out, in order: `share` of each class, as far as whole images allow.

    Each image belongs to the rarest of its classes. Which images it is depends on their names and the seed alone, not
    on their order. At least one image is held out and one is not, where there are two or more.
    """
    if share == 0 or len(names) < 2:
        return []
    wanted = min(max(1, round(share * len(names))), len(names) - 1)
    counts = Counter(int(label) for each in labels for label in set(each.classes.tolist()))
    groups: dict[int, list[int]] = {}
    for i, each in enumerate(labels):
        rarest = min(set(each.classes.tolist()), key=lambda label: (counts[label], label), default=-1)
        groups.setdefault(int(rarest), []).append(i)
    chosen: list[int] = []
    # The next image of each group, by what the group still lacks; the only image of a class comes last.
    rest: list[tuple[bool, float, int, int]] = []
    for group in sorted(groups):
        ordered = sorted(groups[group], key=lambda i: (random_seed("split", seed, names[i]), names[i]))
        exact = share * len(ordered)
        taken = int(exact)
        chosen += ordered[:taken]
        rest += [(len(ordered) == 1, exact - taken - place, group, i) for place, i in enumerate(ordered[taken:])]
    rest.sort(key=lambda item: (item[0], -item[1], random_seed("split", seed, item[2]), item[2]))
    chosen += [i for *_, i in rest[: max(0, wanted - len(chosen))]]
    return sorted(chosen[:wanted])
