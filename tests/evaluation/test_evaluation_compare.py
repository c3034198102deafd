from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradpursuit.config import EvaluationSection, ModelSection
from gradpursuit.data import Table
from gradpursuit.evaluation import compare
from gradpursuit.evaluation.compare import BASE, FULL, Arm, Cell, Comparison, Setting
from gradpursuit.evaluation.findings import ALL, Findings
from gradpursuit.evaluation.scoring import Scorer
from gradpursuit.evaluation.table import from_json, markdown, to_json, write_tables
from gradpursuit.selection import Selection
from gradpursuit.trajectory.tuning import tuned
from questions import FLOAT32, rows

USEFUL, OTHER = Selection.ranked(range(8)), Selection.ranked(range(8, 16))


@pytest.fixture
def setting(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tables: tuple[Table, Table]) -> Any:
    """Makes what a comparison needs, with other settings of the evaluation."""

    def make(**settings: object) -> Setting:
        defaults = {"seeds": 2, "steps": 8, "batch_size": 4, "learning_rate": 3e-2}
        return Setting(
            tuned=partial(tuned, base, ModelSection(path="unused")),
            compute=FLOAT32,
            scorer=Scorer(FLOAT32, tokenizer),
            pool=tables[0],
            heldout={"fruit": tables[1], "animal": rows(tokenizer, "zebra", 11).take(range(8, 11))},
            config=EvaluationSection(**{**defaults, **settings}),
            seed=0,
            origin={"model": "tiny"},
        )

    return make


def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and steps of every training from now on."""
    done: list[tuple[int, int]] = []
    own = compare.train

    def counted(model: Any, chosen: Any, spec: Any, *args: Any, **more: Any) -> Any:
        done.append((len(chosen), spec.steps))
        return own(model, chosen, spec, *args, **more)

    monkeypatch.setattr(compare, "train", counted)
    return done


def by_name(cells: list[Cell]) -> dict[tuple[str, int], Cell]:
    return {(cell.arm.strategy, cell.seed): cell for cell in cells}


def test_useful_rows_help_and_every_run_starts_from_the_same_base(
    base: PreTrainedModel, setting: Any, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    arms = [Arm(BASE, "fruit", 0, []), Arm("useful", "fruit", 8, [USEFUL]), Arm("other", "fruit", 8, [OTHER])]
    found = by_name(Comparison(setting()).run(arms, tmp_path / "a"))
    assert set(found) == {(BASE, 0), ("useful", 0), ("useful", 1), ("other", 0), ("other", 1)}
    for seed in (0, 1):
        assert found["useful", seed].loss < found["other", seed].loss - 0.1
        assert found["useful", seed].loss < found[BASE, 0].loss - 0.1
        assert found["useful", seed].result.steps == 8
    assert found["useful", 0].loss != found["useful", 1].loss
    after = base.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    again = by_name(Comparison(setting(seeds=1)).run(arms[::-1], tmp_path / "b"))
    assert len(again) == 3
    for key, cell in again.items():
        assert cell.loss == pytest.approx(found[key].loss, rel=1e-5)


def test_protocols_say_how_long_is_trained(setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows in all, batches of 4: 4 steps are one pass over the pool."""
    done = trainings(monkeypatch)
    few, some, full = (Selection.ranked(range(count)) for count in (3, 4, 16))
    arms = [Arm("a", "fruit", 4, [few]), Arm("a", "fruit", 8, [some]), Arm(FULL, "fruit", 0, [full])]
    comparison = Comparison(setting(seeds=1, steps=None, epochs=2, protocols=["equal-steps", "equal-epochs"]))
    cells = comparison.run(arms, tmp_path)
    steps = [(cell.arm.strategy, cell.arm.budget, cell.protocol, cell.result.steps) for cell in cells]
    assert steps == [
        ("a", 4, "equal-steps", 4),
        ("a", 8, "equal-steps", 4),
        ("a", 4, "equal-epochs", 2),  # by the budget, though only 3 rows were chosen
        ("a", 8, "equal-epochs", 4),
        (FULL, 0, "equal-steps", 4),
        (FULL, 0, "equal-epochs", 8),
    ]
    assert done == [(3, 4), (4, 4), (3, 2), (16, 4), (16, 8)], "4 rows for 4 steps are one training, whatever asks"
    done.clear()
    assert Comparison(setting(seeds=1, steps=5)).run(arms[:2], tmp_path)[0].result.steps == 5
    assert done == [(3, 5), (4, 5)]


