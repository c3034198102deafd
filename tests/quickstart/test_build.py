from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from gradpursuit.config import SourceSection
from gradpursuit.data import read_examples
from gradpursuit.data.readers import content_hash
from gradpursuit.quickstart import build as module
from gradpursuit.quickstart.assets import cache_folder
from gradpursuit.quickstart.build import EXACT, HELDOUT_ROWS, NEAR, PER_FAMILY, POOL, TARGET, TARGET_ROWS, build
from gradpursuit.sources import expand


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("input")
    build(cache_folder(), made)
    return made


def load(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_pool_holds_a_dozen_families_but_not_the_target(folder: Path) -> None:
    pool = load(folder, "pool")
    originals = [row for row in pool if "duplicate_of" not in row]
    assert Counter(row["family"] for row in originals) == {task.split("/")[0]: PER_FAMILY for task in POOL}
    assert TARGET not in {row["family"] for row in pool}
    assert all(row["prompt"] and row["completion"] for row in pool)
    assert len({row["id"] for row in pool}) == len(pool) == PER_FAMILY * len(POOL) + EXACT + NEAR


def test_copies_are_what_they_are_said_to_be(folder: Path) -> None:
    pool = load(folder, "pool")
    by_id = {row["id"]: row for row in pool}
    kinds = Counter(row["id"].rsplit("-", 1)[1] for row in pool if "duplicate_of" in row)
    assert kinds == {"exact": EXACT, "near": NEAR}
    for row in pool:
        if "duplicate_of" in row:
            original = by_id[row["duplicate_of"]]
            assert row["completion"] == original["completion"]
            assert (row["prompt"] == original["prompt"]) == row["id"].endswith("-exact")
    source = SourceSection(path=str(folder / "pool.jsonl"))
    distinct = {content_hash(example.conversation) for example in read_examples(expand([source]))}
    assert len(distinct) == len(pool) - EXACT


def test_target_and_heldout_share_nothing(folder: Path) -> None:
    target, heldout = load(folder, "target"), load(folder, "heldout")
    assert (len(target), len(heldout)) == (TARGET_ROWS, HELDOUT_ROWS)
    assert not {row["prompt"] for row in target} & {row["prompt"] for row in heldout}


def test_the_same_files_every_time(folder: Path, tmp_path: Path) -> None:
    build(cache_folder(), tmp_path)
    for name in ("pool", "target", "heldout"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes()


def test_answers_come_from_scores_or_from_the_first_accepted_text() -> None:
    assert module._answer({"target_scores": {"a": 0, " b ": 1}}) == "b"
    assert module._answer({"target": ["three", "3"]}) == "three"
    assert module._answer({"target": "gear"}) == "gear"
