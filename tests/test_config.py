"""The configuration: one object from YAML and flags, round trips, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from gradpursuit.config import LoraSection, RunConfig, WarmupSection, build_config, build_section, load_config
from gradpursuit.errors import ConfigError, GradPursuitError, nearest
from gradpursuit.selection.budget import BudgetRequest

MINIMAL = "model:\n  path: some/model\ndata:\n  pool: pool.jsonl\n  target: [a.jsonl, b.jsonl]\n"


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def test_minimal_file_and_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert [source.path for source in config.data.pool] == ["pool.jsonl"]
    assert [source.path for source in config.data.target or []] == ["a.jsonl", "b.jsonl"]
    assert config.gradients.preconditioner == "adam-symmetric"
    assert config.model.lora is not None
    assert config.model.lora.r == 8


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run_dir='runs/größe: 1'", "seed=7", "selection.k=3", "model.lora.target_modules=[q_proj, v_proj]"],
        ["warmup.learning_rate=1e-6", "pursuit.tol=1e-12", "pursuit.max_coherence=null", "data.heldout=h.jsonl"],
        ["warmup.trajectory=[/a/checkpoint-1, /a/checkpoint-2]"],
        ["model.layers='.*mlp\\.(up|down)_proj'", "warmup.trajectory=[/a/checkpoint-1, /a/checkpoint-2]"],
        ["data.target=pool", "selection.options={less: {reducer: mean}, a: {selector: topk}}", "pursuit.rank=5"],
        ["selection.fraction=0.05", "selection.strategies=[gtp]", "evaluation.use_weights=true", "run_dir='0123'"],
    ],
)
def test_dump_and_load_are_inverse(tmp_path: Path, overrides: list[str]) -> None:
    config = load(tmp_path, MINIMAL, *overrides)
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(), encoding="utf-8")
    assert load_config(again) == config
    assert load_config(again).dump() == config.dump()


SOURCES = """
model: {path: m}
data:
  pool: [{path: "chats/*.parquet", name: chats, columns: {messages: turns}}, plain.jsonl, {path: me/data, split: test}]
  target: {path: t.csv}
