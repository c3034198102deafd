"""Every strategy against a computation by hand on a few rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from gradpursuit.errors import ConfigError, SelectionError
from gradpursuit.selection import Selection, SelectionProblem, Settings, strategy
from gradpursuit.selection.bids import serve_worst, standardized
from gradpursuit.selection.clusters import interleaved, proportional_shares
from gradpursuit.selection.dsir import log_importance, tokens
from gradpursuit.selection.rds import round_robin
from gradpursuit.selection.tarot import nearest_rings, whitened_cosines
from problems import problem, row, trajectory


def chosen(name: str, given: SelectionProblem, k: int, seed: int = 0, **options: Any) -> Selection:
    return strategy(name, {name: options}).select(given, k, seed)


def ids(name: str, given: SelectionProblem, k: int, seed: int = 0, **options: Any) -> list[int]:
    return chosen(name, given, k, seed, **options).indices.tolist()


# Two checkpoints with learning rates 3 and 1, two target groups of two rows and one row.
POOL = trajectory([[1, 0], [0, 2], [3, 3], [-1, 0]], [[0, 1], [4, 0], [1, 1], [0, -2]])
TARGET = trajectory([[2, 0], [0, 1], [0, 5]], [[1, 0], [1, 0], [0, 1]])
TWO_GROUPS: dict[str, Any] = {"groups": [0, 0, 1], "rates": [3, 1]}


def influences() -> SelectionProblem:
    labels = ("adam-symmetric", "adam-uncorrected", "identity")
    return problem(dict.fromkeys(labels, POOL), dict.fromkeys(("adam-symmetric", "identity"), TARGET), **TWO_GROUPS)


def test_less() -> None:
    r = 2**-0.5
    # Unit pool rows times the mean of unit target rows: (.5, .5) and (0, 1), then (1, 0) and (0, 1); shares 3/4, 1/4.
    first = np.array([[0.5, 0], [0.5, 1], [r, r], [-0.5, 0]])
    second = np.array([[0, 1], [1, 0], [r, r], [0, -1]])
    scores = (0.75 * first + 0.25 * second).max(axis=1)
    found = chosen("less", influences(), 3)
    assert found.indices.tolist() == np.argsort(-scores)[:3].tolist() == [1, 2, 0]
    np.testing.assert_allclose(found.evidence["scores"], np.sort(scores)[::-1][:3], rtol=1e-6)
    means = chosen("less", influences(), 4, reducer="mean").evidence["scores"]
    np.testing.assert_allclose(means, np.sort((0.75 * first + 0.25 * second).mean(axis=1))[::-1], rtol=1e-6)


def test_tracin() -> None:
    # Means of groups: (1, .5) and (0, 5), mean (.5, 2.75); then (1, 0) and (0, 1), mean (.5, .5).
    scores = 3 * np.array([0.5, 5.5, 9.75, -0.5]) + np.array([0.5, 2, 1, -1])
    found = chosen("tracin", influences(), 4)
    assert found.indices.tolist() == [2, 1, 0, 3]
    np.testing.assert_allclose(found.evidence["scores"], np.sort(scores)[::-1], rtol=1e-6)


def test_topk_is_the_cosine_of_the_pursuits_columns() -> None:
    g = np.array([[0.5, 2.75], [0.5, 0.5]])
    s = np.sqrt([3, 1]) / np.linalg.norm(g, axis=1)
    U = np.stack([POOL.at(0), POOL.at(1)])
    U = U / np.linalg.norm(U, axis=2, keepdims=True)
    A = np.concatenate([s[t] * U[t].T for t in (0, 1)])
    b = np.concatenate([s[t] * g[t] for t in (0, 1)])
    cosines = A.T @ b / np.linalg.norm(A, axis=0) / np.linalg.norm(b)
    found = chosen("topk", influences(), 4)
    np.testing.assert_allclose(found.evidence["scores"], np.sort(cosines)[::-1], rtol=1e-5)
    assert found.indices.tolist() == np.argsort(-cosines).tolist()
    # Without unit rows and balance the columns differ in length, and the cosine takes that out again.
    raw = np.concatenate([np.sqrt([3, 1])[t] * np.stack([POOL.at(0), POOL.at(1)])[t].T for t in (0, 1)])
    goal = np.concatenate([np.sqrt([3, 1])[t] * g[t] for t in (0, 1)])
    cosines = raw.T @ goal / np.linalg.norm(raw, axis=0) / np.linalg.norm(goal)
    found = chosen("topk", influences(), 4, normalize="none", balance=False)
    np.testing.assert_allclose(found.evidence["scores"], np.sort(cosines)[::-1], rtol=1e-5)
    groups = [[1, 0.5], [0, 5]], [[1, 0], [0, 1]]
    goals = np.concatenate([np.sqrt([3, 1])[t] * np.array(groups[t]).T for t in (0, 1)])
    both = raw.T @ goals / np.linalg.norm(raw, axis=0)[:, None] / np.linalg.norm(goals, axis=0)
    found = chosen("topk", influences(), 4, normalize="none", balance=False, reducer="max")
    np.testing.assert_allclose(found.evidence["scores"], np.sort(both.max(axis=1))[::-1], rtol=1e-5)


def test_gtp_with_a_large_ridge_is_topk() -> None:
    rng = np.random.default_rng(0)
    features = trajectory(rng.standard_normal((30, 12)), rng.standard_normal((30, 12)))
    goal = trajectory(rng.standard_normal((4, 12)), rng.standard_normal((4, 12)))
    given = problem({"adam-symmetric": features}, {"adam-symmetric": goal}, rates=[2, 1])
    assert set(ids("gtp", given, 5, alpha=1e6)) == set(ids("topk", given, 5))
    assert set(ids("gtp", given, 5, alpha=0.0)) != set(ids("topk", given, 5))


def orthogonal(**pursuit: Any) -> SelectionProblem:
    """Six orthogonal directions; one target group wants the first two (more of the second), the other the last two."""
    target = trajectory([[1, 2, 0, 0, 0, 0], [0, 0, 0, 0, 2, 1]])
    return problem(
        {"adam-symmetric": trajectory(np.eye(6))}, {"adam-symmetric": target}, groups=[0, 1], pursuit=pursuit
    )


def test_gradmatch_matches_every_group_on_its_own() -> None:
    found = chosen("gradmatch", orthogonal(balance=False), 4)
    assert found.indices.tolist() == [1, 4, 0, 5], "the first choice of both groups, then the second"
    # Of orthogonal unit columns the weights are Aᵀb / (1 + λ).
    np.testing.assert_allclose(found.weights, np.array([2, 2, 1, 1]) / 1.5, rtol=1e-6)
    assert len(found.evidence["group_residuals"]) == 2
    assert ids("gradmatch", orthogonal(), 2) == [1, 4]
    with pytest.raises(SelectionError, match="cannot be shared by 2 target groups"):
        chosen("gradmatch", orthogonal(), 1)
    single = problem({"adam-symmetric": trajectory(np.eye(3))}, {"adam-symmetric": trajectory([[3, 1, 0]])})
    found = chosen("gradmatch", single, 3)
    assert (found.indices.tolist(), found.evidence["stop_reason"]) == ([0, 1], ["no positive correlation"])


def test_omp_takes_the_largest_correlations_of_orthogonal_columns() -> None:
    given = problem({"adam-symmetric": trajectory(np.eye(4))}, {"adam-symmetric": trajectory([[1, 4, 0, 2]])})
    found = chosen("omp", given, 3, alpha=0.0)
    assert found.indices.tolist() == [1, 3, 0]
    np.testing.assert_allclose(found.weights, np.array([4, 2, 1]) * 3 / 7, rtol=1e-6)


@pytest.mark.parametrize("targets", ["mean", "balanced", "split"])
def test_gtp_with_several_targets(targets: str) -> None:
    found = chosen("gtp", orthogonal(), 4, targets=targets, alpha=0.0)
    assert set(found.indices.tolist()) == {0, 1, 4, 5}
    if targets != "mean":
        np.testing.assert_allclose(found.evidence["group_residuals"], 0, atol=1e-5)


def test_bids() -> None:
    influence = np.array([[3.0, 0, 5], [1, 0, 5], [1, 4, 5], [3, 0, 5]])
    scaled = standardized(influence)
    np.testing.assert_allclose(scaled[:, 0], [1, -1, -1, 1])
    np.testing.assert_allclose(scaled[:, 1], np.array([-1, -1, 3, -1]) / 3**0.5)
    np.testing.assert_allclose(scaled[:, 2], 0)
    # First the row with 3/√3 in column 1; then column 0, of which it has -1, is served worst; then 0 and 3 are alike.
    assert serve_worst(scaled, 4).tolist() == [2, 0, 3, 1]
    both = problem({"identity": trajectory([[9, 1], [1, 1], [0, 1]])}, {"identity": trajectory([[1, 0], [0, 1]])})
    options = {"preconditioner": "identity", "similarity": "dot"}
    # Columns [9, 1, 0] and [1, 1, 1]: the second is constant.
    assert ids("bids", both, 2, **options) == [0, 1]


def test_rds_lets_target_rows_take_turns() -> None:
    scores = np.array([[0.9, 0.8], [0.7, 0.9], [0.8, 0.1], [0.1, 0.2]])
    # Column 0 takes 0, column 1 takes 1, column 0 takes 2, column 1 prefers 0 and 1, which are taken.
    assert round_robin(scores, 4).tolist() == [0, 1, 2, 3]
    pool = {"embedding": trajectory([[5, 0], [3, 4], [0, 0.1]])}
    given = problem(pool, {"embedding": trajectory([[0, 2], [1, 0]])}, rates=[3, 1])
    found = chosen("rds", given, 2)
    assert found.indices.tolist() == [2, 0]
    np.testing.assert_allclose(found.evidence["scores"], [1, 1])


def test_tarot_whitens_by_pool_and_target() -> None:
    rng = np.random.default_rng(0)
    pool, target = rng.standard_normal((2, 50, 4)) * [9, 3, 1, 0.1], rng.standard_normal((2, 5, 4))
    both = np.concatenate([pool.mean(axis=0), target.mean(axis=0)])
    both = both - both.mean(axis=0)
    covariance = both.T @ both / len(both)
    white = both @ np.linalg.inv(np.linalg.cholesky(covariance + 1e-3 * np.trace(covariance) / 4 * np.eye(4))).T
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    found = whitened_cosines(trajectory(*pool), trajectory(*target), 1e-3)
    np.testing.assert_allclose(found, white[:50] @ white[50:].T, rtol=1e-4, atol=1e-5)
    given = problem({"identity": trajectory(*pool)}, {"identity": trajectory(*target)}, rates=[1, 1])
    assert ids("tarot", given, 7, ridge=1e-3) == nearest_rings(found, 7)[0].tolist()


def test_tarot_takes_ring_after_ring() -> None:
    similar = np.array([[0.9, 0.2], [0.5, 0.6], [0.4, 0.5], [0.1, 0.1]])
    chosen_rows, rings = nearest_rings(similar, 2)
    assert (chosen_rows.tolist(), rings) == ([0, 1], 1), "the nearest of each"
    chosen_rows, rings = nearest_rings(similar, 3)
    assert (chosen_rows.tolist(), rings) == ([0, 1, 2], 2), "1 is taken, 2 is the second of column 1"
    assert sorted(nearest_rings(similar, 4)[0].tolist()) == [0, 1, 2, 3]
    with pytest.raises(SelectionError, match="all features of pool and target are the same"):
        whitened_cosines(trajectory([[1, 2], [1, 2]]), trajectory([[1, 2]]), 0.1)


def test_dsir_with_smoothing() -> None:
    pool, target = ["red red", "blue", "Red, blue"], ["red", "red red"]
    buckets = 1_000_003  # without collisions of these few
    grams = [
        Counter({"red": 2, "red red": 1}),
        Counter({"blue": 1}),
        Counter({"red": 1, ",": 1, "blue": 1, "red ,": 1, ", blue": 1}),
    ]
    p = Counter({"red": 3, "red red": 1})
    q = sum(grams, Counter())

    def expected(smoothing: float) -> list[float]:
        total_p, total_q = sum(p.values()) + smoothing * buckets, sum(q.values()) + smoothing * buckets

        def weight(gram: str) -> float:
            return float(np.log((p[gram] + smoothing) / total_p) - np.log((q[gram] + smoothing) / total_q))

        return [sum(count * weight(gram) for gram, count in row.items()) for row in grams]

    for smoothing in (1, 0.1):
        found = log_importance(pool, target, buckets=buckets, smoothing=smoothing)
        np.testing.assert_allclose(found, expected(smoothing), rtol=1e-9)
        assert found[0] > found[2], "the words of the target"
    # The authors' own: probabilities of 4 and 9 counts, 1e-8 beside each.
    one = np.log(3 / 4 + 1e-8) - np.log(3 / 9 + 1e-8)
    two = np.log(1 / 4 + 1e-8) - np.log(1 / 9 + 1e-8)
    unseen = np.log(1e-8) - np.log(1 / 9 + 1e-8)
    blue = np.log(1e-8) - np.log(2 / 9 + 1e-8)
    found = log_importance(pool, target, buckets=buckets, smoothing="paper")
    np.testing.assert_allclose(found, [2 * one + two, blue, one + blue + 3 * unseen], rtol=1e-9)


def test_dsir_prior_by_hand() -> None:
    # Single words of target "a a b" and pool "a b c c", prior 4: p = 3/7, 2/7, 2/7 and q = 1/4, 1/4, 1/2.
    pool, target = ["a", "b", "c", "c"], ["a", "a", "b"]
    found = log_importance(pool, target, prior=4, buckets=1_000_003)
    np.testing.assert_allclose(found, np.log([12 / 7, 8 / 7, 4 / 7, 4 / 7]), rtol=1e-9)
    np.testing.assert_allclose(found[[0, 2]], [0.539, -0.560], atol=5e-4)
    np.testing.assert_allclose(log_importance(pool * 3, target, prior=4, buckets=1_000_003), np.tile(found, 3))
    # Pairs too: 5 counts of the target (a 2, b, "a a", "a b"), 7 of the pool (a, b, c 2, "a b", "b c", "c c").
    given = ["a b c c"], ["a a b"]
    q = np.array([1, 1, 2, 1, 1, 1]) / 7
    p = (np.array([2, 1, 0, 1, 0, 0]) + 4 * q) / 9
    weight = float(np.array([1, 1, 2, 1, 1, 1]) @ np.log(p / q))
    np.testing.assert_allclose(log_importance(*given, prior=4, buckets=1_000_003), [weight], rtol=1e-9)
    assert log_importance(["d"], ["d", "e"], prior=4, buckets=1_000_003)[0] == pytest.approx(np.log(5 / 6))


def corpus(rng: np.random.Generator, rows: int, first: int, vocabulary: int = 300) -> list[str]:
    """Texts of 20 words; word `first` + i has a chance in proportion to 1 / (i + 1)."""
    chances = 1 / np.arange(1, vocabulary + 1)
    drawn = first + rng.choice(vocabulary, (rows, 20), p=chances / chances.sum())
    return [" ".join(f"w{word}" for word in text) for text in drawn.tolist()]


@pytest.mark.parametrize("target_rows", [8, 16, 32])
def test_dsir_finds_the_task_of_a_small_target_in_a_pool_of_thousands(target_rows: int) -> None:
    rng = np.random.default_rng(0)
    on, off = corpus(rng, 1000, 0), corpus(rng, 1000, 200)  # the rarer words of one are the common ones of the other
    junk = [" ".join(f"x{word}" for word in rng.integers(0, 10**9, 20).tolist()) for _ in range(200)]
    texts = [*on, *off, *junk, *corpus(rng, target_rows, 0)]
    rows = [row(i) for i in range(len(texts))]
    given = problem(
        {}, rows=rows[:2200], target_rows=rows[2200:], text=lambda found: texts[int(found.id.removeprefix("row-"))]
    )
    found = np.array(ids("dsir", given, 200))
    assert (found < 1000).mean() >= 0.97
    assert not (found >= 2000).any(), "rows of words that occur nowhere else"
    assert (np.array(ids("dsir", given, 200, smoothing="paper")) < 1000).mean() > 0.85
    best = chosen("dsir", given, 200, noise=False)
    assert best.evidence["log_weights"] == sorted(best.evidence["log_weights"], reverse=True)
    assert best.indices.tolist() == ids("dsir", given, 200, 5, noise=False), "no chance in it"
    assert not strategy("dsir", {"dsir": {"noise": False}}).stochastic
    assert strategy("dsir").stochastic


def test_dsir_draws_in_proportion_to_the_weights() -> None:
    texts = {f"row-{i}": "a" if i < 2 else "b" for i in range(4)}
    rows, target = [row(i) for i in range(4)], [row(0)]
    given = problem({}, rows=rows, target_rows=target, text=lambda found: texts[found.id])
    weights = np.exp(log_importance([texts[r.id] for r in rows], ["a"], prior=4))
    first = Counter(ids("dsir", given, 1, seed, prior=4)[0] for seed in range(3000))
    share = weights / weights.sum()
    for i in range(4):
        assert first[i] / 3000 == pytest.approx(share[i], abs=4 * (share[i] / 3000) ** 0.5)
    assert ids("dsir", given, 4, 7) == ids("dsir", given, 4, 7)
    with pytest.raises(SelectionError, match="text of the rows is not at hand"):
        chosen("dsir", problem({}, rows=rows, target_rows=target), 1)
    silent = problem({}, rows=rows, target_rows=target, text=lambda found: " ")
    with pytest.raises(SelectionError, match="the target has no words"):
        chosen("dsir", silent, 1)


def test_dsir_serves_every_target_group() -> None:
    texts = ["red red red", "red red", "blue blue", "blue", "green", "red red red", "blue"]
    rows = [row(i) for i in range(7)]

    def grouped(groups: list[int]) -> SelectionProblem:
        text = {row.id: text for row, text in zip(rows, texts, strict=True)}
        return problem({}, groups=groups, rows=rows[:5], target_rows=rows[5:], text=lambda found: text[found.id])

    given = grouped([0, 1])
    # 5 counts in group 0 and 1 in group 1: of three rows 2.5 and 0.5, the tie to the first.
    found = chosen("dsir", given, 3, per_group=True, noise=False, prior=1)
    assert (found.indices.tolist(), found.evidence["group"]) == ([0, 1, 3], [0, 0, 0])
    given = grouped([1, 0])
    found = chosen("dsir", given, 4, per_group=True, noise=False, prior=1)
    # Group 0 is blue now: 4 · 1/6 = 0.67 and 3.33 rows.
    assert found.evidence["group"] == [1, 0, 1, 1]
    assert found.indices[found.evidence["group"].index(0)] == 2
    assert found.indices[0] == 0
    assert len(set(found.indices.tolist())) == 4


def test_dsir_has_one_way_to_fit() -> None:
    assert strategy("dsir").method.model_dump()["prior"] == 1000
    assert strategy("dsir", {"dsir": {"smoothing": 0.1}}).method.model_dump()["prior"] is None
    for wrong, message in {
        ("prior", "smoothing"): "give either smoothing or prior",
        ("smoothing",): "smoothing: must be above 0",
        ("neither",): "give either smoothing or prior",
    }.items():
        options = {"prior": 5.0, "smoothing": 1.0} if len(wrong) == 2 else {"smoothing": -1}
        options = {"prior": None} if wrong == ("neither",) else options
        with pytest.raises(ConfigError, match=message):
            strategy("dsir", {"dsir": options})


def test_tokens_of_dsir_in_every_script() -> None:
    assert tokens("What's 3+4? WELL...") == ["what", "'", "s", "3", "+", "4", "?", "well", "..."]
    assert tokens("你好，世界") == ["你", "好", ",", "世", "界"], "as everywhere, width is folded"
    assert tokens("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"], "marks belong to their word"
    assert tokens(" ") == []


def test_el2n_and_grand() -> None:
    errors = trajectory([[9], [0], [0], [0], [0]], [[1], [2], [3], [4], [5]], [[1], [2], [3], [8], [5]])
    given = problem({"el2n": errors}, rates=[1, 1])
    assert ids("el2n", given, 2) == [3, 4], "the base model does not count"
    assert ids("el2n", given, 2, at="mean") == [3, 4]
    assert ids("el2n", given, 2, at="first") == [4, 3]
    assert ids("el2n", given, 2, at="base") == [0, 1]
    assert ids("el2n", given, 2, keep="easiest") == [0, 1]
    assert ids("el2n", given, 3, keep="band") == [2, 1, 4], "around the median, 3; equally far ones from below"
    assert ids("el2n", given, 1, keep="band", band=1.0) == [3]
    assert chosen("el2n", given, 1).evidence["scores"] == [8], "of the last checkpoint"
    assert chosen("el2n", given, 1, at="mean").evidence["scores"] == [6]
    norms = trajectory(np.eye(3), np.eye(3), norm=[[1, 5, 3], [9, 1, 3]])
    assert ids("grand", problem({"identity": norms}, rates=[1, 1]), 2) == [0, 2]
    assert ids("grand", problem({"identity": norms}, rates=[1, 1]), 2, at="mean") == [0, 1]
    assert ids("grand", problem({"identity": norms}, rates=[1, 1]), 2, at="first") == [1, 2]


def test_the_highest_scores_are_trimmed() -> None:
    scores = [[1.0], [1], [1], [1], [1], [10]]  # mean 2.5, standard deviation of the sample 3.67: cut at 9.85
    given = problem({"el2n": trajectory(scores, scores)})
    found = chosen("el2n", given, 6, trim="2sd")
    assert (found.indices.tolist(), found.evidence["trimmed"]) == ([0, 1, 2, 3, 4], 1)
    assert ids("el2n", given, 1, trim=None) == ids("el2n", given, 1, trim=0) == [5]
    assert ids("el2n", given, 1, trim=0.17) == [0], "one of six, rounded down"
    assert ids("el2n", given, 1, trim=0.16) == [5]
    ranks = [[float(i)] for i in range(100)]
    given = problem({"el2n": trajectory(ranks, ranks), "identity": trajectory(ranks, norm=[np.arange(100.0)])})
    for name in ("el2n", "grand"):
        assert ids(name, given, 2) == [94, 93], "five of a hundred are left out unless it is said otherwise"
        assert ids(name, given, 2, trim=0.29) == [70, 69]
        assert ids(name, given, 2, keep="band", band=1.0, trim=0.5) == [49, 48]
        with pytest.raises(ConfigError, match="a share of the rows from 0 to below 1"):
            ids(name, given, 2, trim=1.0)
    assert "trimmed" not in chosen("el2n", given, 2, trim=None).evidence


def test_learning_percentage() -> None:
    perplexity = np.array([[8.0, 8, 8, 8, 1], [7, 4, 2, 8, 1], [2, 4, 2, 9, 0.5]])
    losses = trajectory(*np.ones((3, 5, 1)), loss=np.log(perplexity))
    given = problem({"el2n": losses}, rates=[1, 1])
    # (8-7)/(8-2), 4/4, 6/6, never learnt, 0/0.5
    found = chosen("learning-percentage", given, 5)
    assert found.indices.tolist() == [3, 4, 0, 1, 2]
    np.testing.assert_allclose(found.evidence["learning_percentage"], [-1, 0, 1 / 6, 1, 1], atol=1e-6)
    found = chosen("learning-percentage", given, 5, of="start")
    np.testing.assert_allclose(found.evidence["learning_percentage"], [0, 0, 1 / 8, 1 / 2, 3 / 4], atol=1e-6)
    assert ids("learning-percentage", given, 2, keep="easiest") == [1, 2]


def test_learning_percentage_inside_clusters() -> None:
    percentages = np.array([0.1, 0.2, 0.9, 0.8])
    perplexity = np.array([np.full(4, 11.0), 11 - 10 * percentages, np.ones(4)])
    losses = trajectory(*np.ones((3, 4, 1)), loss=np.log(perplexity))
    corners = trajectory([[1, 0], [1, 0.01], [0, 1], [0.01, 1]])
    given = problem({"el2n": losses, "embedding": corners}, rates=[1, 1])
    assert ids("learning-percentage", given, 2) == [0, 1]
    found = chosen("learning-percentage", given, 2, clusters=2)
    assert sorted(found.indices.tolist()) == [0, 3]
    assert len(set(found.evidence["cluster"])) == 2
    assert sorted(ids("learning-percentage", given, 2, clusters=2, keep="easiest")) == [1, 2]
    assert sorted(ids("learning-percentage", given, 2, clusters=2, keep="band", band=1.0)) == [0, 3]
    assert sorted(ids("learning-percentage", given, 4, clusters=9)) == [0, 1, 2, 3], "no more clusters than rows"
    assert ids("learning-percentage", given, 2, clusters=1) == [0, 1]
    assert sorted(ids("learning-percentage", given, 3, clusters=2, trim=0.25)) == [1, 2, 3]
    needs = strategy("learning-percentage", {"learning-percentage": {"clusters": 2}}).needs(Settings())
    assert str(needs) == "el2n, embedding"
    assert str(strategy("learning-percentage").needs(Settings())) == "el2n"


def test_groups_are_interleaved_by_their_shares() -> None:
    rows, groups = interleaved([[10, 11, 12, 13], [20, 21], []])
    assert rows.tolist() == [10, 20, 11, 12, 21, 13]
    assert groups.tolist() == [0, 1, 0, 0, 1, 0]


def test_kmeans_quality_serves_every_cluster_by_its_size() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat([[10, 0, 0], [0, 10, 0], [0, 0, 10]], [60, 30, 10], axis=0)
    embeddings = centres + 0.1 * rng.standard_normal((100, 3))
    loss = np.tile([0.0, np.log(4)], 50)  # every second row is four times as likely
    given = problem({"embedding": trajectory(embeddings, loss=[loss])})
    drawn = [chosen("kmeans-quality", given, 10, seed, clusters=3) for seed in range(200)]
    assert all(np.bincount(np.argmax(centres[d.indices], axis=1)).tolist() == [6, 3, 1] for d in drawn)
    likely = np.mean([(d.indices % 2 == 0).mean() for d in drawn])
    assert 0.74 < likely < 0.86
    drawn = [chosen("kmeans-quality", given, 10, seed, clusters=3, quality="none") for seed in range(200)]
    assert 0.44 < np.mean([(d.indices % 2 == 0).mean() for d in drawn]) < 0.56
    assert sorted(ids("kmeans-quality", given, 100)) == list(range(100))
    assert proportional_shares(np.array([5, 3, 2]), 4).tolist() == [2, 1, 1]
    assert proportional_shares(np.array([5, 0, 2]), 7).tolist() == [5, 0, 2]


def test_random_matched_has_the_profile_of_the_other() -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(i, source=f"file-{i % 2}", prompt=int(rng.integers(3, 60)), answer=int(rng.integers(1, 30)), family=i % 5)
        for i in range(200)
    ]
    errors = trajectory(rng.random((200, 1)), rng.random((200, 1)))
    given = problem({"el2n": errors}, rows=rows)
    like = ids("el2n", given, 40)
    lengths = np.array([[len(r.input_ids), sum(label >= 0 for label in r.labels)] for r in rows])
    bounds = np.quantile(lengths, [0.25, 0.5, 0.75], axis=0)

    def profile(found: list[int], column: str | None = None) -> Counter[Any]:
        bins = [[int(np.searchsorted(bounds[:, j], lengths[i, j], side="right")) for j in (0, 1)] for i in found]
        names = [rows[i].columns[column] if column else rows[i].source for i in found]
        return Counter((name, *where) for name, where in zip(names, bins, strict=True))

    first, second = (ids("random-matched", given, 40, seed, like="el2n") for seed in (0, 1))
    assert profile(first) == profile(second) == profile(like)
    assert set(first) != set(second)
    assert set(first) != set(like)
    assert first == ids("random-matched", given, 40, 0, like="el2n")
    found = ids("random-matched", given, 40, 0, like="el2n", column="family")
    assert profile(found, "family") == profile(like, "family")
    with pytest.raises(ConfigError, match=r"file-0:1 has no column 'kind'"):
        ids("random-matched", given, 40, 0, like="el2n", column="kind")
    with pytest.raises(ConfigError, match="like = 'random', whose choice is random itself"):
        ids("random-matched", given, 40, 0, like="random")
