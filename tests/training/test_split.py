"""Which images are held out."""

from __future__ import annotations

import numpy as np

from fpnx.labels.annotations import ImageLabels
from fpnx.training.split import held_out


def images(classes: list[list[int]]) -> tuple[list[str], list[ImageLabels]]:
    names = [f"{i:03}.png" for i in range(len(classes))]
    return names, [ImageLabels(name=n, classes=np.array(c, np.int64)) for n, c in zip(names, classes, strict=True)]


def test_each_class_is_held_out_by_its_share() -> None:
    classes = [[0]] * 60 + [[1]] * 30 + [[2]] * 10
    names, labels = images(classes)
    chosen = held_out(names, labels, 0.2, seed=0)
    assert [sum(classes[i] == [c] for i in chosen) for c in range(3)] == [12, 6, 2]
    assert chosen == sorted(set(chosen))
    assert chosen == held_out(names, labels, 0.2, seed=0)
    assert chosen != held_out(names, labels, 0.2, seed=1)


def test_rare_classes_go_first_where_images_have_several() -> None:
    classes = [[0, 1]] * 10 + [[0]] * 90
    names, labels = images(classes)
    assert sum(1 in classes[i] for i in held_out(names, labels, 0.3, seed=0)) == 3


def test_the_order_of_images_does_not_matter() -> None:
    names, labels = images([[i % 3] for i in range(40)])
    turned = held_out(names[::-1], labels[::-1], 0.25, seed=4)
    assert sorted(names[::-1][i] for i in turned) == [names[i] for i in held_out(names, labels, 0.25, seed=4)]


def test_the_only_image_of_a_class_is_kept_to_train_on() -> None:
    classes = [[i] for i in range(6)] + [[6]] * 2
    for seed in range(5):
        assert held_out(*images(classes), 0.15, seed=seed)[0] in (6, 7)


def test_few_images() -> None:
    assert held_out(*images([]), 0.5, seed=0) == []
    assert held_out(*images([[0]]), 0.5, seed=0) == []
    assert len(held_out(*images([[0], [1]]), 0.15, seed=0)) == 1
    assert len(held_out(*images([[0], [1], []]), 0.9, seed=0)) == 2
    assert held_out(*images([[0]] * 20), 0.0, seed=0) == []
    assert len(held_out(*images([[i] for i in range(20)]), 0.15, seed=0)) == 3