"""


def test_sources_are_dumped_as_short_as_they_can_be(tmp_path: Path) -> None:
    config = load(tmp_path, SOURCES)
    assert config.data.pool[0].options == {"name": "chats", "columns": {"messages": "turns"}}
    tree = yaml.safe_load(config.dump())["data"]
    assert tree["pool"] == yaml.safe_load(SOURCES)["data"]["pool"]
    assert tree["target"] == ["t.csv"]
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(), encoding="utf-8")
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("{pool: {pth: p}, target: t}", "unknown key 'pth' in section 'data.pool.0'; did you mean 'path'?"),
        ("{pool: [p, {name: x}], target: t}", "'data.pool.1.path' is missing"),
        ("{pool: p, target: {pth: t}}", "unknown key 'pth' in section 'data.target.0'; did you mean 'path'?"),
        ("{pool: ['a,b', {path: ''}], target: t}", "'data.pool.1.path' = ''"),
        ("{pool: p, target: t, columns: {promt: q}}", "'data.columns.promt"),
        ("{pool: p, target: t, turns: all}", "'data.turns' = 'all'"),
        ("{pool: p, target: t, near_threshold: 1}", "'data.near_threshold' = 1"),
    ],
)
def test_wrong_data_sections(tmp_path: Path, data: str, part: str) -> None:
    assert part in message(tmp_path, f"model: {{path: m}}\ndata: {data}\n")


def test_dump_holds_every_field(tmp_path: Path) -> None:
    tree = yaml.safe_load(load(tmp_path, MINIMAL).dump())
    assert set(tree) == set(RunConfig.model_fields)
    assert tree["model"]["lora"] == {"r": 8, "alpha": 16, "target_modules": "all-linear", "rslora": False}


def test_an_adapter_or_layers(tmp_path: Path) -> None:
    model = load(tmp_path, MINIMAL, "model.layers=.*down_proj").model
    assert (model.layers, model.lora) == (".*down_proj", None)
    text = message(tmp_path, MINIMAL, "model.layers=.*down_proj", "model.lora.r=4")
    assert "layers and lora are both given: leave lora out (or null)" in text
    assert load(tmp_path, MINIMAL, "model.layers=.*", "model.lora=null").model.lora is None
    assert "'model.layers' = '(': not a regular expression" in message(tmp_path, MINIMAL, "model.layers=(")
    assert load(tmp_path, MINIMAL, "model.lora.rslora=true").model.lora == LoraSection(rslora=True)
    assert load(tmp_path, MINIMAL, "model.lora=null").model.lora == LoraSection()


def test_a_trajectory_that_exists(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "warmup.trajectory=runs/sft")
    assert config.warmup.trajectory == ["runs/sft"]
    assert config.warmup.model_dump(exclude={"trajectory"}) == WarmupSection().model_dump(exclude={"trajectory"})
    text = message(tmp_path, MINIMAL, "warmup.trajectory=[a, b]", "warmup.checkpoints=2", "warmup.epochs=9")
    assert "with trajectory nothing is trained, so leave out epochs, checkpoints" in text
    text = message(tmp_path, MINIMAL, "warmup.trajectory=a", "warmup.epochs=3")
    assert text.endswith("with trajectory nothing is trained, so leave out epochs"), "though 3 is the default"
    assert load(tmp_path, MINIMAL, "warmup.trajectory=a", "model.lora=null").model.lora is not None
    for setting in ("model.lora.r=4", "model.lora.r=8", "model.lora={}"):
        text = message(tmp_path, MINIMAL, "warmup.trajectory=a", setting)
        assert "c.yaml: model.lora and warmup.trajectory are both given" in text
    text = message(tmp_path, MINIMAL, "warmup.trajectory=a", "model.lora.r=4")
    assert "c.yaml: model.lora and warmup.trajectory are both given" in text
    assert len(text.splitlines()) == 1


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    text = MINIMAL + "warmup:\n  epochs: 9\n"
    config = load(
        tmp_path, text, "warmup.epochs=2", "model.lora.r=4", "warmup.learning_rate=5e-5", "pursuit.balance=false",
        "data.pool=[x.jsonl, y.jsonl]", "data.target=z.jsonl", "model.revision='1234'",
    )  # fmt: skip
    assert config.model.lora is not None
    assert (config.warmup.epochs, config.model.lora.r, config.warmup.learning_rate) == (2, 4, 5e-5)
    assert config.pursuit.balance is False
    assert [source.path for source in config.data.pool] == ["x.jsonl", "y.jsonl"]
    assert [source.path for source in config.data.target or []] == ["z.jsonl"]
    assert config.model.revision == "1234"


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 takes 2e-4 for text; the field still is the number."""
    config = load(tmp_path, MINIMAL + "warmup:\n  learning_rate: 2e-4\n  fraction: 1\n")
    assert config.warmup.learning_rate == 2e-4
    assert config.warmup.fraction == 1.0


def test_override_of_an_empty_section(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "warmup:\n", "warmup.epochs=4").warmup.epochs == 4


def test_config_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    with pytest.raises(ValidationError):
        config.warmup.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ("warmpu:\n  epochs: 1\n", ["unknown key 'warmpu'", "did you mean 'warmup'?", "gradients"]),
        ("warmup:\n  epoch: 1\n", ["unknown key 'epoch' in section 'warmup'", "did you mean 'epochs'?"]),
        ("zzz: 1\n", ["unknown key 'zzz'; known: data,"]),
        ("gradients:\n  preconditoner: adam\n", ["in section 'gradients'", "did you mean 'preconditioner'?"]),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, extra: str, parts: list[str]) -> None:
    text = message(tmp_path, MINIMAL + extra)
    assert all(part in text for part in [*parts, "c.yaml"]), text


