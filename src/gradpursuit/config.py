"""The configuration of a run: frozen sections with documented fields, read from YAML, overridden by flags.

YAML and command line build the same objects; an unknown key or a wrong value is refused with the place,
the cause and the nearest right name. A list of names may also be written as one text with commas.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

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
from gradpursuit.tree import apply_overrides, read_tree

_SECRET = "secret"  # the type of an error whose value is not repeated
PreconditionerName = Literal["adam-symmetric", "adam", "adam-centered", "identity"]


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def _listed(value: Any) -> Any:
    """A text as the list that it means: its parts between commas; a name that holds a comma needs a list of its own."""
    if not isinstance(value, str):
        return value
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise ValueError("a name is empty; one that holds a comma itself is written ['a,b']")
    return names


Names = Annotated[list[str], BeforeValidator(_listed)]
Whole = Annotated[int, Strict()]  # without it `true` would be 1 and `2.0` would be 2
Number = Annotated[float, BeforeValidator(_no_truth_value)]  # not strict: YAML takes 2e-4 for text
Fraction = Annotated[Number, Field(gt=0, le=1)]


def _without_secrets(value: str, what: str) -> str:
    try:
        return require_no_secrets(value, what)
    except ValueError as error:
        raise PydanticCustomError(_SECRET, "{reason}", {"reason": str(error)}) from None


def _budget(value: Any) -> Any:
    """A count of examples (an integer) or a share of the pool (anything else that is a number)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("expected a count of examples, such as 50, or a share of the pool, such as 0.05")
    number = value if isinstance(value, int) else float(value)
    if number <= 0 or (isinstance(number, float) and number > 1):
        raise ValueError("a count of examples is at least 1, a share of the pool above 0 and at most 1")
    return number


Budget = Annotated[int | float, BeforeValidator(_budget)]
OWN = "own"  # the target of data.target, among those that were added


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
    if name == OWN:
        raise ValueError(f"'{OWN}' is what the run's own target is called")
    return name


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraSection(Section):
    """The adapter that is trained and whose gradients are followed."""

    r: Whole = Field(8, ge=1, description="rank of the adapter")
    alpha: Whole = Field(16, ge=1, description="LoRA alpha; the adapter's output is scaled by alpha / r")
    target_modules: str | list[str] = Field(
        "all-linear", description="'all-linear', a list of module names, or a regular expression"
    )
    rslora: bool = Field(False, description="scale the adapter's output by alpha / sqrt(r) instead (rsLoRA)")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_or_expression(cls, value: Any) -> Any:
        return _listed(value) if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", str(value)) else value


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
        others = {name: setting for name, setting in value.items() if name != "lora"}
        return others if value.get("layers") is None else {**others, "lora": None}

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

    pool: Names = Field(description="JSONL file or files of the pool")
    target: Names | None = Field(
        description="JSONL file or files of the target: a few dozen examples; null or 'pool': no target but the "
        "pool itself, whose mean gradient is what the chosen rows are to reproduce (in-domain selection)"
    )
    heldout: Names = Field(
        default_factory=list,
        description="examples for scoring only; empty: split off from the target (in-domain: from the pool)",
    )
    max_tokens: Whole = Field(1024, ge=8, description="longer rows are dropped, never cut")
    max_dropped: Number = Field(
        0.5, ge=0, le=1, description="share of a file's rows that may be dropped before it is an error"
    )

    @property
    def in_domain(self) -> bool:
        """Whether the pool is its own target."""
        return self.target is None

    @field_validator("target", mode="before")
    @classmethod
    def _the_pool_is_none(cls, value: Any) -> Any:
        return None if value == "pool" else value


class WarmupSection(Section):
    """The short training run that is followed: one made here, or, with `trajectory`, one that you already have."""

    trajectory: Names = Field(
        default_factory=list,
        description="checkpoint folders of a training run you already have, oldest first, or one folder that holds "
        "checkpoint-*; all of them are followed, nothing is trained, and no other setting of this section may be given",
    )
    fraction: Fraction = Field(0.1, description="share of the pool to train on, drawn with the seed")
    epochs: Whole = Field(3, ge=1, description="passes over that share")
    checkpoints: Whole = Field(3, ge=1, description="T: checkpoints kept, evenly spaced over the steps")
    batch_size: Whole = Field(8, ge=1, description="examples per optimizer step")
    learning_rate: Number = Field(2e-4, gt=0, description="peak learning rate of AdamW, linear decay")

    @model_validator(mode="after")
    def _nothing_is_trained(self) -> WarmupSection:
        given = [name for name in type(self).model_fields if name in self.model_fields_set - {"trajectory"}]
        if self.trajectory and given:
            raise ValueError(f"with trajectory nothing is trained, so leave out {', '.join(given)}")
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


