"""The sections of a configuration: what every stage goes by, and the whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from gradpursuit.config.data import DataSection
from gradpursuit.config.values import (
    OWN,
    Budget,
    Fraction,
    Names,
    Number,
    Section,
    Whole,
    listed,
    target_name,
    without_secrets,
)
from gradpursuit.remote import is_url

PreconditionerName = Literal["adam-symmetric", "adam", "adam-centered", "identity"]


class LoraSection(Section):
    """The adapter that is trained and whose gradients are followed."""

    r: Whole = Field(8, ge=1, le=65_536, description="rank of the adapter")
    alpha: Whole = Field(16, ge=1, le=2**20, description="LoRA alpha; the adapter's output is scaled by alpha / r")
    target_modules: str | list[str] = Field(
        "all-linear", description="'all-linear', a list of module names, or a regular expression"
    )
    rslora: bool = Field(False, description="scale the adapter's output by alpha / sqrt(r) instead (rsLoRA)")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_or_expression(cls, value: Any) -> Any:
        return listed(value) if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", str(value)) else value


class ModelSection(Section):
    """Which causal language model, and how it is computed."""

    path: str = Field(description="folder, hub id, or a GGUF file of a causal language model")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    trust_remote_code: bool = Field(
        False, description="run the Python code that comes with the model's files; only for models that you trust"
    )
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

    @field_validator("path")
    @classmethod
    def _no_secrets(cls, value: str) -> str:
        return without_secrets(value, "the URL of a model") if is_url(value) else value

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


class WarmupSection(Section):
    """The short training run that is followed: one made here, or, with `trajectory`, one that you already have."""

    trajectory: Names = Field(
        default_factory=list,
        description="checkpoint folders of a training run you already have, oldest first, or one folder that holds "
        "checkpoint-*; all of them are followed, nothing is trained, and no other setting of this section may be given",
    )
    fraction: Fraction = Field(0.1, description="share of the pool to train on, drawn with the seed")
    epochs: Whole = Field(3, ge=1, le=10_000, description="passes over that share")
    checkpoints: Whole = Field(3, ge=1, le=10_000, description="T: checkpoints kept, evenly spaced over the steps")
    batch_size: Whole = Field(8, ge=1, le=2**20, description="examples per optimizer step")
    learning_rate: Number = Field(2e-4, gt=0, le=10, description="peak learning rate of AdamW, linear decay")

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
    dim: Whole = Field(4096, ge=16, le=2**20, description="d: size of the sketched feature")
    nonzeros: Whole = Field(2, ge=1, le=64, description="rows of the sketch that every coordinate goes to")
    tokens_per_batch: Whole = Field(1024, ge=16, le=2**24, description="padded tokens in one backward pass")
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
        return without_secrets(value, "the URL of the store") if value and is_url(value) else value


class MatchingSection(Section):
    """Of features and target, the problem that is pursued."""

    normalize: Literal["unit", "unit-before", "none"] = Field(
        "unit",
        description="norm of each row at each checkpoint; unit-before: one before the row is projected onto a "
        "subspace, where its length then tells how much of it lies there",
    )
    balance: bool = Field(True, description="divide every checkpoint by the norm of its target")
    checkpoints: list[Annotated[Whole, Field(ge=1)]] | None = Field(
        None, min_length=1, description="numbers, from 1, of the checkpoints that count; null: all"
    )
    subspace: Literal["none", "target", "pool"] = Field(
        "none",
        description="project the features of every checkpoint onto the top right singular "
        "vectors of the target's or of the pool's features there",
    )
    rank: Whole = Field(
        32, ge=1, le=65_536, description="r: dimensions of that subspace; fewer where features have fewer"
    )

    @field_validator("checkpoints", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return [value]
        found = listed(value)
        return [int(name) if name.isdecimal() else name for name in found] if isinstance(value, str) else found

    @field_validator("checkpoints")
    @classmethod
    def _in_order(cls, value: list[int] | None) -> list[int] | None:
        if value and len(set(value)) != len(value):
            raise ValueError("a checkpoint is listed twice")
        return sorted(value) if value else value


class PursuitSection(MatchingSection):
    """The joint selection."""

    alpha: Number = Field(0.3, ge=0, le=1e6, description="ridge, relative to the mean squared column norm")
    targets: Literal["mean", "balanced", "split"] = Field(
        "mean",
        description="several target groups (files): pursue the mean of their means, all with one support, or each with "
        "its share of the budget",
    )
    max_iter: Whole = Field(50, ge=1, le=10**6, description="pursuit iterations per layer")
    tol: Number | None = Field(
        None, ge=0, le=1, description="smallest relative improvement of the objective to go on; null: by the budget"
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
        le=65_536,
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
    k: Whole | None = Field(None, ge=1, le=2**31 - 1, description="examples to choose; or give a fraction")
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
            raise ValueError(
                "k and fraction are both given: give one of them, and null for the other, as in "
                "--selection.fraction null"
            )
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
    seeds: Whole = Field(
        3, ge=1, le=1000, description="fine-tuning runs per subset; stochastic strategies draw anew for each"
    )
    steps: Whole | None = Field(
        None,
        ge=1,
        le=10**7,
        description="optimizer steps of equal-steps; null: `epochs` passes over the largest budget",
    )
    epochs: Whole = Field(3, ge=1, le=10_000, description="passes of equal-epochs over the k examples of a budget")
    batch_size: Whole = Field(8, ge=1, le=2**20, description="examples per optimizer step")
    learning_rate: Number = Field(5e-4, gt=0, le=10, description="peak learning rate of AdamW, linear decay")
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
    """Where gradients and pursuits are computed; what they give depends on it by rounding alone."""

    name: Literal["local", "ray"] = Field("local", description="this process, or workers of a Ray cluster")
    address: str | None = Field(
        None,
        description="host:port of the cluster's head, or 'auto' for the one that runs on this machine; null: start one "
        "on this machine, for this command alone",
    )
    workers: Whole | None = Field(
        None, ge=1, le=10_000, description="worker processes; null: as many as there is room for"
    )
    cpus: Whole = Field(1, ge=1, le=4096, description="cores of each worker")

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None and without_secrets(value, "the address") != "auto":
            port = re.fullmatch(r"(?:[^\s/:]+|\[[0-9a-fA-F:.]+\]):(\d+)", value)
            if port is None or not 0 < int(port[1]) < 2**16:
                raise ValueError("expected host:port of the cluster's head, as `ray start` tells it, or 'auto'")
        return value

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> EngineSection:
        if self.address is not None and self.name == "local":
            raise ValueError("address is given, but name is 'local': say --engine ray")
        return self


class RunConfig(Section):
    """Everything that determines a run; saved, resolved, as `config.yaml` in the run folder."""

    run_dir: str | None = Field(None, min_length=1, description="the run folder; default runs/<name of the file>")
    seed: Whole = Field(0, ge=0, le=2**32 - 1, description="the one seed; every use derives its own from it")
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