def test_unknown_key_two_levels_down(tmp_path: Path) -> None:
    text = message(tmp_path, MINIMAL, "model.lora.rank=4", "model.lora.alhpa=1")
    assert "unknown key 'rank' in section 'model.lora'" in text
    assert "'alhpa' in section 'model.lora'; did you mean 'alpha'?" in text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("warmup.epochs=0", "'warmup.epochs' = 0"),
        ("warmup.epochs=many", "'warmup.epochs' = 'many'"),
        ("warmup.epochs=2.5", "'warmup.epochs' = 2.5"),
        ("warmup.fraction=0", "'warmup.fraction' = 0"),
        ("warmup.fraction=1.1", "'warmup.fraction' = 1.1"),
        ("warmup.learning_rate=-1", "'warmup.learning_rate' = -1"),
        ("warmup.learning_rate=.inf", "'warmup.learning_rate' = inf"),
        ("pursuit.alpha=.nan", "'pursuit.alpha' = nan"),
        ("pursuit.alpha=.inf", "'pursuit.alpha' = inf"),
        ("gradients.preconditioner=sgd", "'adam-symmetric', 'adam', 'adam-centered' or 'identity'"),
        ("gradients.dim=3", "'gradients.dim' = 3"),
        ("gradients.shard_rows=5000", "'gradients.shard_rows' = 5000"),
        ("evaluation.holdout=1", "'evaluation.holdout' = 1"),
        ("selection.strategies=[]", "'selection.strategies' = []"),
        ("selection.strategies=[gtp, gtp]", "listed twice"),
        ("data.pool=5", "'data.pool' = 5"),
        ("warmup=5", "'warmup' = 5"),
        ("seed=-1", "'seed' = -1"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, override: str, part: str) -> None:
    text = message(tmp_path, MINIMAL, override)
    assert part in text
    assert len(text.splitlines()) == 1
    assert "Value error" not in text


def number_settings(section: Any, prefix: str = "") -> list[str]:
    """The names of all settings that are numbers, as flags have them."""
    found = []
    for name, field in section.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += number_settings(kind, f"{prefix}{name}.")
        if {int, float} & {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds}:
            found.append(f"{prefix}{name}")
    return found


def test_truth_is_no_number(tmp_path: Path) -> None:
    keys = number_settings(RunConfig)
    assert {"seed", "selection.k", "model.lora.r", "selection.fraction", "pursuit.tol", "warmup.epochs"} <= set(keys)
    assert len(keys) > 25
    for key in keys:
        assert f"--{key}: '{key}' = True: " in message(tmp_path, MINIMAL, f"{key}=true")


def test_whole_numbers_are_not_guessed(tmp_path: Path) -> None:
    assert "'warmup.epochs' = 2.0" in message(tmp_path, MINIMAL, "warmup.epochs=2.0")
    assert "'warmup.epochs' = '2'" in message(tmp_path, MINIMAL + "warmup: {epochs: '2'}\n")


def test_a_wrong_value_is_reported_where_it_was_given(tmp_path: Path) -> None:
    text = MINIMAL + "warmup:\n  epochs: 0\nselection:\n  k: 3\n"
    found = message(tmp_path, text, "warmup.fraction=2", "selection.fraction=0.1", "pursuit.alpa=1", "data.pool=[1]")
    starts = sorted(line.partition(": ")[0] for line in found.splitlines())
    flags = ["--data.pool", "--pursuit.alpa", "--selection.fraction", "--warmup.fraction"]
    assert starts == [*flags, f"{tmp_path}/c.yaml:7"]
    assert "--warmup.fraction: 'warmup.fraction' = 2" in found
    assert "--pursuit.alpa: unknown key 'alpa' in section 'pursuit'; did you mean 'alpha'?" in found
    assert message(tmp_path, MINIMAL, "warmup={epochs: 0}").startswith("--warmup: 'warmup.epochs' = 0")


def test_names_of_targets(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "selection.target=law-2_b").selection.target == "law-2_b"
    assert load(tmp_path, MINIMAL, "selection.target=null").selection.target is None
    for name in ("a/b", "..", "''", "a.b", "5"):
        assert "--selection.target: 'selection.target' = " in message(tmp_path, MINIMAL, f"selection.target={name}")


LISTS = ["data.pool", "data.target", "data.heldout", "warmup.trajectory", "selection.strategies"]


@pytest.mark.parametrize("key", [*LISTS, "model.lora.target_modules"])
def test_a_list_of_names_may_be_a_text_with_commas(tmp_path: Path, key: str) -> None:
    def value(text: str) -> Any:
        found: Any = load(tmp_path, MINIMAL, f"{key}={text}")
        for name in key.split("."):
            found = getattr(found, name)
        return [source.path for source in found] if key.startswith("data.") else found

    assert value("a_1, b.c") == value("[a_1, b.c]") == ["a_1", "b.c"]
    assert value("['a,b']") == ["a,b"]
    if key in LISTS:
        assert value("a") == ["a"]
        assert "a name is empty; one that holds a comma itself is written" in message(tmp_path, MINIMAL, f"{key}=a,")
    else:
        assert value("q.{1,2}proj") == "q.{1,2}proj", "an expression"


