"""Names that differ in Unicode normalisation."""

from __future__ import annotations

from fpnx.core.names import NameIndex, same_name

COMPOSED, DECOMPOSED, MIXED = "\u00e9\u00e9.png", "e\u0301e\u0301.png", "\u00e9e\u0301.png"


def test_exact_names_come_first_and_others_only_where_they_are_alone() -> None:
    index = NameIndex(["a.png", COMPOSED, "b/" + DECOMPOSED])
    assert [index.get(name) for name in ("a.png", COMPOSED, DECOMPOSED, MIXED)] == [0, 1, 1, 1]
    assert index.get("b/" + COMPOSED) == 2
    assert index.get("c.png") is index.get("\u00e8.png") is None
    both = NameIndex([DECOMPOSED, COMPOSED])
    assert [both.get(name) for name in (COMPOSED, DECOMPOSED, MIXED)] == [1, 0, None]


def test_names_as_bytes() -> None:
    names = [b"a.png", b"caf\xe9.png", DECOMPOSED.encode()]
    assert same_name(COMPOSED.encode(), names) == DECOMPOSED.encode()
    assert same_name(b"caf\xe8.png", names) is None
    assert same_name(b"b.png", names) is None
    assert same_name(MIXED.encode(), [COMPOSED.encode(), DECOMPOSED.encode()]) is None
