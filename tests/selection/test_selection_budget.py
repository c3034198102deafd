from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from gradpursuit.config import rows_of
from gradpursuit.data import IGNORE, Row, Table
from gradpursuit.errors import SelectionError
from gradpursuit.selection import Selection
from gradpursuit.selection.budget import BudgetRequest, resolve, within_budget

SOURCES = ("/data/a/faq.jsonl", "chats", "/data/b/notes.jsonl")


def row(number: int, source: str, tokens: int, supervised: int) -> Row:
    labels = [IGNORE] * (tokens - supervised) + [5] * supervised
    original = json.dumps({"prompt": str(number), "completion": "c"})
    return Row(f"row-{number}", f"hash-{number}", source, number, original, [5] * tokens, labels, "pool.jsonl")


def pool(rows: int = 40, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(rows):
        tokens = int(rng.integers(2, 30))
        made.append(row(number, SOURCES[int(rng.integers(3))], tokens, int(rng.integers(1, tokens))))
    return Table(made)


def weighted(indices: NDArray[np.int64], rng: np.random.Generator) -> Selection:
    weights = rng.uniform(0.2, 3, len(indices))
    return Selection(indices, weights / weights.mean(), np.ones(len(indices), dtype=np.int64))


def selection(rows: int = 24, of: int = 40, seed: int = 0) -> Selection:
    """A selection with a path: of 3, 6, 12 and all rows, each in an order of its own."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(of)[:rows]
    path = tuple(weighted(rng.permutation(chosen[:size]), rng) for size in (3, 6, 12))
    knee = {"budget": 6, "rule": "gain", "relative_residual": 0.3}
    return replace(weighted(rng.permutation(chosen), rng), path=path, evidence={"knee": knee})


def bought(request: BudgetRequest, made: Selection, table: Table) -> Selection:
    return within_budget(made, resolve(request, table, {"gtp": made}), table)


def sources(made: Selection, table: Table) -> list[str]:
    return [table[index].source for index in made.indices.tolist()]


@pytest.mark.parametrize("k", range(1, 25))
def test_every_number_of_rows_comes_from_the_path(k: int) -> None:
    made, table = selection(), pool()
    found = bought(BudgetRequest(k=k), made, table)
    smallest = next(subset for subset in (*made.path, made) if len(subset.indices) >= k)
    assert found.indices.tolist() == smallest.indices[:k].tolist()
    assert found.weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(found.weights / found.weights[0], smallest.weights[:k] / smallest.weights[0])


@given(st.integers(1, 3000), st.integers(1, 1000))
def test_a_share_is_rounded_up_as_it_is_written(thousandths: int, rows: int) -> None:
    thousandths = min(thousandths, 1000)
    assert rows_of(thousandths / 1000, rows) == -(-thousandths * rows // 1000)
    assert rows_of(thousandths, rows) == thousandths


def test_shares_of_the_pool_and_the_knee() -> None:
    made, table = selection(), pool(50)
    assert len(bought(BudgetRequest(fraction=0.14), made, table).indices) == 7  # 0.14 × 50 is 7.000000000000001
    budget = resolve(BudgetRequest(k="auto"), table, {"less": replace(made, evidence={}), "gtp": made})
    assert (budget.limit, budget.knee and budget.knee["strategy"]) == (6, "gtp")
    assert str(budget) == (
        "6 rows, the knee of gtp: the smallest budget on the path that brings 95 % of what the first layer brings"
    )
    with pytest.raises(SelectionError, match="less have not, as they rank rows one by one"):
        resolve(BudgetRequest(k="auto"), table, {"less": replace(made, evidence={})})


@pytest.mark.parametrize("count", ["supervised", "total"])
def test_tokens_are_used_up_to_the_row_that_does_not_fit(count: str) -> None:
    made, table = selection(), pool()

    def cost(index: int) -> int:
        found = table[index]
        return len(found.input_ids) if count == "total" else sum(label != IGNORE for label in found.labels)

    costs = [cost(index) for index in made.indices.tolist()]
    for tokens in range(max(costs), sum(costs) + 1, 7):
        request = BudgetRequest.model_validate({"tokens": tokens, "count": count})
        found = bought(request, made, table)
        used = sum(cost(index) for index in found.indices.tolist())
        subset = next(
            subset for subset in (*made.path, made) if sum(map(cost, subset.indices.tolist())) >= tokens
        ).indices.tolist()
        assert found.indices.tolist() == subset[: len(found.indices)]
        following = subset[len(found.indices) : len(found.indices) + 1]
        assert used <= tokens
        assert used == tokens or used + cost(following[0]) > tokens
    whole = BudgetRequest.model_validate({"tokens": sum(costs), "count": count})
    assert sorted(bought(whole, made, table).indices) == sorted(made.indices)
    with pytest.raises(SelectionError, match=rf"the budget is {sum(costs) + 1:,} .*tokens, but .* only {sum(costs):,}"):
        bought(whole.model_copy(update={"tokens": sum(costs) + 1}), made, table)


@given(st.integers(1, 24), st.integers(0, 6), st.integers(0, 12), st.integers(0, 30))
def test_bounds_of_sources_are_kept_or_refused(k: int, least: int, most: int, seed: int) -> None:
    made, table = selection(seed=seed), pool(seed=seed)
    request = BudgetRequest(k=k, min_per_source={"chats": least}, max_per_source={"faq.jsonl": most})
    held = sources(made, table)
    possible = least <= min(k, held.count("chats")) and k <= len(held) - max(
        0, held.count(SOURCES[0]) - most
    )  # what the whole selection could do
    if not possible:
        with pytest.raises(SelectionError, match=r"ask for less, or select more rows first|raise"):
            bought(request, made, table)
        return
    found = bought(request, made, table)
    assert len(set(found.indices.tolist())) == k
    assert sources(found, table).count("chats") >= least
    assert sources(found, table).count(SOURCES[0]) <= most
    subset = next(s for s in (*made.path, made) if set(found.indices.tolist()) <= set(s.indices.tolist()))
    ranks = [subset.indices.tolist().index(index) for index in found.indices.tolist()]
    assert ranks == sorted(ranks)


def test_bounds_alone_keep_the_rest_of_the_selection() -> None:
    made, table = selection(), pool()
    held = sources(made, table)
    found = bought(BudgetRequest(max_per_source={"*": 4, "chats": 0}), made, table)
    assert sorted(set(sources(found, table))) == sorted(set(held) - {"chats"})
    assert all(sources(found, table).count(name) == min(4, held.count(name)) for name in set(held) - {"chats"})
    share = bought(BudgetRequest(k=10, max_per_source={"*": 0.4}), made, table)
    assert max(sources(share, table).count(name) for name in SOURCES) == 4
    share = bought(BudgetRequest(k=10, min_per_source={"notes.jsonl": 0.3}), made, table)
    assert sources(share, table).count(SOURCES[2]) >= 3


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"k": 25}, "the budget is 25 rows, but the selection holds only 24; ask for less, or select more rows first"),
        ({"tokens": 1}, "buys no row of the selection: its best row alone has 5 supervised tokens; raise it"),
        (
            {"k": 9, "min_per_source": {"chats": 20}},
            "source 'chats' is to have 20 rows or more, but the selection hold",
        ),
        ({"k": 2, "min_per_source": {"*": 1}}, "the least rows of the sources take 3 rows: raise the budget of 2"),
        ({"max_per_source": {"*": 0}}, "the sources' maxima leave none of it; raise them"),
        ({"k": 20, "max_per_source": {"*": 4}}, "the budget is 20 rows, but the selection holds only 12 within the so"),
        (
            {"k": 9, "max_per_source": {"chat": 1}},
            "source 'chat': no source of the pool has that name; did you mean 'cha",
        ),
        ({"k": 9, "min_per_source": {"*": 2}, "max_per_source": {"*": 1}}, "at least 2 rows and at most 1"),
    ],
)
def test_what_cannot_be_met_is_told(request_: dict[str, object], words: str) -> None:
    made, table = selection(), pool()
    with pytest.raises(SelectionError) as raised:
        bought(BudgetRequest.model_validate(request_), made, table)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"k": 3, "tokens": 5}, "k and tokens are given together"),
        ({"k": 0}, "greater than or equal to 1"),
        ({"fraction": 1.5}, "less than or equal to 1"),
        ({"tokens": 50, "max_per_source": {"a": 0.5}}, "a share for a source is one of a number of rows"),
        ({"max_per_source": {"a": -1}}, "a count of rows is not negative"),
        ({"count": "words"}, "supervised"),
    ],
)
def test_requests_without_a_meaning_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BudgetRequest.model_validate(values)


def test_files_of_one_name_need_their_folders() -> None:
    rows = [row(0, "/a/x.jsonl", 5, 2), row(1, "/b/x.jsonl", 5, 2)]
    table = Table([replace(made, file=made.source) for made in rows])
    made = Selection.ranked([1, 0])
    with pytest.raises(SelectionError, match="2 sources have that name"):
        bought(BudgetRequest(max_per_source={"x.jsonl": 0}), made, table)
    for name in ("/b/x.jsonl", "b/x.jsonl"):
        request = BudgetRequest(max_per_source={name: 0})
        assert bought(request, made, table).indices.tolist() == [0]
        assert str(resolve(request, table, {})) == "the whole selection; at most 0 rows of b/x.jsonl"