def test_what_is_known_is_not_trained_again(setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = trainings(monkeypatch)
    weighted = Selection(np.arange(8), np.array([7.3] + [0.1] * 7), np.ones(8, dtype=np.int64))
    arms = [Arm(BASE, "fruit", 0, []), Arm("a", "fruit", 8, [weighted]), Arm("b", "fruit", 8, [OTHER])]

    def run(**settings: object) -> dict[tuple[str, int], Cell]:
        done.clear()
        return by_name(Comparison(setting(**{"steps": 2, "seeds": 1, **settings})).run(arms, tmp_path))

    first = run()
    assert len(done) == 2
    assert run() == first
    assert not done
    two = run(seeds=2)
    assert len(done) == 2, "the second seed alone"
    assert two["a", 0] == first["a", 0]
    heavy = run(use_weights=True)
    assert len(done) == 2
    assert heavy["a", 0].loss != pytest.approx(first["a", 0].loss, abs=1e-5)
    assert heavy[BASE, 0] == first[BASE, 0]
    run(learning_rate=1e-2)
    assert len(done) == 2
    assert run() == first
    assert not done, "going back costs nothing"
    arms[1] = Arm("a", "fruit", 8, [Selection.ranked([0, 1])])
    run()
    assert done == [(2, 2)], "only the strategy that chose other rows"


def test_a_killed_comparison_goes_on_with_the_next_cell(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [Arm("a", "fruit", 8, [USEFUL]), Arm("b", "fruit", 8, [OTHER])]
    whole = Comparison(setting(steps=2)).run(arms, tmp_path / "whole")
    own, calls = compare.train, []

    def killed(*args: Any, **more: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(*args, **more)

    monkeypatch.setattr(compare, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        Comparison(setting(steps=2)).run(arms, tmp_path / "killed")
    calls.append(())
    cells = Comparison(setting(steps=2)).run(arms, tmp_path / "killed")
    assert len(calls) == 4 + 2, "the two that were missing"
    assert [cell.result.losses for cell in cells] == [cell.result.losses for cell in whole]


def test_stochastic_strategies_train_on_their_own_draw(setting: Any, tmp_path: Path) -> None:
    found = by_name(Comparison(setting()).run([Arm("random", "fruit", 8, [USEFUL, OTHER])], tmp_path))
    assert found["random", 0].loss < found["random", 1].loss - 0.1


def test_one_subset_for_two_targets_is_one_training_and_crossing_scores_all(
    setting: Any, tables: tuple[Table, Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = trainings(monkeypatch)
    arms = [
        *(Arm(BASE, name, 0, []) for name in ("fruit", "animal")),
        *(Arm("same", name, 8, [USEFUL]) for name in ("fruit", "animal")),
        *(Arm("own", name, 8, [chosen]) for name, chosen in (("fruit", USEFUL), ("animal", OTHER))),
    ]
    cells = Comparison(setting()).run(arms, tmp_path)
    assert len(done) == 4, "two subsets and two seeds"
    assert len(cells) == 2 + 8
    findings = Findings(cells, tables[0], "own")
    loss = {(line.strategy, line.target): line.after for line in findings.lines()}
    assert loss["same", "fruit"] == loss["own", "fruit"]
    assert loss["own", "animal"] < loss["same", "animal"] - 0.1

    done.clear()
    crossed = Comparison(setting(crossed=True)).run(arms[4:], tmp_path)
    assert len(done) == 4 - 2, "useful rows have been scored on both targets already"
    found = {(c.arm.target, c.scored_on): c.loss for c in crossed if c.seed == 0}
    assert found["animal", "animal"] < found["fruit", "animal"]
    assert found["fruit", "fruit"] < found["animal", "fruit"]
    findings = Findings(crossed, tables[0], "own")
    assert [(line.strategy, line.target) for line in findings.lines()] == [
        ("own", "fruit"), ("own", "animal"), ("own for others", "animal"), ("own for others", "fruit"),
    ]  # fmt: skip
    (wrong,) = (d for d in findings.differences() if d.target == ALL and d.metric == "loss")
    assert (wrong.other, wrong.effect.positive, wrong.effect.pairs) == ("own for others", 4, 4)
    means: dict[bool, list[float]] = {True: [], False: []}
    for cell in crossed:
        means[cell.arm.target == cell.scored_on].append(cell.loss)
    assert wrong.effect.mean == pytest.approx(np.mean(means[False]) - np.mean(means[True]))


def test_findings_pair_what_belongs_together(setting: Any, tables: tuple[Table, Table], tmp_path: Path) -> None:
    arms = [
        arm
        for name, useful, other in (("fruit", USEFUL, OTHER), ("animal", OTHER, USEFUL))
        for arm in (
            Arm(BASE, name, 0, []),
            Arm("gtp", name, 8, [useful]),
            Arm("random", name, 8, [other]),
            Arm("random", name, 16, [Selection.ranked(range(16))]),
        )
    ]
    cells = Comparison(setting()).run(arms, tmp_path)
    findings = Findings(cells, tables[0], "gtp")
    known = {(c.arm.strategy, c.arm.budget, c.arm.target, c.seed): np.array(c.result.losses) for c in cells}
    found = {
        (d.target, d.metric, d.other, d.other_budget): d.effect
        for d in findings.differences()
        if d.reference == "gtp" and d.reference_budget == 8
    }
    mine = [known["gtp", 8, "fruit", seed] for seed in (0, 1)]
    theirs = [known["random", 8, "fruit", seed] for seed in (0, 1)]
    assert found["fruit", "loss", "random", 8].mean == pytest.approx(np.mean(theirs) - np.mean(mine))
    assert found["fruit", "loss", "random", 8].pairs == 2 * len(tables[1])
    assert found["fruit", "loss", BASE, 0].mean == pytest.approx(known[BASE, 0, "fruit", 0].mean() - np.mean(mine))
    means = [
        np.mean(known["random", 8, t, s]) - np.mean(known["gtp", 8, t, s]) for t in ("fruit", "animal") for s in (0, 1)
    ]
    assert found[ALL, "loss", "random", 8].mean == pytest.approx(np.mean(means))
    assert (found[ALL, "loss", "random", 8].pairs, found[ALL, "loss", "random", 8].positive) == (4, 4)
    assert found[ALL, "loss", "random", 8].low > 0
    logs = [
        np.log(np.mean(known["random", 8, t, s]) / np.mean(known["gtp", 8, t, s]))
        for t in ("fruit", "animal")
        for s in (0, 1)
    ]
    assert found[ALL, "log-loss", "random", 8].mean == pytest.approx(np.mean(logs))
    assert found[ALL, "log-loss", "random", 8].pairs == 4
    assert not any(metric == "log-loss" and target != ALL for target, metric, *_ in found)
    assert (ALL, "loss", "random", 16) in found
    gains = findings.gains()
    assert gains["gtp", 8, "equal-steps"].mean > gains["random", 8, "equal-steps"].mean
    lines = findings.lines()
    assert from_json(to_json(lines)) == lines
    write_tables(tmp_path, findings)
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + len(cells)
    assert len((tmp_path / "differences.csv").read_text().splitlines()) == 1 + len(findings.differences())
    text = markdown(findings, findings.differences())
    assert f"| {ALL} | equal-steps | loss | gtp 8 | random 16 |" in text
    assert "the smallest true difference that this design would have told from zero in 80 % of all cases" in text


def test_copies_are_counted_by_strategy(setting: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    single = rows(tokenizer, "apple", 3)
    pool = Table([*single, *single])
    arms = [
        Arm("twice", "fruit", 4, [Selection.ranked([0, 3, 1, 4])]),
        Arm("once", "fruit", 3, [Selection.ranked([0, 4, 2])]),
        Arm(FULL, "fruit", 0, [Selection.ranked(range(6))]),
    ]
    made = setting(seeds=1, steps=1)
    cells = Comparison(Setting(**{**vars(made), "pool": pool})).run(arms, tmp_path)
    copies = {line.strategy: line.copies for line in Findings(cells, pool, "twice").lines()}
    assert copies == {"twice": 2, "once": 0, FULL: 3}


def test_the_plot_needs_nothing_but_matplotlib(
    setting: Any, tables: tuple[Table, Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from gradpursuit.evaluation.plot import plot_gains

    arms = [Arm(BASE, "fruit", 0, []), *(Arm("a", "fruit", k, [Selection.ranked(range(k))]) for k in (4, 8))]
    findings = Findings(Comparison(setting(steps=1)).run(arms, tmp_path), tables[0], "a")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "matplotlib.figure", None)
        assert not plot_gains(tmp_path / "gain.png", findings)
    assert "pip install 'gradpursuit[eval]'" in caplog.text
    pytest.importorskip("matplotlib")
    assert plot_gains(tmp_path / "gain.png", findings)
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_gains(tmp_path / "none.png", Findings([], tables[0], "a"))