def test_budgets_and_checkpoints(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "evaluation.budgets=50,100").evaluation.budgets == [50, 100]
    assert load(tmp_path, MINIMAL, "evaluation.budgets=50, 0.5").evaluation.budgets == [50, 0.5]
    for wrong in ("5%", "[a]", "[true]"):
        text = message(tmp_path, MINIMAL, f"evaluation.budgets={wrong}")
        assert "expected a count of examples, such as 50, or a share of the pool, such as 0.05" in text
    for wrong in ("0", "1.5", "[.nan]", "-1", "50.0"):
        text = message(tmp_path, MINIMAL, f"evaluation.budgets={wrong}")
        assert text.count("a count of examples is at least 1, a share of the pool above 0 and at most 1") == 1
    assert "listed twice" in message(tmp_path, MINIMAL, "evaluation.budgets=[50, 50]")
    assert load(tmp_path, MINIMAL, "pursuit.checkpoints=[3, 1]").pursuit.checkpoints == [1, 3]
    assert "a checkpoint is listed twice" in message(tmp_path, MINIMAL, "pursuit.checkpoints=[1, 1]")
    assert "expected at least one entry" in message(tmp_path, MINIMAL, "pursuit.checkpoints=[]")


def test_both_budgets(tmp_path: Path) -> None:
    text = message(tmp_path, MINIMAL, "selection.k=3", "selection.fraction=0.1")
    assert text == (
        "--selection.k, --selection.fraction: 'selection': k and fraction are both given: give one of them, and null "
        "for the other, as in --selection.fraction null"
    )


def test_the_content_of_a_section_is_not_printed(tmp_path: Path) -> None:
    for override in ("warmup.trajectory=a", "model.layers=.*", "selection.k=3", "data.pool={a: 1}"):
        text = message(
            tmp_path, MINIMAL, override, "warmup.epochs=9", "model.lora.r=4", "selection.fraction=0.1", "data.target=5"
        )
        assert "{" not in text


def test_missing_sections_and_keys(tmp_path: Path) -> None:
    text = message(tmp_path, "seed: 1\n")
    assert "'model' is missing and has no default" in text
    assert "'data' is missing and has no default" in text
    assert "'data.target' is missing" in message(tmp_path, "model: {path: m}\ndata: {pool: p}\n")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just text\n", "5\n"])
def test_not_sections(tmp_path: Path, text: str) -> None:
    assert "expected sections such as 'model:'" in message(tmp_path, text)


@pytest.mark.parametrize("text", ["a: [1\n", "a: b: c\n", "\ta: 1\n", "a: 2024-13-45\n", "a: \x01\n"])
def test_not_yaml(tmp_path: Path, text: str) -> None:
    found = message(tmp_path, text)
    assert "c.yaml: not valid YAML" in found
    assert "\n" not in found


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="not a file"):
        load_config(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "b.yaml")


def test_bad_flags(tmp_path: Path) -> None:
    assert "flag '--warmup.epochs' has no value" in message(tmp_path, MINIMAL, "warmup.epochs")
    assert "'path' is a value, not a section" in message(tmp_path, MINIMAL, "model.path.x=1")
    assert "expected section.key" in message(tmp_path, MINIMAL, "=1")
    assert load(tmp_path, MINIMAL, "run_dir=[a").run_dir == "[a"
    assert load(tmp_path, MINIMAL, "run_dir=2024-13-45").run_dir == "2024-13-45"


def test_a_value_that_fits_no_member_of_a_union_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build_section(BudgetRequest, {"k": 0}, "export")
    assert str(caught.value) == "'export.k' = 0: Input should be greater than or equal to 1, or 'auto'"


def test_build_config_names_its_origin() -> None:
    tree: dict[Any, Any] = {"model": {"path": "m"}, "data": {"pool": "p", "target": "t"}, 5: 1}
    with pytest.raises(ConfigError, match="the flags: "):
        build_config(tree, "the flags")


def test_every_field_is_documented() -> None:
    def check(section: Any) -> None:
        assert section.__doc__
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                check(inner)
            else:
                assert field.description, f"{section.__name__}.{name}"

    check(RunConfig)


def test_nearest_and_the_hierarchy() -> None:
    assert nearest("gpt", ["omp", "gtp"]) == "did you mean 'gtp'? known: gtp, omp"
    assert nearest("zzzzz", ["omp", "gtp"]) == "known: gtp, omp"
    assert issubclass(ConfigError, GradPursuitError)
    assert GradPursuitError.exit_code == 2
