"""What README and documentation show is true: commands and examples run, configurations are valid, the site builds."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradpursuit.cli import STAGE_VERBS, main
from gradpursuit.config import RunConfig, build_config, load_config
from gradpursuit.selection import STRATEGIES, check_strategies
from jobs import Job

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SITE = ["mkdocs", "build", "--strict"]
SMALL = {  # what makes a job of seconds of any configuration
    "warmup": {"fraction": 0.4, "epochs": 1, "checkpoints": 2, "batch_size": 4},
    "gradients": {"dim": 64, "shard_rows": 64},
    "evaluation": {"epochs": 1, "batch_size": 4},
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_blocks(language: str) -> list[Any]:
    return [pytest.param(page, id=name_of(page)) for page in PAGES if blocks(page, language)]


def commands(page: Path) -> Iterator[list[str]]:
    """Every command that a page shows, in words."""
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            if words:
                yield words


@pytest.fixture(scope="module")
def folder(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages name, and a finished run of the configuration that the tour shows, all small."""
    folder = tmp_path_factory.mktemp("shown")
    (folder / "pool").mkdir()
    (folder / "my-model").symlink_to(tiny_path)
    job = Job(folder, tiny_path)
    for word in ("plus", "minus"):
        job.write(f"pool/{word}.jsonl", [job.row(i, word) for i in range(100)])
    job.write("sums.jsonl", [job.row(i, "and") for i in range(6)])
    (shown,) = (block for block in blocks(DOCS / "tour.md", "yaml") if "model:" in block)
    tree = {**yaml.safe_load(shown), **SMALL, "model": job.tree["model"]}
    tree["evaluation"] = {**yaml.safe_load(shown)["evaluation"], **SMALL["evaluation"]}
    (folder / "my-task.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "my-task.yaml", "--quiet"]) == 0
    return folder


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_commands_run(page: Path, folder: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for words in commands(page):
        match words:
            case ["gradpursuit", "quickstart"]:
                check_quickstart(words[1:], tiny_path)
            case ["gradpursuit", *rest]:
                rest = ["20" if word == "100000" else word for word in rest]  # tokens, of a job of seconds
                assert main(rest) == 0, shlex.join(words)
            case ["python", script, *rest] if script.startswith("benchmarks/"):
                check_benchmark(ROOT / script, rest, monkeypatch)
            case ["pip", "install", *rest]:
                check_install(rest)
            case ["pytest"]:
                assert 'pip install -c constraints.txt -e ".[test]" && pytest' in (ROOT / ".ci" / "run").read_text()
            case _:
                assert words == SITE, f"{name_of(page)}: no test runs '{shlex.join(words)}'"


def check_quickstart(words: list[str], model: Path) -> None:
    """The quickstart itself, with a tiny model and short trainings."""
    small = {**SMALL, "model": {"path": str(model)}, "evaluation": {"seeds": 1, "steps": 1, "batch_size": 2}}
    flags = [f"--{name}.{key}={value}" for name, section in small.items() for key, value in section.items()]
    assert main([*words, *flags]) == 0
    assert Path("runs/quickstart/report.html").is_file()


def check_benchmark(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes hours, so only this is looked at: that it starts, and takes these arguments."""
    before = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(script.parent)
        patch.setattr(sys, "argv", [str(script), *arguments, "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    for name in set(sys.modules) - before:  # several benchmarks have modules of one name
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    assert ended.value.code == 0


def check_install(words: list[str]) -> None:
    """What is installed is there: the constraints, and the extras of this distribution."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    known = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    for word in words:
        wanted = re.fullmatch(r"(?:\.|gradpursuit)(?:\[(\w+)\])?", word)
        assert word in ("-e", "-c") or (ROOT / word).is_file() or wanted, word
        assert not (wanted and wanted[1]) or wanted[1] in known, word


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_examples_run(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    short = 'max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no"'
    for block in blocks(page, "python"):
        shown = re.sub(r'(SFTConfig|TrainingArguments)\("(\w+)"\)', rf'\1("\2", {short})', block)
        tree = ast.parse(shown, name_of(page))
        if any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(tree)):
            tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            assert tree.body
        exec(compile(tree, name_of(page), "exec"), {})
        if "planted" in block:
            first, error = capsys.readouterr().out.splitlines()
            assert first.startswith("True ")
            assert float(error) < 1e-6


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_configurations_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        if "--8<--" in block:
            assert (ROOT / block.split('"')[1]).is_file()
            continue
        shown = yaml.safe_load(block)
        tree: dict[str, Any] = {"model": {"path": "m"}, **shown}
        tree["data"] = {"pool": "p", "target": "t", **shown.get("data", {})}
        config = build_config(tree, name_of(page))
        check_strategies(config)
        assert set(config.selection.options) <= set(config.selection.strategies)


def test_the_example_configuration_shows_the_defaults() -> None:
    path = ROOT / "examples" / "config.yaml"
    example = load_config(path)
    assert set(yaml.safe_load(path.read_text("utf-8"))) == set(RunConfig.model_fields)
    for name, field in RunConfig.model_fields.items():
        if name in ("run_dir", "model", "data", "selection"):
            continue
        assert getattr(example, name) == field.default, name
    for section in ("model", "data", "selection"):
        shown = getattr(example, section)
        free = {name: getattr(shown, name) for name in ("path", "pool", "target", "fraction") if hasattr(shown, name)}
        if section == "selection":
            free.pop("target")
        assert shown == type(shown)(**free), section
    assert set(yaml.safe_load(path.read_text("utf-8"))["evaluation"]) == set(type(example.evaluation).model_fields)


def test_settings_that_are_named_exist() -> None:
    """`section.key` in running text, as in `pursuit.alpha`."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items() if "." not in name}
    found = 0
    for page in PAGES:
        for section, key in re.findall(r"`(\w+)\.([a-z_]+)\b(?:: [^`]*)?`", page.read_text("utf-8")):
            fields = getattr(sections.get(section), "model_fields", None)
            if fields is not None and not (ROOT / "src" / "gradpursuit" / section / f"{key}.py").is_file():
                assert key in fields, f"{name_of(page)}: {section}.{key}"
                found += 1
    assert found > 30


def test_verbs_and_strategies_are_those_of_the_program() -> None:
    shown = {tuple(words[1:3]) for page in PAGES for words in commands(page) if words[0] == "gradpursuit"}
    verbs = {first for first, *_ in shown}
    others = {"run", "quickstart", "inspect", "estimate", "status", "verify", "report", "strategies", "target"}
    assert verbs == {*STAGE_VERBS, *others}
    assert {("target", "add"), ("target", "list")} <= shown
    table = re.findall(r"^\| `([\w-]+)` \|", (DOCS / "strategies.md").read_text("utf-8"), re.MULTILINE)
    assert table == list(STRATEGIES)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as the README says."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", *SITE, "--site-dir", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    page = (site / "maths" / "index.html").read_text("utf-8")
    assert page.count("<math ") > 40
    assert page.count('display="block"') == 3
    assert "arithmatex" not in page


class Sources(HTMLParser):
    """What a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        wanted = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "object": "data"}
        self.found += [value for name, value in attrs if name == wanted.get(tag) and value]


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES) - 1
    for page in pages:
        sources = Sources()
        sources.feed(page.read_text("utf-8"))
        assert sources.found
        for source in sources.found:
            assert not re.match("[a-z]+:|//", source), f"{page.name}: {source}"
            if not source.startswith("/"):  # the page of errors alone has absolute addresses
                assert (page.parent / source.partition("?")[0]).exists(), f"{page}: {source}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:|//)", style.read_text("utf-8")), style


def test_pictures_are_what_is_drawn(tmp_path: Path) -> None:
    runpy.run_path(str(DOCS / "tools" / "draw.py"))["draw"](tmp_path)
    shown = "".join(page.read_text("utf-8") for page in PAGES)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (DOCS / "pictures").iterdir())
    for name in drawn:
        assert (tmp_path / name).read_text("utf-8") == (DOCS / "pictures" / name).read_text("utf-8"), name
        assert f"](pictures/{name})" in shown, name
