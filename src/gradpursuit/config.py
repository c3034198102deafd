"""The configuration of a run: frozen sections with documented fields, read from YAML, overridden by flags.

YAML and command line build the same objects; an unknown key or a wrong value is refused with the place,
the cause and the nearest right name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gradpursuit.errors import ConfigError, nearest
from gradpursuit.remote import is_url, require_no_secrets

_SECRET = "secret"  # the type of an error whose value is not repeated
PreconditionerName = Literal["adam-symmetric", "adam", "adam-centered", "identity"]


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


Whole = Annotated[int, Strict()]  # without it `true` would be 1 and `2.0` would be 2
Number = Annotated[float, BeforeValidator(_no_truth_value)]  # not strict: YAML takes 2e-4 for text
Fraction = Annotated[Number, Field(gt=0, le=1)]


def _without_secrets(value: str, what: str) -> str:
    try:
        return require_no_secrets(value, what)
    except ValueError as error:
        raise PydanticCustomError(_SECRET, "{reason}", {"reason": str(error)}) from None


def target_name(name: str) -> str:
    """`name`, if it can be the name of an added target: of a folder, and of a flag's value that YAML reads as text.

    Raises:
        ValueError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", name) or not isinstance(yaml.safe_load(name), str):
        raise ValueError(
            "the name of a target is a letter followed by at most 63 letters, digits, '-' or '_', and no word that "
            "YAML takes for a value (true, no, null, ...)"
        )
    return name


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraSection(Section):
    """The adapter that is trained and whose gradients are followed."""

    r: Whole = Field(8, ge=1, description="rank of the adapter")
    alpha: Whole = Field(16, ge=1, description="LoRA alpha; the adapter's output is scaled by alpha / r")
    target_modules: str | list[str] = Field(
        "all-linear", description="'all-linear', a regular expression, or a list of module names"
    )
    rslora: bool = Field(False, description="scale the adapter's output by alpha / sqrt(r) instead (rsLoRA)")


