from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import nnls

from gradpursuit.cli import main
from gradpursuit.config import load_config
from gradpursuit.evaluation.findings import Line
from gradpursuit.pipeline import Run
from gradpursuit.report import fit, fitting
from gradpursuit.report.comparison import comparison
from gradpursuit.report.findings import findings
from gradpursuit.report.fit import Explainer
from gradpursuit.report.page import render
from gradpursuit.report.terminal import comparison_tables, timing_table
from gradpursuit.report.write import gather
from jobs import Job

BY_GRADIENT = ("fit", "budgets", "duplicates", "targets", "control")


class Page(HTMLParser):
    """Collects tags, attributes that would make a request or run a script, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data") and value]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def quick(folder: Path) -> Run:
    return Run(load_config(folder / "config.yaml"), quick=True)


def test_page_is_self_contained_and_escapes_the_data(page: Path, evil: str) -> None:
    text = page.read_text("utf-8")
    found = Page(text)
    assert found.tags.count("script") == 1, "our own"
    assert not {"img", "link", "iframe", "object", "base"} & set(found.tags)
    assert found.handlers == []
    assert all(link.startswith("#") for link in found.links)
    assert "url(" not in text
    assert "@import" not in text
    words = "".join(found.words)
    assert evil in words
    assert f"sums{evil}" in words
    assert "pool <b>&.jsonl" in words
    assert "longer than max_tokens" in words
    assert not re.search(r"\w\)?\.[A-Z“]", words), "a sentence begins without a space before it"


def test_residuals_are_those_of_the_pursuit_and_of_scipy(finished: Job, report: dict[str, Any]) -> None:
    evidence = json.loads((finished.run_dir / "selection/gtp/path.json").read_text())[0]
    assert report["fit"]["relative_residual"] == pytest.approx(evidence["path"][-1]["relative_residual"], abs=1e-6)
    assert report["budgets"]["path"][-1]["budget"] == 8
    assert report["budgets"]["path"][-1]["relative_residual"] == pytest.approx(evidence["relative_residual"], abs=1e-6)
    residuals = [point["relative_residual"] for point in report["budgets"]["path"]]
    assert min(residuals) < 0.5 < residuals[0], "a ridge lets it rise a little, but more rows explain more"
    assert report["budgets"]["knee"]["budget"] in [point["budget"] for point in report["budgets"]["path"]]

    run = quick(finished.run_dir)
    for name, draws in run.selections().items():
        match = Explainer(run).match(np.sort(draws[0].indices))
        stacked = np.vstack([match.columns, np.sqrt(match.ridge) * np.eye(8)])
        weights, _ = nnls(stacked, np.concatenate([match.target, np.zeros(8)]))
        left = np.linalg.norm(match.target - match.columns @ weights) / np.linalg.norm(match.target)
        assert report["fit"]["strategies"][name] == pytest.approx(left, abs=1e-6)
        assert match.examples.mean(axis=1) == pytest.approx(match.target, abs=1e-6)


def test_fit_of_the_whole_is_that_of_its_only_group(report: dict[str, Any]) -> None:
    found = report["fit"]
    (group,) = found["groups"]
    assert group["examples"] == 6
    assert group["checkpoints"] == pytest.approx(found["checkpoints"])
    assert 0 < group["overall"] <= 1


def test_the_wrong_target_is_explained_less(report: dict[str, Any]) -> None:
    control = report["control"]
    assert control["own"]["relative_residual"] == pytest.approx(report["fit"]["relative_residual"])
    (other,) = control["others"]
    assert other["target"] == "other"
    assert 0 < other["relative_residual"] <= 1
    assert other["alignment"] < control["own"]["alignment"]


def test_copies_that_top_k_takes_are_counted(finished: Job, report: dict[str, Any]) -> None:
    found = report["duplicates"]
    own = next(line for line in found["strategies"] if line["strategy"] == "gtp")
    assert own["text"] == own["gradient"] == 0
    assert found["top_k"]["examples"] == 8
    assert found["top_k"]["text"] == found["top_k"]["gradient"] > 0, "of a row and its copy both are on top"
    ids = {row["id"] for row in map(json.loads, (finished.folder / "pool <b>&.jsonl").read_text().splitlines())}
    assert {pair["id"] for pair in found["set_aside"]} <= ids


def test_rows_carry_text_weight_and_whom_they_serve(finished: Job, report: dict[str, Any]) -> None:
    rows = report["rows"]["rows"]
    exported = [json.loads(line) for line in (finished.run_dir / "selection/gtp/selected.jsonl").open()]
    assert {row["id"]: row["weight"] for row in rows} == {row["id"]: row["weight"] for row in exported}
    assert [row["rank"] for row in rows] == list(range(1, 9))
    assert rows[0]["blocks"][0]["label"] == "prompt"
    targets = {example["id"] for example in report["targets"]["examples"]}
    assert len(targets) == 6
    for row in rows:
        cosines = [one["cosine"] for one in row["serves"]]
        assert cosines == sorted(cosines, reverse=True)
        assert {one["id"] for one in row["serves"]} <= targets
    cosines = [example["cosine"] for example in report["targets"]["examples"]]
    assert cosines == sorted(cosines), "the least served first"


def test_loss_before_is_that_of_the_target_chosen_for(finished: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    run = quick(finished.run_dir)
    lines = run.lines()
    others = [replace(line, target="other", before=line.before + 1) for line in lines]
    monkeypatch.setattr(Run, "lines", lambda _: [*others, *lines])
    found = comparison(run)
    assert (found["before"], found["target"]) == (None, "own")
    assert [row["before"] for row in found["rows"]] == [line.before for line in (*others, *lines)]
    report = gather(run)
    own = next(line for line in lines if line.strategy == "gtp")
    words = " ".join(Page(render(report)).words)
    assert f"{own.before:.2f} → {own.after:.2f}" in words
    assert f"{own.before + 1:.2f} →" not in words


def test_a_fit_outside_the_subspace_of_the_pursuit_says_so(report: dict[str, Any]) -> None:
    told = "the pursuit saw only their part in the target’s subspace"
    assert report["fit"]["subspace"] == "none"
    assert told not in " ".join(" ".join(Page(render(report)).words).split())
    projected = render({**report, "fit": {**report["fit"], "subspace": "target"}})
    assert told in " ".join(" ".join(Page(projected).words).split())


def test_before_and_after(report: dict[str, Any]) -> None:
    source, topic = report["mixes"]
    assert [(value["value"], value["pool"]) for value in source["values"]] == [("pool <b>&.jsonl", 40)]
    assert topic["by"] == "topic"
    assert {value["value"].split("<")[0]: value["pool"] for value in topic["values"]} == {"sums": 20, "more": 20}
    for strategy in ("gtp", "less", "random"):
        assert sum(value["chosen"][strategy] for value in topic["values"]) == 8
    for found in report["lengths"].values():
        assert sum(found["histogram"]["pool"]) == pytest.approx(1)
        assert sum(found["histogram"]["chosen"]["gtp"]) == pytest.approx(1)
    assert report["weights"]["effective"] == pytest.approx(
        sum(report["weights"]["falling"]) ** 2 / sum(weight**2 for weight in report["weights"]["falling"])
    )
    assert [(line["split"], line["rows"]) for line in report["cleaning"]["dropped"]] == [("pool", 1)]


def test_what_is_missing_is_said_with_the_command(job: Job) -> None:
    assert main(["warmup", str(job.path), "--quiet"]) == 0
    assert main(["report", str(job.run_dir), "--quiet"]) == 0
    early = json.loads((job.run_dir / "report.json").read_text())
    assert early["cleaning"]["rows"]["pool"] == 31
    for name in (*BY_GRADIENT, "rows", "mixes", "lengths", "weights", "comparison"):
        missing = {
            "missing": "'gradients' is not complete for this configuration",
            "command": f"gradpursuit collect {job.run_dir}",
        }
        assert early[name] == missing, name
    text = "".join(Page((job.run_dir / "report.html").read_text("utf-8")).words)
    assert f"gradpursuit collect {job.run_dir}" in text
    assert "nothing has been chosen yet" in text

    for verb in ("collect", "select"):
        assert main([verb, str(job.run_dir), "--quiet"]) == 0
    assert main(["report", str(job.run_dir), "--quiet"]) == 0
    chosen = json.loads((job.run_dir / "report.json").read_text())
    assert chosen["comparison"]["command"] == f"gradpursuit export {job.run_dir}"
    assert chosen["control"]["command"].startswith(f"gradpursuit target add {job.run_dir}")
    assert chosen["fit"]["explained"] > 0
    assert main(["compare", str(job.run_dir), "--quiet"]) == 0
    assert json.loads((job.run_dir / "report.json").read_text())["comparison"]["rows"]


def test_a_report_of_nothing_is_refused(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(job.folder)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_a_comparison_of_other_selections_is_not_shown(finished: Job, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.run_dir, folder)
    assert main(["select", str(folder), "--selection.k", "4", "--quiet"]) == 0
    assert main(["report", str(folder), "--quiet"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["comparison"]["missing"] == "'export' is not complete for this configuration"
    assert report["rows"]["chosen"] == 4


def test_the_report_is_the_stage_when_nothing_is_missing(finished: Job) -> None:
    run = quick(finished.run_dir)
    before = (run.folder / "report.json").read_bytes()
    assert run.missing("report") is None
    assert run.report() == [run.folder / "report.html", run.folder / "report.json"]
    again = json.loads((run.folder / "report.json").read_bytes())
    assert {**again, "timings": []} == {**json.loads(before), "timings": []}
    assert run.missing("report") is None


def test_a_strategy_without_features_has_rows_all_the_same(job: Job) -> None:
    job.save(selection={"strategies": ["random"]})
    for verb, where in (("warmup", job.path), ("collect", job.run_dir), ("select", job.run_dir)):
        assert main([verb, str(where), "--quiet"]) == 0
    report = gather(quick(job.run_dir))
    assert "add gtp to selection.strategies" in report["fit"]["missing"]
    assert len(report["rows"]["rows"]) == 5
    assert "Chosen rows" in render(report)


def test_what_takes_long_waits_until_it_is_asked_for(finished: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    run = quick(finished.run_dir)
    monkeypatch.setattr(fitting, "PASS_BYTES", 0)
    found = gather(run)["duplicates"]
    assert found["top_k"]["command"] == f"gradpursuit report {run.folder} --full"
    assert found["strategies"]
    assert gather(run, full=True)["duplicates"]["top_k"]["examples"] == 8
    monkeypatch.setattr(fitting, "COLUMN_BYTES", 0)
    found = gather(run)
    assert all("--full" in found[name]["command"] for name in BY_GRADIENT if name != "budgets")
    assert "command" not in found["budgets"]  # these are kept with the selection
    assert len(found["rows"]["rows"]) == 8


def test_near_copies_and_alignment() -> None:
    columns = np.array([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert fit.near_copies(columns, 0.999) == 1
    assert fit.alignment(columns[:, 0], np.array([1.0, 1.0])) == pytest.approx(np.sqrt(0.5))
    assert fit.alignment(columns[:, 3], columns[:, 0]) == 0
    assert fit.cosines(columns, columns[:, :1])[:, 0].tolist() == [1, 1, 0, 0]


def test_a_page_of_500_long_rows_is_below_two_megabytes(report: dict[str, Any]) -> None:
    row = report["rows"]["rows"][0]
    text = [{"label": "prompt", "text": "a word & <more> " * 75}]
    rows = [{**row, "id": f"row-{i}", "rank": i + 1, "blocks": text} for i in range(500)]
    html = render({**report, "rows": {"strategy": "gtp", "chosen": 900, "rows": rows}})
    assert len(html.encode()) < 2 << 20
    assert "The first 500 of 900 are shown" in html


def test_findings_tell_what_to_doubt(report: dict[str, Any]) -> None:
    assert {finding["kind"] for finding in findings(report)} <= {"warning", "good", "note"}
    worse = json.loads(json.dumps(report))
    worse["fit"]["explained"] = 0.05
    worse["control"]["others"][0]["relative_residual"] = 0.1
    chosen = worse["lengths"]["tokens"]["chosen"]["gtp"]
    chosen |= {"shifted": True, "median": worse["lengths"]["tokens"]["pool"]["median"] * 2}
    worse["weights"]["effective"] = 2.0
    worse["cleaning"]["dropped"][0]["rows"] = 30
    warnings = [finding["text"] for finding in findings(worse) if finding["kind"] == "warning"]
    for words in (
        "explain only 5 % of the target’s gradient",
        "explain another target, other, as well as their own",
        "are longer than the pool’s",
        "8 rows are 2.0 effective ones",
        "30 of 70 rows of the pool were dropped (43 %)",
    ):
        assert [text for text in warnings if words in text], words
    told = {"target": "own", "reference": "gtp", "reference_budget": 8, "other_budget": 8, "metric": "loss"}
    values = {"better": (0.1, 0.3), "worse": (-0.3, -0.1), "level": (-0.1, 0.3)}
    worse["comparison"]["differences"] = [
        {**told, "other": name, "low": low, "high": high, "difference": (low + high) / 2, "detectable": 0.25}
        for name, (low, high) in values.items()
    ]
    texts = {(finding["kind"], finding["text"]) for finding in findings(worse)}
    assert (
        "good",
        "gtp against better (the run’s own target): held-out loss lower by 0.200 (95 % interval 0.100 to 0.300).",
    ) in texts
    assert (
        "warning",
        "gtp against worse (the run’s own target): held-out loss higher by 0.200 (95 % interval 0.100 to 0.300).",
    ) in texts
    assert any(kind == "note" and "a difference of 0.250 would have shown" in text for kind, text in texts)


def test_the_comparison_is_that_of_its_files(finished: Job, report: dict[str, Any]) -> None:
    found = report["comparison"]
    lines = {line["strategy"]: line for line in json.loads((finished.run_dir / "evaluation/summary.json").read_text())}
    assert {row["strategy"] for row in found["rows"]} == set(lines)
    for row in found["rows"]:
        line = lines[row["strategy"]]
        assert row["mean"] == pytest.approx(sum(line["losses"]) / len(line["losses"]))
        assert row["high"] - row["low"] == pytest.approx(line["gain"]["high"] - line["gain"]["low"])
        assert row["low"] <= row["mean"] <= row["high"]
    pairs = (finished.run_dir / "evaluation/differences.csv").read_text().splitlines()
    assert len(found["differences"]) == len(pairs) - 1 > 0


def test_terminal_tables_show_every_seed_and_the_total() -> None:
    lines = [Line("gtp", 2, 0.0, 1, 8.0, [1.0, 2.0]), Line("random-matched", 2, 1.0, 0, 8.0, [3.0, 5.0, 4.0])]
    stages = {
        "data": {"seconds": 1.0, "detail": {}},
        "selection": {"seconds": 2.25, "detail": {"seconds": {"gtp": 2.0}}},
    }
    console = Console(width=80, record=True, file=StringIO())
    for table in comparison_tables(lines):
        console.print(table)
    console.print(timing_table({"stages": stages}))
    text = console.export_text()
    for figure in ("random-matched", "1.000", "2.000", "3.000", "5.000", "1.500", "4.000", "8.000", "3.2"):
        assert figure in text
    assert "…" not in text, "80 columns are enough"


def test_every_target_and_protocol_has_a_terminal_table_of_its_own() -> None:
    lines = [
        Line("random-matched", 2, 1 / 3, 0, 8.0, [3.25] * 3, accuracies=[accuracy], target=target, protocol=protocol)
        for target, accuracy in (("reasoning_about_colored_objects", 0.75), ("own", 0.5))
        for protocol in ("equal-steps", "equal-epochs")
    ]
    lines.append(Line("full", 2, 0.0, 0, 8.0, [4.5], target="own", protocol="equal-epochs"))  # scored without accuracy
    console = Console(width=80, record=True, file=StringIO())
    for table in comparison_tables(lines):
        console.print(table)
    text = console.export_text()
    for words in ("reasoning_about_colored_objects, equal-steps", "own, equal-epochs", "0.75", "0.50", " 0.3 "):
        assert words in text
    assert text.count("3.250") == 4 * 4, "every seed and the mean"
    assert "…" not in text, "80 columns are enough"


def test_the_page_says_what_figures_mean(report: dict[str, Any]) -> None:
    told = json.loads(json.dumps(report))
    for name, found in told["lengths"].items():
        found["chosen"]["gtp"] |= {"shifted": name == "tokens", "median": found["pool"]["median"] * 2}
    first = told["comparison"]["differences"][0]
    values = {
        "difference": -0.0004,
        "low": -0.25,
        "high": 0.1,
        "detectable": 0.3,
        "positive": 7,
        "ties": 80,
        "pairs": 96,
    }
    same = {**dict.fromkeys(("difference", "low", "high", "detectable"), 0.0), "positive": 0, "ties": 16, "pairs": 16}
    told["comparison"]["differences"] = [{**first, **values}, {**first, **same}]
    told["mixes"][1]["values"][0]["value"] = ""
    told["timings"][0]["outdated"] = True
    words = " ".join(" ".join(Page(render(told)).words).split())
    assert "costs more than on as many rows of the pool" in words
    assert "the length of an answer" not in words, "the supervised tokens are not shifted"
    assert "0.000 −0.250 to +0.100 0.300 7 of 96 80 the same" in words
    assert "the same – – –" in words
    assert "(none)" in words
    assert "data, outdated" in words
    assert words.count("top of a ranking") == words.count("a draw") == 1, "less and random"
