"""`PyramidDataset` and its batch sampler, with a real DataLoader."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fpnx
from fpnx.core.errors import FpnxError
from fpnx.store.torch_dataset import ShapeBatchSampler
from fpnx.store.writer import Writer
from tests.helpers.layouts import LEVELS, PROVENANCE, features_of, layout_of

ORDER = [5, 0, 3, 0, 1, 2]  # a batch sampler may repeat images
OPTIONS: dict[str, Any] = {"weights": "random", "backbone": "mobilenet_v2", "channels": 8}


@pytest.fixture
def ragged(photos: Path, tmp_path: Path) -> Path:
    (photos / "bad.jpg").write_bytes(b"")
    fpnx.extract(photos, tmp_path / "ragged.h5", size="native", levels="P3-P4", **OPTIONS)
    return tmp_path / "ragged.h5"


def test_arguments_are_checked(ragged: Path) -> None:
    assert fpnx.PyramidDataset(ragged, levels="P3").levels == ("P3",)
    for levels in ([], 5, "P9", ["P5"]):
        with pytest.raises(FpnxError, match="level"):
            fpnx.PyramidDataset(ragged, levels=levels)  # type: ignore[arg-type]
    with pytest.raises(FpnxError, match="target 3: take a dict"):
        fpnx.PyramidDataset(ragged, target=3)  # type: ignore[arg-type]
    data = fpnx.PyramidDataset(ragged)
    assert data[-1]["path"] == data[5]["path"]
    for beyond in (6, 999, -7):
        with pytest.raises(IndexError, match=rf"image {beyond}: .*ragged\.h5 holds 6 that are done"):
            data[beyond]


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_batches_of_one_shape(ragged: Path, workers: int) -> None:
    data = fpnx.PyramidDataset(ragged, levels=("P3", "P4"), target=length_of_path)
    assert len(data) == 6
    data[0]  # opened before the workers fork
    loader = DataLoader(data, batch_sampler=data.batch_sampler(2, shuffle=True, seed=0), num_workers=workers)
    seen = []
    with fpnx.open(ragged) as store:
        for batch in loader:
            for i, path in enumerate(batch["path"]):
                assert np.array_equal(batch["P3"][i].numpy(), store[path]["P3"])
                assert store.paths[int(batch["index"][i])] == path
                assert int(batch["target"][i]) == len(path)
            seen += batch["path"]
    assert sorted(seen) == sorted(data[i]["path"] for i in range(6))


def length_of_path(path: str) -> int:
    return len(path)


def test_samples(ragged: Path) -> None:
    data = fpnx.PyramidDataset(ragged)
    sample = data[1]
    assert set(sample) == {"P3", "P4", "path", "index"}
    assert isinstance(sample["P3"], torch.Tensor)
    assert sample["P3"].shape == (8, 12, 8)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[1]["P4"], sample["P4"])
    with pytest.raises(FpnxError, match="it has P3, P4"):
        fpnx.PyramidDataset(ragged, levels=["P2"])


def test_batch_sampler() -> None:
    groups = ["a", "b", "a", "a", "b", "a", "a"]
    plain = list(ShapeBatchSampler(groups, 2))
    assert plain == [[0, 2], [3, 5], [6], [1, 4]]
    sampler = ShapeBatchSampler(groups, 2, shuffle=True, seed=3)
    epochs = [list(sampler) for _ in range(4)]
    assert len(sampler) == len(epochs[0]) == 4
    assert all(sorted(i for batch in epoch for i in batch) == list(range(7)) for epoch in epochs)
    assert all(len({groups[i] for i in batch}) == 1 for epoch in epochs for batch in epoch)
    assert len({str(epoch) for epoch in epochs}) > 1
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]
    with pytest.raises(FpnxError, match="batch size 0"):
        ShapeBatchSampler(groups, 0)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Seven images of two sizes, one of which failed."""
    layout = layout_of(["64x64", "96x64", "64x64", "64x64", "96x64", "64x64", "64x64"])
    writer = Writer.create(tmp_path / "written.h5", layout, PROVENANCE)
    for i, size in enumerate(layout.padded_sizes):
        if i == 2:
            writer.fail(i, "damaged")
        else:
            assert size is not None
            writer.put([i], features_of([i], size), np.array([[7, 7]]), {level: [0] for level in LEVELS})
    writer.finish()
    return tmp_path / "written.h5"


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_batches_in_workers_are_the_samples_one_by_one(written: Path, context: str) -> None:
    with fpnx.open(written) as store:
        labels = {item.path: item.index * 10 for item in store}
    data = fpnx.PyramidDataset(written, target=labels)
    loader = DataLoader(
        data,
        batch_size=4,
        collate_fn=as_they_are,
        num_workers=1,
        multiprocessing_context=context,
        sampler=ORDER,
    )
    samples = [sample for batch in loader for sample in batch]
    for sample, i in zip(samples, ORDER, strict=True):
        expected = data[i]
        assert list(sample) == list(expected) == ["P4", "P5", "path", "index", "target"]
        assert all(torch.equal(sample[level], expected[level]) for level in ("P4", "P5"))
        assert [sample[key] for key in ("path", "index", "target")] == [
            expected["path"], expected["index"], expected["index"] * 10
        ]  # fmt: skip


def as_they_are(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return samples


def test_labels_by_path(written: Path) -> None:
    with fpnx.open(written) as store:
        labels = {item.path: item.index for item in store}
    first, *_ = labels
    del labels[first]
    with pytest.raises(FpnxError, match=f"target has no label for {first}: its keys are stored paths"):
        fpnx.PyramidDataset(written, target=labels)
    with pytest.raises(FpnxError, match=f"no label for {first} and 5 others"):
        fpnx.PyramidDataset(written, target={})


class Doubled(fpnx.PyramidDataset):
    """Samples of its own, of which batches are made."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = super().__getitem__(i)
        return {"doubled": sample["P4"] * 2}


def test_batches_of_a_subclass_are_its_own_samples(written: Path) -> None:
    data = Doubled(written)
    assert [list(sample) for sample in data.__getitems__([0, 1])] == [["doubled"]] * 2


def test_positions_out_of_range_in_a_batch(written: Path) -> None:
    with pytest.raises(IndexError, match=r"image 6: .*written\.h5 holds 6 that are done"):
        fpnx.PyramidDataset(written).__getitems__([0, 6])
