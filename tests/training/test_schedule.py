"""The learning rate at each step, and the end of a run."""

from __future__ import annotations

import itertools
import math

import pytest

from fpnx.training.schedule import LAST, Schedule


def test_warm_up_and_cosine() -> None:
    schedule = Schedule(10, 20, patience=3)  # 200 steps, 20 of them warm-up
    factors = [schedule.factor(step) for step in range(200)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert max(factors) == factors[19] == 1.0
    assert factors[110] == pytest.approx(LAST + (1 - LAST) / 2, abs=1e-9)  # half of the cosine's 180 steps
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[20:]))
    assert factors[-1] == pytest.approx(LAST, abs=1e-3)
    assert not schedule.finished(9)
    assert schedule.finished(10)


def test_long_runs_warm_up_for_200_steps() -> None:
    schedule = Schedule(10, 1000, patience=3)
    assert schedule.factor(98) == pytest.approx(99 / 200)
    assert schedule.factor(199) == 1.0


def test_auto_falls_when_the_score_no_longer_rises() -> None:
    schedule = Schedule("auto", 10, patience=2)
    scores: list[float | None] = []
    for score in (0.1, 0.2, 0.3, 0.3, 0.3009):  # the last two are no better
        scores.append(score)
        assert schedule.epochs is None
        schedule.after_epoch(scores)
    assert (schedule.falls_from, schedule.epochs) == (5, 8)  # half as many epochs as there were, rounded up
    assert [schedule.factor(step) for step in (0, 4, 9, 10, 49)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    falling = [schedule.factor(step) for step in range(50, 80)]
    assert falling[0] == 1.0
    assert falling[15] == pytest.approx(LAST + (1 - LAST) / 2, abs=1e-9)
    assert falling[-1] < 0.05
    schedule.after_epoch([*scores, 0.9])  # what is decided stays
    assert schedule.epochs == 8
    assert schedule.finished(8)
    other = Schedule("auto", 10, patience=2)
    other.load(schedule.state())
    assert [other.factor(step) for step in range(80)] == [schedule.factor(step) for step in range(80)]


def test_auto_without_any_score_ends() -> None:
    schedule = Schedule("auto", 10, patience=3)
    scores: list[float | None] = []
    while not schedule.finished(len(scores)):
        scores.append(None)
        schedule.after_epoch(scores)
        assert len(scores) < 50
    assert len(scores) == 4 + math.ceil(4 / 2)
