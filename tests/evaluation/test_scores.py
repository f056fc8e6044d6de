"""The dataclass of scores: JSON and text."""

from __future__ import annotations

import json

import pytest

from fpnx.evaluation.scores import ClassRow, Confusion, Scores

DETECTION = Scores(
    task="detection",
    main="mask_AP",
    images=7,
    values={"AP": 0.25, "APs": None, "mask_AP": 0.125, "proposal_AR100s": 0.5},
    classes=(
        ClassRow(3, "cat", 12, {"AP": 0.25, "mask AP": 1.0}),
        ClassRow(9, "a\nb" + 60 * "x", 0, {"AP": None, "mask AP": None}),
    ),
)
CLASSIFICATION = Scores(
    task="classification",
    main="accuracy",
    images=4,
    values={"accuracy": 0.75, "mean_recall": 0.5},
    classes=(ClassRow(0, "a", 3, {"recall": 1.0}),),
    counted="images",
    confusions=(Confusion("b", "a", 1),),
)


@pytest.mark.parametrize("scores", [DETECTION, CLASSIFICATION], ids=["detection", "classification"])
def test_json_is_read_as_it_was(scores: Scores) -> None:
    facts = json.loads(json.dumps(scores.to_json()))
    assert Scores.from_json(facts) == scores
    assert facts["value"] == scores.value


def test_text() -> None:
    assert DETECTION.value == 0.125
    assert DETECTION.lines() == [
        "AP 0.250  APs -",
        "masks: AP 0.125",
        "proposals: AR100s 0.500",
        f"class{27 * ' '}  objects     AP  mask AP",
        f"cat{29 * ' '}       12  0.250    1.000",
        f"a\\nb{27 * 'x'}…        0      -        -",
    ]
    assert CLASSIFICATION.lines()[0] == "accuracy 0.750  mean recall 0.500"
    assert CLASSIFICATION.lines()[-1] == "1 image of b taken for a"


def test_text_of_many_scores_and_classes_is_80_columns_wide() -> None:
    values = {f"AR{i}": 0.5 for i in range(30)}
    rows = [ClassRow(i, f"class {i}", i, {"AP": 0.5, "AP50": 0.5}) for i in range(1000)]
    lines = Scores(task="detection", main="AR0", images=1, values=values, classes=rows).lines()
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).count("AR") == 30
    assert lines[-1] == "and 960 more classes"
    assert Scores(task="detection", main="AR0", images=1, values=values).lines()[-1].startswith("AR")
