"""What damage of any kind looks like to the next run: found, named, and never read as features."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradpursuit.errors import RunError, StoreError
from gradpursuit.store import GradientStore
from stores import SPEC, filled, shard

DAMAGED = replace(SPEC, dtype="int8", origin={"model": {"a": 1}})


@pytest.fixture
def store(tmp_path: Path) -> GradientStore:
    """A complete int8 store, one shard of which has lost a row for a reason."""
    made = filled(tmp_path / "s", DAMAGED)
    made.exclude({4: "the loss is nan"})
    return made


def test_no_bit_of_a_file_changes_unnoticed(store: GradientStore) -> None:
    """Every byte of length, header and payload, in several ways."""
    path = store.path(0, 1)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(len(whole)):
        for mask in (1 << int(rng.integers(8)), 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            state, reason = store.state(0, 1)
            assert state == "broken", (place, mask)
            assert reason
        if place % 100 == 0:
            with pytest.raises(StoreError, match=r"checkpoint-1/shard-00001\.safetensors: .*; collect the gradients"):
                store.features()
    path.write_bytes(whole)
    assert store.state(0, 1) == ("whole", "")


def test_truncation_at_any_length_is_found_without_reading_everything(store: GradientStore) -> None:
    path = store.path(1, 0)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match="not a whole shard"):
            store.read(1, 0, verify=False)
        assert store.state(1, 0).state == "broken"
    path.write_bytes(whole + b"\0")
    with pytest.raises(StoreError, match="not a whole shard"):
        store.read(1, 0, verify=False)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b"null",
        b'{"__metadata__": []}',
        b'{"__metadata__":{"sha256":"x"}}',
        b"\xff",
        b"[" * 100_000,
        b'{"__metadata__":{"dropped":"{}","fingerprint":"f","parts":"{}","sha256":"x"},"features":'
        b'{"data_offsets":[0,-1],"dtype":"F32","shape":[1]}}',
    ],
)
def test_any_other_file_under_its_name_is_refused(store: GradientStore, header: bytes) -> None:
    header += b" " * (-len(header) % 8)
    store.path(0, 0).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(StoreError, match="not a whole shard"):
        store.read(0, 0)
    assert store.state(0, 0).state == "broken"


def test_random_bytes_are_refused(store: GradientStore) -> None:
    rng = np.random.default_rng(0)
    for length in (0, 1, 8, 100, 5000):
        store.path(0, 0).write_bytes(rng.bytes(length))
        assert store.state(0, 0).state == "broken"


def test_shard_of_another_store_is_refused_with_the_part_that_differs(store: GradientStore, tmp_path: Path) -> None:
    foreign = filled(tmp_path / "o", replace(DAMAGED, origin={"model": {"a": 2}}))
    shutil.copy(foreign.path(0, 1), store.path(0, 1))
    reason = "it was made with other settings than its store (model.a is 2, expected 1)"
    assert store.state(0, 1) == ("broken", reason)
    other_ids = filled(tmp_path / "i", replace(DAMAGED, ids=(*SPEC.ids[:-1], "x")))
    shutil.copy(other_ids.path(0, 1), store.path(0, 1))
    assert store.state(0, 1).reason.endswith("(other ids)")


def test_shard_under_the_name_of_another_is_refused(store: GradientStore) -> None:
    shutil.copy(store.path(0, 0), store.path(0, 1))
    assert store.state(0, 1) == ("broken", "it holds other rows than 3-5")


def test_a_folder_under_the_name_of_a_shard(store: GradientStore) -> None:
    store.path(0, 1).unlink()
    store.path(0, 1).mkdir()
    assert store.state(0, 1).state == "broken"


def test_has_names_the_file_and_what_is_wrong_with_it(store: GradientStore, caplog: pytest.LogCaptureFixture) -> None:
    content = bytearray(store.path(0, 1).read_bytes())
    content[-3] ^= 4
    store.path(0, 1).write_bytes(content)
    store.path(1, 1).unlink()
    with caplog.at_level(logging.INFO, "gradpursuit"):
        found = [store.has(t, s) for t in range(2) for s in range(3)]
    assert found == [True, False, True, True, False, True]
    (record,) = caplog.records  # what is merely missing is no damage
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{store.path(0, 1)}: its bytes do not match their checksum; computed again"


def test_verify_finds_everything_at_once(store: GradientStore) -> None:
    assert store.verify() == []
    store.path(0, 0).unlink()
    store.path(0, 2).write_bytes(b"")
    content = bytearray(store.path(1, 2).read_bytes())
    content[-1] ^= 0x80
    store.path(1, 2).write_bytes(content)
    store.write(1, 1, shard(DAMAGED, 1, 1))
    found = {problem.path: problem.reason for problem in store.verify()}
    assert found.keys() == {store.path(0, 0), store.path(0, 2), store.path(1, 2), store.path(0, 1)}
    assert found[store.path(0, 0)] == "not there: rows 0-2 of checkpoint 1 are missing"
    assert found[store.path(0, 2)].startswith("not a whole shard")
    assert found[store.path(1, 2)] == "its bytes do not match their checksum: rows 6-6 of checkpoint 2 are missing"
    assert found[store.path(0, 1)].startswith("it lacks row 4 ('id-4', dropped: the loss is nan), which other")


def test_create_removes_what_interrupted_writes_left(store: GradientStore, caplog: pytest.LogCaptureFixture) -> None:
    left = [store.path(0, 1).with_suffix(".safetensors.part"), store.folder / "manifest.json.part"]
    for path in left:
        path.write_bytes(b"half")
    GradientStore.create(store.folder, DAMAGED)
    assert not list(store.folder.rglob("*.part"))
    assert {record.getMessage() for record in caplog.records} == {
        f"{path}: left by an interrupted write; removed" for path in left
    }


@pytest.mark.parametrize("damage", ["{", "", "5", "edited", None])
def test_a_lost_manifest_does_not_cost_the_shards(
    store: GradientStore, damage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = store.folder / "manifest.json"
    before = manifest.read_bytes()
    if damage is None:
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace("id-3", "id-x") if damage == "edited" else damage)
    again = GradientStore.create(store.folder, DAMAGED)
    assert [record.getMessage().startswith(str(manifest)) for record in caplog.records] == [True] * (damage is not None)
    assert manifest.read_bytes() == before
    assert all(again.has(t, s) for t in range(2) for s in range(3))


def test_a_lost_manifest_of_another_store_saves_no_foreign_shard(
    store: GradientStore, caplog: pytest.LogCaptureFixture
) -> None:
    (store.folder / "manifest.json").unlink()
    other = GradientStore.create(store.folder, replace(DAMAGED, origin={"model": {"a": 9}}))
    assert not any(other.has(t, s) for t in range(2) for s in range(3))
    assert len([r for r in caplog.records if "model.a is 1, expected 9" in r.getMessage()]) == 6


def test_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """On a real file system of 1 MiB: what was finished stays, nothing half-written does, and it can go on."""
    spec = replace(SPEC, dim=60_000)
    expected = filled(tmp_path / "s", spec)
    store = GradientStore(small_disk / "s", spec)
    store.write(0, 0, shard(spec, 0, 0))
    with pytest.raises(RunError, match="no space left on the disk; free some and run again: finished work is kept"):
        store.write(0, 1, shard(spec, 0, 1))
    assert [store.state(0, s).state for s in range(3)] == ["whole", "missing", "missing"]
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["shard-00000.safetensors"]
    assert store.path(0, 0).read_bytes() == expected.path(0, 0).read_bytes()
    with pytest.raises(RunError, match="the gradient store needs"):
        GradientStore.create(small_disk / "o", spec)


def test_full_disk_during_exclude(small_disk: Path) -> None:
    spec = replace(SPEC, ids=SPEC.ids[:3], checkpoints=1, dim=60_000)
    store = GradientStore(small_disk / "s", spec)
    store.write(0, 0, shard(spec, 0, 0))
    before = store.path(0, 0).read_bytes()
    with pytest.raises(RunError, match="no space left"):
        store.exclude({1: "the loss is nan"})
    assert store.path(0, 0).read_bytes() == before
    assert not list(small_disk.rglob("*.part"))