class ModelSection(Section):
    """Which causal language model, and how it is computed."""

    path: str = Field(description="folder, hub id, or a GGUF file of a causal language model")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    device: str = Field("auto", description="'auto' (CUDA when there is one), 'cpu' or 'cuda'")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="arithmetic of forward and backward; weights and gradients stay float32. "
        "'auto': bfloat16 autocast where the processor has instructions for it",
    )
    layers: str | None = Field(
        None,
        description="instead of an adapter: train and follow the weights of these linear layers of the model itself; "
        "a regular expression that must match the whole name of a module, as in '.*mlp\\.down_proj'",
    )
    lora: LoraSection | None = Field(LoraSection(), description="the adapter; null exactly when `layers` is given")

    @model_validator(mode="before")
    @classmethod
    def _an_adapter_unless_layers(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("lora") is not None:
            return value
        return {**value, "lora": {} if value.get("layers") is None else None}

    @field_validator("layers")
    @classmethod
    def _expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> ModelSection:
        if self.layers is not None and self.lora is not None:
            raise ValueError("layers and lora are both given: leave lora out (or null) to train layers of the model")
        return self


class DataSection(Section):
    """The examples to choose from and the examples of the task that matters."""

    pool: list[str] = Field(description="JSONL file or files of the pool")
    target: list[str] = Field(description="JSONL file or files of the target: a few dozen examples")
    heldout: list[str] = Field(
        default_factory=list, description="target examples for scoring only; empty: split off from the target"
    )
    max_tokens: Whole = Field(1024, ge=8, description="longer rows are dropped, never cut")
    max_dropped: Number = Field(
        0.5, ge=0, le=1, description="share of a file's rows that may be dropped before it is an error"
    )

    @field_validator("pool", "target", "heldout", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class WarmupSection(Section):
    """The short training run that is followed: one made here, or, with `trajectory`, one that you already have."""

    trajectory: list[str] = Field(
        default_factory=list,
        description="checkpoint folders of a training run you already have, oldest first, or one folder that holds "
        "checkpoint-*; all of them are followed, nothing is trained, and no other setting of this section may be given",
    )
    fraction: Fraction = Field(0.1, description="share of the pool to train on, drawn with the seed")
    epochs: Whole = Field(3, ge=1, description="passes over that share")
    checkpoints: Whole = Field(3, ge=1, description="T: checkpoints kept, evenly spaced over the steps")
    batch_size: Whole = Field(8, ge=1, description="examples per optimizer step")
    learning_rate: Number = Field(2e-4, gt=0, description="peak learning rate of AdamW, linear decay")

    @field_validator("trajectory", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _nothing_is_trained(self) -> WarmupSection:
        fields = {name: field.default for name, field in type(self).model_fields.items() if name != "trajectory"}
        changed = [name for name, default in fields.items() if getattr(self, name) != default]
        if self.trajectory and changed:
            raise ValueError(f"with trajectory nothing is trained, so leave out {', '.join(changed)}")
        return self


class GradientsSection(Section):
    """Features of pool and target at every checkpoint."""

    preconditioner: PreconditionerName = Field(
        "adam-symmetric", description="what turns a gradient into the direction the optimizer would move"
    )
    dim: Whole = Field(4096, ge=16, description="d: size of the sketched feature")
    nonzeros: Whole = Field(2, ge=1, description="rows of the sketch that every coordinate goes to")
    tokens_per_batch: Whole = Field(1024, ge=16, description="padded tokens in one backward pass")
    store_dtype: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        "float32", description="element type on disk: 4, 2, 2 or 1 bytes"
    )
    max_dropped: Number = Field(
        0.01, ge=0, le=1, description="share of the rows that may have no gradient (not finite, or too long for memory)"
    )
    shard_rows: Whole = Field(512, ge=1, le=4096, description="rows per shard: what a killed run can lose")
    store: str | None = Field(
        None,
        description="where the features are kept: a folder, or a URL that fsspec knows, such as s3://bucket/my-run; "
        "null: in the run folder. Keys come from the environment, never from the URL",
    )

    @field_validator("store")
    @classmethod
    def _no_secrets(cls, value: str | None) -> str | None:
        return _without_secrets(value, "the URL of the store") if value and is_url(value) else value


class PursuitSection(Section):
    """The joint selection."""

    alpha: Number = Field(0.3, ge=0, description="ridge, relative to the mean squared column norm")
    normalize: Literal["unit", "none"] = Field("unit", description="norm of each row at each checkpoint")
    balance: bool = Field(True, description="divide every checkpoint by the norm of its target")
    max_iter: Whole = Field(50, ge=1, description="pursuit iterations per layer")
    tol: Number | None = Field(
        None, ge=0, description="smallest relative improvement of the objective to go on; null: by the budget"
    )
    saturation: Literal["layers", "stop"] = Field(
        "layers", description="what to do when fewer than k examples fit: pursue again without them, or stop"
    )
    max_coherence: Number | None = Field(
        0.999, gt=0, le=1, description="examples whose features have at least this cosine are copies"
    )
    parts: Whole = Field(
        1,
        ge=1,
        description="above 1, on Ray: the pool is cut into so many parts, each is pursued by itself, and then the "
        "winners of all; one round of communication, not the exact answer",
    )


class SelectionSection(Section):
    """Which strategies choose, and how many examples."""

    strategies: list[str] = Field(["gtp", "less", "random"], min_length=1, description="what to compare")
    k: Whole | None = Field(None, ge=1, description="examples to choose; or give a fraction")
    fraction: Fraction | None = Field(None, description="share of the cleaned pool to choose; or give k")
    target: str | None = Field(
        None, description="a target that `gradpursuit target add` added to the run; null: the one of data.target"
    )

    @field_validator("strategies", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("target")
    @classmethod
    def _usable_name(cls, value: str | None) -> str | None:
        return value if value is None else target_name(value)

    @model_validator(mode="after")
    def _one_budget(self) -> SelectionSection:
        if self.k is not None and self.fraction is not None:
            raise ValueError("k and fraction are both given: give one of them")
        if len(set(self.strategies)) != len(self.strategies):
            raise ValueError("a strategy is listed twice")
        return self


class EvaluationSection(Section):
    """Fine-tuning on every subset and scoring on held-out target examples."""

    seeds: Whole = Field(2, ge=1, description="fine-tuning runs per strategy")
    epochs: Whole = Field(3, ge=1, description="passes over the k examples; the same steps for every strategy")
    batch_size: Whole = Field(8, ge=1, description="examples per optimizer step")
    learning_rate: Number = Field(5e-4, gt=0, description="peak learning rate of AdamW, linear decay")
    use_weights: bool = Field(False, description="multiply each example's loss by its weight (mean 1)")
    holdout: Number = Field(0.3, gt=0, lt=1, description="share of the target set aside when data.heldout is empty")


class EngineSection(Section):
    """Where gradients and pursuits are computed; what they give does not depend on it."""

    name: Literal["local", "ray"] = Field("local", description="this process, or workers of a Ray cluster")
    address: str | None = Field(
        None,
        description="host:port of the cluster's head, or 'auto' for the one that runs on this machine; null: start one "
        "on this machine, for this command alone",
    )
    workers: Whole | None = Field(None, ge=1, description="worker processes; null: as many as there is room for")
    cpus: Whole = Field(1, ge=1, description="cores of each worker")

    @field_validator("address")
    @classmethod
    def _no_secrets(cls, value: str | None) -> str | None:
        return value if value is None else _without_secrets(value, "the address")

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> EngineSection:
        if self.address is not None and self.name == "local":
            raise ValueError("address is given, but name is 'local': say --engine ray")
        return self


class RunConfig(Section):
    """Everything that determines a run; saved, resolved, as `config.yaml` in the run folder."""

    run_dir: str | None = Field(None, description="the run folder; default runs/<name of the config file>")
    seed: Whole = Field(0, ge=0, description="the one seed; every use derives its own from it")
    model: ModelSection
    data: DataSection
    warmup: WarmupSection = WarmupSection()
    gradients: GradientsSection = GradientsSection()
    pursuit: PursuitSection = PursuitSection()
    selection: SelectionSection = SelectionSection()
    evaluation: EvaluationSection = EvaluationSection()
    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _parts_on_a_cluster(self) -> RunConfig:
        if self.pursuit.parts > 1 and self.engine.name == "local":
            raise ValueError(
                f"pursuit.parts is {self.pursuit.parts}, but one machine has one part: leave it out, or say --engine "
                "ray"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_adapter(self) -> RunConfig:
        if self.warmup.trajectory and self.model.lora not in (None, LoraSection()):
            raise ValueError(
                "model.lora and warmup.trajectory are both given: the adapter there has settings of its own, which "
                "are used; leave model.lora out"
            )
        return self

    def dump(self) -> str:
        """The resolved configuration as YAML, which :func:`load_config` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path` (YAML), apply `section.key=value` overrides, and validate.

    Relative paths in the file are taken relative to the working directory, as on the command line.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is not usable.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' and 'data:', found {type(tree).__name__}")
    apply_overrides(tree, overrides)
    return build_config(tree, str(path), overrides)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping after looking for repeated keys."""
        names = [(key.value, key.start_mark.line + 1) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, (name, line) in enumerate(names):
            if name in [earlier for earlier, _ in names[:index]]:
                raise ConfigError(f"line {line}: the key '{name}' is given twice")
        return super().construct_mapping(node, deep)


def build_config(tree: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Validate a nested mapping; `where` names its origin in messages, `overrides` what came from flags instead.

    Raises:
        ConfigError: with one line per wrong key or value.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        flags = [override.partition("=")[0] for override in overrides]
        lines = [f"{_origin(item['loc'], flags, where)}: {_explain(dict(item))}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _origin(loc: tuple[int | str, ...], flags: Sequence[str], where: str) -> str:
    """Where a wrong value was given: the flag that set it (or set what is around it or in it), else `where`."""
    keys = [str(part) for part in loc]
    around = {".".join(keys[:length]) for length in range(1, len(keys) + 1)}
    inside = ".".join(keys) + "."
    named = [f"--{flag}" for flag in dict.fromkeys(flags) if flag in around or flag.startswith(inside)]
    return ", ".join(named) or where


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `section.key=value` in a configuration tree; values are read as YAML.

    Raises:
        ConfigError: an override has no value, or names a value as if it were a section.
    """
    for override in overrides:
        _apply_override(tree, override)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in `tree`; the value is read as YAML, so 5, true and [a, b] mean what they say."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"flag '--{key}' has no value: write --{key} VALUE")
    *sections, name = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"flag '--{key}': '{section}' is a value, not a section")
    try:
        tree[name] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        tree[name] = text


def _explain(item: dict[str, Any]) -> str:
    """One line for one pydantic error: key, value, cause and fix."""
    keys = [str(part) for part in item["loc"]]
    key = ".".join(keys)
    if item["type"] == _SECRET:
        return f"'{key}': {item['msg']}"
    if item["type"] == "extra_forbidden":
        section = _section_at(keys[:-1])
        parent = ".".join(keys[:-1])
        place = f" in section '{parent}'" if parent else ""
        return f"unknown key '{keys[-1]}'{place}; {nearest(keys[-1], section.model_fields)}"
    if item["type"] == "missing":
        return f"'{key}' is missing and has no default"
    if not key:
        return str(item["msg"].removeprefix("Value error, "))
    message = {
        "model_type": "expected a section with keys of its own",
        "list_type": "expected a list, such as [a, b]",
    }.get(item["type"], item["msg"].removeprefix("Value error, "))
    return f"'{key}' = {item['input']!r}: {message}"


def _section_at(keys: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for key in keys:
        annotation = section.model_fields[key].annotation
        kinds = get_args(annotation) or (annotation,)  # a section, or `Section | None`
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return section
