"""Names, options and combinations of strategies, and strategies of other distributions."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from gradpursuit.cli import main
from gradpursuit.config import RunConfig, SelectionSection, build_config
from gradpursuit.errors import ConfigError, SelectionError
from gradpursuit.gradient_stage import FEATURE_OPTIONS, feature_requests
from gradpursuit.gradients.forward import EMBEDDING
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.plugins import used_distributions
from gradpursuit.selection import STRATEGIES, Settings, check_strategies, describe_strategies, strategy
from problems import problem, trajectory

MODULE = """
    from dataclasses import dataclass

    from gradpursuit.selection import Needs, Selection


    @dataclass
    class Shortest:
        reverse: bool = False
        source = "a paper"
        stochastic = False

        def needs(self, settings):
            return Needs(target="none")

        def select(self, problem, k, seed):
            order = range(len(problem.ids))
            return Selection.ranked(list(reversed(order) if self.reverse else order)[:k])


    class Broken(Shortest):
        def needs(self, settings):
            return settings.nothing_of_the_kind

        def select(self, problem, k, seed):
            if k == 2:
                return Selection.ranked([0, 0])
            if k == 3:
                return [0, 1, 2]
            raise ValueError("no idea")


    class Lacking:
        stochastic = True


    def failing():
        raise RuntimeError("needs a licence")
"""
POINTS = """
    [gradpursuit.strategies]
    shortest = {module}:Shortest
    broken = {module}:Broken
    lacking = {module}:Lacking
    failing = {module}:failing
    absent = {module}:Nobody
    lost = {module}_that_is_gone:Nobody
