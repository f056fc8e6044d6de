"""Text of messages."""

from __future__ import annotations

import pytest

from fpnx.core.text import did_you_mean, other_files


@pytest.mark.parametrize("word", ["bifpn", "nasfpn", "panet", "retinanet"])
def test_another_kind_of_pyramid_is_no_misspelt_one(word: str) -> None:
    assert did_you_mean(word, ("fpn", "pafpn")) == ""


@pytest.mark.parametrize(
    ("word", "choices", "found"),
    [
        ("pafn", "fpn pafpn", "pafpn"),
        ("ResNet-50", "resnet18 resnet50", "resnet50"),
        ("convnext", "convit convnext_tiny", "convnext_tiny"),
        ("a.jgp", "b.png a.jpg", "a.jpg"),
    ],
)
def test_misspelt_and_shortened_names_are_suggested(word: str, choices: str, found: str) -> None:
    assert did_you_mean(word, choices.split()) == f" (did you mean {found}?)"


def test_other_files_are_named_by_kind_the_most_frequent_first() -> None:
    assert other_files({}) == "0 other files passed over"
    assert other_files({".txt": 1}) == "1 other file passed over: 1 .txt"
    assert other_files({".txt": 2, ".heic": 4}) == "6 other files passed over: 4 .heic, 2 .txt"
    kinds = dict.fromkeys((".a", ".b", ".c", ".d", ".e", ".f", ".g"), 1)
    assert other_files(kinds) == "7 other files passed over: 1 .a, 1 .b, 1 .c, 1 .d, 1 .e, 2 more"