class MatchingSection(Section):
    """Of features and target, the problem that is pursued."""

    normalize: Literal["unit", "unit-before", "none"] = Field(
        "unit",
        description="norm of each row at each checkpoint; unit-before: one before the row is projected onto a "
        "subspace, where its length then tells how much of it lies there",
    )
    balance: bool = Field(True, description="divide every checkpoint by the norm of its target")
    subspace: Literal["none", "target", "pool"] = Field(
        "none",
        description="project the features of every checkpoint onto the top right singular "
        "vectors of the target's or of the pool's features there",
    )
    rank: Whole = Field(32, ge=1, description="r: dimensions of that subspace; fewer where the features have fewer")


class PursuitSection(MatchingSection):
    """The joint selection."""

    alpha: Number = Field(0.3, ge=0, description="ridge, relative to the mean squared column norm")
    targets: Literal["mean", "balanced", "split"] = Field(
        "mean",
        description="several target groups (files): pursue the mean of their means, all with one support, or each with "
        "its share of the budget",
    )
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

    strategies: Names = Field(["gtp", "less", "random"], min_length=1, description="what to compare")
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="settings of single strategies: {less: {reducer: mean}} re-sets one that exists, {mine: {selector: "
        "topk, preconditioner: adam}} makes a new one that `strategies` can name",
    )
    k: Whole | None = Field(None, ge=1, description="examples to choose; or give a fraction")
    fraction: Fraction | None = Field(None, description="share of the cleaned pool to choose; or give k")
    target: str | None = Field(
        None, description="a target that `gradpursuit target add` added to the run; null: the one of data.target"
    )

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
    """Fine-tuning on every subset and scoring on held-out target examples: strategies × budgets × protocols × seeds."""

    strategies: list[str] = Field(
        default_factory=list, description="those of selection.strategies to compare, the reference first; empty: all"
    )
    targets: list[str] = Field(
        default_factory=list,
        description=f"added targets to choose for and to score ('{OWN}': that of data.target); empty: selection.target",
    )
    budgets: list[Budget] = Field(
        default_factory=list,
        description="examples to choose: counts (50) or shares of the pool (0.05); empty: the budget of the selection",
    )
    protocols: list[Literal["equal-steps", "equal-epochs"]] = Field(
        ["equal-steps"], min_length=1, description="how long to train: every budget equally long, or by its size"
    )
    endpoints: list[Literal["base", "full"]] = Field(
        ["base", "full"], description="what to compare with: the untouched model, training on the full pool"
    )
    accuracy: bool = Field(
        False, description="also multiple-choice accuracy of held-out rows with `choices`; needs gradpursuit[eval]"
    )
    crossed: bool = Field(False, description="score every subset on all targets: do the others gain from it as well?")
    seeds: Whole = Field(3, ge=1, description="fine-tuning runs per subset; stochastic strategies draw anew for each")
    steps: Whole | None = Field(
        None, ge=1, description="optimizer steps of equal-steps; null: `epochs` passes over the largest budget"
    )
    epochs: Whole = Field(3, ge=1, description="passes of equal-epochs over the k examples of a budget")
    batch_size: Whole = Field(8, ge=1, description="examples per optimizer step")
    learning_rate: Number = Field(5e-4, gt=0, description="peak learning rate of AdamW, linear decay")
    use_weights: bool = Field(False, description="multiply each example's loss by its weight (mean 1)")
    holdout: Number = Field(
        0.3,
        gt=0,
        lt=1,
        description="share of the target (in-domain: of the pool) set aside when data.heldout is empty",
    )

    @field_validator("strategies", "targets", "budgets", "protocols", "endpoints", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return [value]
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("strategies", "targets", "budgets", "protocols", "endpoints")
    @classmethod
    def _none_twice(cls, value: list[Any]) -> list[Any]:
        if len(set(map(repr, value))) != len(value):
            raise ValueError("an entry is listed twice")
        return value

    @field_validator("targets")
    @classmethod
    def _usable_names(cls, value: list[str]) -> list[str]:
        return [name if name == OWN else target_name(name) for name in value]


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
    def _compared_strategies_are_selected(self) -> RunConfig:
        unknown = [name for name in self.evaluation.strategies if name not in self.selection.strategies]
        if unknown:
            raise ValueError(
                f"evaluation.strategies: {', '.join(unknown)} not among selection.strategies "
                f"({', '.join(self.selection.strategies)}), which choose"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_adapter(self) -> RunConfig:
        if self.warmup.trajectory and self.model.lora is not None and "lora" in self.model.model_fields_set:
            raise ValueError(
                "model.lora and warmup.trajectory are both given: the adapter there has settings of its own, which "
                "are used; leave model.lora out"
            )
        return self

    def dump(self) -> str:
        """The resolved configuration as YAML, which :func:`load_config` reads back to an equal object.

        Settings that a given trajectory makes meaningless, and which may not be given beside it, are left out.
        """
        tree = self.model_dump(mode="json")
        if self.warmup.trajectory:
            tree["warmup"] = {"trajectory": self.warmup.trajectory}
            if self.model.lora is not None:
                del tree["model"]["lora"]
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path` (YAML), apply `section.key=value` overrides, and validate.

    Relative paths in the file are taken relative to the working directory, as on the command line.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is not usable.
    """
    tree = read_tree(path)
    apply_overrides(tree, overrides)
    return build_config(tree, str(path), overrides)


def build_config(tree: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Validate a nested mapping; `where` names its origin in messages, `overrides` what came from flags instead.

    Raises:
        ConfigError: with one line per wrong key or value.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        flags = [override.partition("=")[0] for override in overrides]
        lines = [f"{_origin(item['loc'], flags, where)}: {_explain(dict(item), RunConfig)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


SectionT = TypeVar("SectionT", bound=BaseModel)


def build_section(kind: type[SectionT], values: Mapping[str, Any], within: str) -> SectionT:
    """Validate values as a section of their own, which lies at the key `within` of the configuration.

    Raises:
        ConfigError: with one line per wrong key or value.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(dict(item), kind, within) for item in error.errors())) from None


def _origin(loc: tuple[int | str, ...], flags: Sequence[str], where: str) -> str:
    """Where a wrong value was given: the flag that set it (or set what is around it or in it), else `where`."""
    keys = [str(part) for part in loc]
    around = {".".join(keys[:length]) for length in range(1, len(keys) + 1)}
    inside = ".".join(keys) + "."
    named = [f"--{flag}" for flag in dict.fromkeys(flags) if flag in around or flag.startswith(inside)]
    return ", ".join(named) or where


def _explain(item: dict[str, Any], root: type[BaseModel], within: str = "") -> str:
    """One line for one pydantic error of a `root` at the key `within`: key, value, cause and fix."""
    keys = [str(part) for part in item["loc"]]
    above = [within] if within else []
    key = ".".join([*above, *keys])
    if item["type"] == _SECRET:
        return f"'{key}': {item['msg']}"
    if item["type"] == "extra_forbidden":
        section = _section_at(root, keys[:-1])
        parent = ".".join([*above, *keys[:-1]])
        place = f" in section '{parent}'" if parent else ""
        return f"unknown key '{keys[-1]}'{place}; {nearest(keys[-1], section.model_fields)}"
    if item["type"] == "missing":
        return f"'{key}' is missing and has no default"
    if not keys:
        return (f"{within}: " if within else "") + str(item["msg"].removeprefix("Value error, "))
    message = {
        "model_type": "expected a section with keys of its own",
        "list_type": "expected a list, such as [a, b]",
    }.get(item["type"], item["msg"].removeprefix("Value error, "))
    if not key:
        return str(message)
    if isinstance(item["input"], Mapping):  # a section: the message says which of its keys are in the way
        return f"'{key}': {message}"
    return f"'{key}' = {item['input']!r}: {message}"


def _section_at(section: type[BaseModel], keys: Sequence[str]) -> type[BaseModel]:
    for key in keys:
        annotation = section.model_fields[key].annotation
        kinds = get_args(annotation) or (annotation,)  # a section, or `Section | None`
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return section