"""


def install(folder: Path, name: str, points: str = POINTS, module: str = MODULE) -> None:
    """A distribution as an installer leaves it: a module, and its metadata."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(textwrap.dedent(module))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(points).format(module=name))


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution `<name>` on the path, of a name that no other test has."""
    name = f"plugin_of_{tmp_path.name}".replace("-", "_")
    install(tmp_path / "site", name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return name


def config(**selection: object) -> RunConfig:
    tree = {"model": {"path": "m"}, "data": {"pool": "p", "target": None}, "selection": selection}
    return RunConfig.model_validate(tree)


def needed(name: str, **options: object) -> tuple[object, ...]:
    settings = Settings(options={name: options})
    return settings.strategy(name).needs(settings).features


def test_every_listed_strategy_has_a_source_and_is_told_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = {entry["name"]: entry for entry in describe_strategies()}
    assert set(STRATEGIES) <= set(found)
    for name in STRATEGIES:
        assert strategy(name).name == name
        assert "arXiv" in found[name]["source"] or name in ("omp", "random", "random-matched")
    assert {name for name in STRATEGIES if found[name]["stochastic"]} == {
        "random", "random-matched", "dsir", "kmeans-quality",
    }  # fmt: skip
    assert found["less"]["options"] == {
        "features": "gradient", "preconditioner": "adam-uncorrected", "similarity": "cosine", "reducer": "max",
    }  # fmt: skip
    assert main(["strategies", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe_strategies()
    assert main(["strategies"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["dsir"].split()[:4] == ["dsir", "yes", "text", "rows"]
    assert "gradients (identity)" in lines["tarot"]


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown strategy 'les'; did you mean 'less'"):
        strategy("les")
    with pytest.raises(ConfigError, match="did you mean 'my-less'"):
        strategy("my-lesss", {"my-less": {"selector": "less"}})


def test_options_decide_which_features_are_needed() -> None:
    assert needed("gtp") == (Preconditioner("adam-symmetric"),)
    assert needed("gtp", preconditioner="identity") == (Preconditioner("identity"),)
    assert needed("less") == (Preconditioner("adam", bias_correction=False),)
    assert needed("less", features="embedding") == needed("rds") == (EMBEDDING,)
    assert needed("rds", features="gradient", preconditioner="adam") == (Preconditioner("adam"),)
    assert needed("random-matched", like="less") == needed("less")
    assert needed("mine", selector="topk", preconditioner="adam-centered") == (Preconditioner("adam-centered"),)


def test_only_the_options_that_are_said_to_change_features_change_them() -> None:
    """What :func:`feature_requests` goes by: every value of every other option of every strategy needs the same."""
    tried = 0
    for name in STRATEGIES:
        plain = strategy(name).needs(Settings())
        for option, field in type(strategy(name).method).model_fields.items():  # type: ignore[attr-defined]
            if option in FEATURE_OPTIONS:
                continue
            values = [value for part in (field.annotation, *get_args(field.annotation)) for value in get_args(part)]
            for value in [value for value in values if isinstance(value, str)] or [None, 1, 0.5, "x"]:
                with suppress(ConfigError):
                    assert strategy(name, {name: {option: value}}).needs(Settings()).features == plain.features
                    tried += 1
    assert tried > 60


def test_feature_requests_are_the_distinct_ways_of_choosing() -> None:
    options = {"a": {"selector": "gtp", "alpha": 1.0}, "b": {"selector": "gtp", "preconditioner": "adam"}}
    plain = feature_requests(config(strategies=["gtp"]).selection)
    assert plain == ['["gtp", {}]']
    assert feature_requests(config(strategies=["gtp", "a"], options=options).selection) == plain
    assert feature_requests(config(strategies=["b"], options=options).selection) != plain
    matched = feature_requests(
        config(strategies=["random-matched"], options={"gtp": {"preconditioner": "adam"}}).selection
    )
    assert matched == ['["gtp", {"preconditioner": "adam"}]', '["random-matched", {}]']


def test_a_new_combination_chooses_as_it_says() -> None:
    rng = np.random.default_rng(0)
    given = problem(
        {"identity": trajectory(rng.standard_normal((20, 5)))},
        {"identity": trajectory(rng.standard_normal((4, 5)))},
        groups=[0, 0, 1, 1],
    )
    mine = {"mine": {"selector": "less", "preconditioner": "identity", "reducer": "mean", "similarity": "dot"}}
    found = strategy("mine", mine)
    assert found.name == "mine"
    assert found.source == strategy("less").source
    expected = strategy("tracin").select(given, 6, 0)
    assert found.select(given, 6, 0).indices.tolist() == expected.indices.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"less": {"reduce": "max"}}, "'reduce' in section 'selection.options.less'; did you mean 'reducer'"),
        ({"less": {"reducer": "median"}}, "'selection.options.less.reducer' = 'median': Input should be"),
        ({"less": {"selector": "topk"}}, "'less' chooses as 'less' does; give what uses 'topk' a name of its own"),
        ({"mine": {"selector": "topp"}}, "selection.options.mine: selector 'topp' is no strategy; did you mean 'topk'"),
        ({"mine": {"reducer": "max"}}, "without a selector it is a strategy's own name, but 'mine' is no strategy"),
        ({"a/b": {"selector": "topk"}}, "selection.options.a/b: the name of a strategy is a letter followed by"),
        ({"rds": {"preconditioner": "adam"}}, "selection.options.rds: preconditioner is of gradients: leave it out"),
        ({"dsir": {"buckets": 10**12}}, "'selection.options.dsir.buckets' = 1000000000000: Input should be less than"),
        ({"kmeans-quality": {"clusters": 10**12}}, "should be less than or equal to 1048576"),
        ({"learning-percentage": {"clusters": 10**12}}, "should be less than or equal to 1048576"),
        ({"random-matched": {"bins": 10**9}}, "should be less than or equal to 1024"),
        ({"gtp": {"alpha": -1}}, "'selection.options.gtp.alpha' = -1"),
        ({"gtp": {"alpha": True}}, "'selection.options.gtp.alpha' = True: expected a number"),
        ({"omp": {"max_iter": 3}}, "unknown key 'max_iter' in section 'selection.options.omp'; known: alpha"),
        ({"random-matched": {"like": "gpt"}}, "unknown strategy 'gpt'; did you mean 'gtp'"),
        ({"random-matched": {"like": "random-matched"}}, "whose choice is random itself"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_any_work(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_strategies(config(strategies=["random", *options], options=options))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_checkpoints_that_will_not_be_there_are_refused_before_any_work() -> None:
    tree = {"model": {"path": "m"}, "data": {"pool": "p", "target": "t"}, "warmup": {"checkpoints": 2}}
    late = {"selection": {"options": {"late": {"selector": "gtp", "checkpoints": [3]}}}}
    for own, where in (({"pursuit": {"checkpoints": "1,3"}}, "pursuit"), (late, r"selection\.options\.late")):
        with pytest.raises(ConfigError, match=rf"^{where}\.checkpoints: there is no checkpoint 3, the warm-up keeps 2"):
            check_strategies(build_config({**tree, **own}, "test"))
    made = build_config({**tree, "pursuit": {"checkpoints": 2}}, "test")
    assert made.pursuit.checkpoints == [2]
    check_strategies(made)


def test_entries_that_are_not_listed_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="unknown key 'reduce'"):
        check_strategies(config(strategies=["random"], options={"less": {"reduce": "max"}}))


@pytest.mark.parametrize("name", ["rds", "bids", "tarot", "dsir"])
def test_strategies_that_need_target_rows_are_refused_without_them(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' needs the rows of a target, but data.target is the pool itself"):
        check_strategies(config(strategies=["gtp", name]))
    check_strategies(config(strategies=["gtp", name], target="other"))


def test_a_registered_strategy_is_one_like_any_other(plugin: str) -> None:
    given = problem({"x": trajectory(np.eye(5))})
    found = strategy("shortest", {"shortest": {"reverse": True}})
    assert (found.source, found.distribution) == ("a paper", f"{plugin} 1.2")
    assert found.select(given, 2, 0).indices.tolist() == [4, 3]
    assert strategy("mine", {"mine": {"selector": "shortest"}}).select(given, 2, 0).indices.tolist() == [0, 1]
    check_strategies(config(strategies=["shortest"]))
    with pytest.raises(ConfigError, match=rf"selection.options.shortest \(of {plugin} 1.2\): TypeError: .*'revers'"):
        strategy("shortest", {"shortest": {"revers": True}})
    told = {entry["name"]: entry for entry in describe_strategies()}
    assert told["shortest"]["distribution"] == f"{plugin} 1.2"


def test_broken_registered_strategies_give_one_message(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    of = rf"\(of {plugin} 1.2"
    for name, words in {
        "failing": rf"{of}\): RuntimeError: needs a licence",
        "lacking": rf"{of}\): it has no source, needs, select, as every strategy must",
        "absent": rf"strategy 'absent' {of}, {plugin}:Nobody\) cannot be loaded \(AttributeError",
        "lost": rf"strategy 'lost' {of}, .*\) cannot be loaded \(ModuleNotFoundError: .*\); mend or uninstall",
        "broken": rf"strategy 'broken' {of}\): its needs\(\) failed \(AttributeError",
    }.items():
        with pytest.raises(ConfigError, match=words) as caught:
            check_strategies(config(strategies=[name]))
        assert "\n" not in str(caught.value)
    given = problem({"x": trajectory(np.eye(5))})
    for k, words in {
        1: r"its select\(\) failed \(ValueError: no idea\); mend it, or leave it out",
        2: r"its select\(\) gave positions that are not distinct",
        3: r"its select\(\) gave list, no gradpursuit.selection.Selection",
    }.items():
        with pytest.raises(SelectionError, match=words):
            strategy("broken").select(given, k, 0)
    assert main(["strategies"]) == 0
    text = capsys.readouterr().out
    assert "needs a licence" in text
    assert f"[{plugin} 1.2]" in text


def test_names_that_are_taken(plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = f"{plugin}_other"
    points = "[gradpursuit.strategies]\nshortest = {module}:Shortest\ngtp = {module}:Shortest\n"
    install(tmp_path / "more", other, points)
    monkeypatch.syspath_prepend(str(tmp_path / "more"))
    with pytest.raises(ConfigError, match=r"'shortest' is registered by .* and by .*; uninstall all but one"):
        strategy("shortest")
    assert type(strategy("gtp").method).__name__ == "GTP"
    told = [entry["error"] for entry in describe_strategies() if entry["name"] == "gtp" and "error" in entry]
    assert told == [f"what {other} 1.2 registers under this name is not used: it is taken"]
    assert used_distributions(SelectionSection(strategies=["gtp"])) == [], "no run depends on what is not used"
    requests = feature_requests(SelectionSection(strategies=["gtp"], options={"gtp": {"alpha": 1.0}}))
    assert requests == feature_requests(SelectionSection(strategies=["gtp"]))
    with pytest.raises(ConfigError) as caught:
        strategy("gttp")
    assert str(caught.value).count("gtp,") == 1, "a name is told once"


def test_a_package_that_pip_installed(tmp_path: Path) -> None:
    """Built and installed for real, without a network: a wheel is a zip file of a module and its metadata."""
    import zipfile

    install(tmp_path / "wheel", "real_plugin")
    wheel = tmp_path / "real_plugin-1.2-py3-none-any.whl"
    info = "real_plugin-1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted((tmp_path / "wheel").rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(tmp_path / "wheel").as_posix())
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from gradpursuit.selection import strategy; "
    code += "print(strategy('shortest').distribution)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "real_plugin 1.2", done.stderr


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("Selection.ranked([0, 1], {'x': {1, 2}})", "cannot be written as JSON"),
        ("Selection.ranked([0, 1], {(1, 2): 3})", "cannot be written as JSON"),
        ("Selection.ranked([0, 1], ['x'])", "evidence that is no dict"),
        ("Selection([0, 1], [1, 1], [1, 1])", "cannot be written as JSON|that are none"),
        ("Selection.ranked([0, 99])", "positions that are not"),
        ("None", "no gradpursuit.selection.Selection"),
    ],
)
def test_what_a_plugin_gives_is_checked_before_it_is_used(
    made: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"gives_{tmp_path.name}".replace("-", "_")
    module = f"""
        from gradpursuit.selection import Needs, Selection

        class Odd:
            source, stochastic = "a paper", False

            def needs(self, settings):
                return Needs(target="none")

            def select(self, problem, k, seed):
                return {made}
    """
    install(tmp_path / "site", name, "[gradpursuit.strategies]\nodd = {module}:Odd\n", module)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(SelectionError, match=words) as raised:
        strategy("odd").select(problem({"x": trajectory(np.eye(5))}), 2, 0)
    assert f"strategy 'odd' (of {name} 1.2)" in str(raised.value)
