"""Rows that were not computed: absent, never zero, with their reason, and the same at every checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradpursuit.errors import StoreError
from gradpursuit.store import DTYPES, GradientStore
from gradpursuit.store import folder as folder_module
from stores import SPEC, filled, shard

NAN, MEMORY = "the loss is nan", "out of memory"


def uneven(folder: Path, dtype: str = "float32") -> GradientStore:
    """Row 4 is dropped at checkpoint 1, row 0 and all of the last shard (row 6) at checkpoint 2."""
    spec = replace(SPEC, dtype=dtype)
    store = filled(folder, spec)
    store.write(0, 1, shard(spec, 0, 1).without({4: NAN}))
    store.write(1, 0, shard(spec, 1, 0).without({0: MEMORY}))
    store.write(1, 2, shard(spec, 1, 2).without({6: NAN}))
    return store


def contents(store: GradientStore) -> dict[str, bytes]:
    return {
        str(path.relative_to(store.folder)): path.read_bytes() for path in store.folder.rglob("*") if path.is_file()
    }


def test_a_shard_with_dropped_rows_is_whole(tmp_path: Path) -> None:
    store = uneven(tmp_path / "s")
    assert store.state(0, 1) == store.state(1, 2) == ("whole", "")
    read = store.read(0, 1, verify=True)
    assert read.row.tolist() == [3, 5]
    assert read.dropped == {4: NAN}
    np.testing.assert_array_equal(read.features, shard(SPEC, 0, 1).features[[0, 2]])
    assert store.read(1, 2).features.shape == (0, 6)
    assert store.dropped() == {0: MEMORY, 4: NAN, 6: NAN}


def test_a_row_that_is_neither_there_nor_dropped_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    with pytest.raises(StoreError, match="other rows than 3-5"):
        store.write(0, 1, replace(shard(SPEC, 0, 1).without({4: NAN}), dropped={}))


def test_checkpoints_that_disagree_are_refused_with_the_row_and_the_way_out(tmp_path: Path) -> None:
    store = uneven(tmp_path / "s")
    message = r"checkpoint-2/shard-00000.*lacks row 0 \('id-0', dropped: out of memory\).*collect the gradients again"
    for read in (store.kept, store.features, lambda: store.column("norm")):
        with pytest.raises(StoreError, match=message):
            read()


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_exclude_every_reader_goes_by_the_kept_rows(tmp_path: Path, dtype: str) -> None:
    store = uneven(tmp_path / "s", dtype)
    full = filled(tmp_path / "full", store.spec)
    store.exclude(store.dropped())
    kept = [1, 2, 3, 5]
    assert store.kept().dtype == np.int64
    assert store.kept().tolist() == kept
    assert store.dropped() == {0: MEMORY, 4: NAN, 6: NAN}
    for t, blocks in enumerate(store.features()):
        assert [len(block) for block in blocks] == [2, 2]
        np.testing.assert_array_equal(np.concatenate(blocks), np.concatenate(full.features()[t])[kept])
    for name in ("norm", "loss", "tokens"):
        np.testing.assert_array_equal(store.column(name), full.column(name)[:, kept])
    assert store.verify() == []


def test_exclude_again_changes_nothing(tmp_path: Path) -> None:
    store = uneven(tmp_path / "s")
    store.exclude(store.dropped())
    before = contents(store)
    times = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.safetensors")}
    store.exclude(store.dropped())
    store.exclude({})
    assert contents(store) == before
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.safetensors")} == times


@pytest.mark.parametrize("survived", range(3))
def test_exclude_interrupted_then_repeated_ends_with_the_same_bytes(
    tmp_path: Path, survived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = uneven(tmp_path / "whole")
    whole.exclude(whole.dropped())
    store = uneven(tmp_path / "s")
    left, write = [survived], folder_module.write_shard

    def write_until_killed(*args: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args)

    monkeypatch.setattr(folder_module, "write_shard", write_until_killed)
    with pytest.raises(KeyboardInterrupt):
        store.exclude(store.dropped())
    monkeypatch.undo()
    with pytest.raises(StoreError, match="collect the gradients again"):
        store.features()
    again = GradientStore.create(tmp_path / "s", SPEC)
    again.exclude(again.dropped())
    assert contents(again) == contents(whole)


def test_a_shard_computed_again_joins_the_others(tmp_path: Path) -> None:
    """As after damage: the row that another checkpoint lacks comes back, and is excluded once more."""
    store = uneven(tmp_path / "s")
    store.exclude(store.dropped())
    before = contents(store)
    store.write(1, 1, shard(SPEC, 1, 1))
    with pytest.raises(StoreError, match=r"lacks row 4"):
        store.kept()
    store.exclude(store.dropped())
    assert contents(store) == before


def test_reason_of_the_first_checkpoint_and_order_of_rows(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    store.write(0, 2, shard(SPEC, 0, 2).without({6: NAN}))
    store.write(1, 2, shard(SPEC, 1, 2).without({6: MEMORY}))
    store.write(1, 0, shard(SPEC, 1, 0).without({2: MEMORY}))
    assert list(store.dropped().items()) == [(2, MEMORY), (6, NAN)]


def test_exclude_refuses_rows_it_does_not_have_and_damaged_shards(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    with pytest.raises(StoreError, match=r"no rows \[-1, 7\]; it has 0-6"):
        store.exclude({7: NAN, 2: NAN, -1: NAN})
    path = store.path(1, 0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="do not match their checksum"):
        store.exclude({0: NAN})
    path.unlink()
    with pytest.raises(StoreError, match="not there"):
        store.exclude({0: NAN})


def test_dropped_can_be_asked_of_an_unfinished_store(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path / "s", SPEC)
    assert store.dropped() == {}
    store.write(0, 0, shard(SPEC, 0, 0).without({1: MEMORY}))
    assert store.dropped() == {1: MEMORY}


def test_a_store_without_any_row(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    store.exclude(dict.fromkeys(range(7), NAN))
    assert store.dropped() == dict.fromkeys(range(7), NAN)
    with pytest.raises(StoreError, match=r"every row was dropped \(the loss is nan\)"):
        store.features()
