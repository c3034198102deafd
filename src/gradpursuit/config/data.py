"""The section `data`: where the examples come from, and what is dropped of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_serializer, model_validator

from gradpursuit.config.values import Number, Section, Whole, listed, without_secrets
from gradpursuit.remote import is_url

Turns = Literal["assistant", "last-turn", "full"]
ColumnName = Literal[
    "id",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "text",
    "tools",
]


class SourceSection(Section):
    """Where rows come from; a plain path stands for one with nothing else given."""

    path: str = Field(
        min_length=1, description="file, glob, folder that datasets.save_to_disk wrote, or hub id (owner/name)"
    )
    name: str | None = Field(
        None, min_length=1, description="what its rows are counted and grouped under; default: the path of each file"
    )
    split: str | None = Field(None, description="of a hub id (default: train) or of a saved DatasetDict")
    subset: str | None = Field(None, description="configuration of a hub data set")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    columns: dict[ColumnName, str | None] | None = Field(
        None, description="as data.columns, for this source alone: which column holds what"
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("path", "name")
    @classmethod
    def _no_secrets(cls, value: str | None) -> str | None:
        return without_secrets(value, "the URL of a source") if value and is_url(value) else value

    @model_serializer
    def _shortest(self) -> str | dict[str, Any]:
        given = {name: value for name, value in self if value is not None}
        return self.path if set(given) == {"path"} else given

    @property
    def options(self) -> dict[str, Any]:
        """What is given beside the path."""
        return {name: value for name, value in self if value is not None and name != "path"}


def _source_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else listed(value)


Sources = Annotated[list[SourceSection], BeforeValidator(_source_list)]  # a mapping alone is a list of one


class DataSection(Section):
    """The examples to choose from and the examples of the task that matters."""

    pool: Sources = Field(description="where the pool comes from: one source or several")
    target: Sources | None = Field(
        description="where the target comes from: a few dozen examples, every name (or file) is a group; null or "
        "'pool': no target but the pool itself, whose mean gradient is what the chosen rows are to reproduce "
        "(in-domain selection)"
    )
    heldout: Sources = Field(
        default_factory=list,
        description="examples for scoring only; empty: split off from the target (in-domain: from the pool)",
    )
    columns: dict[ColumnName, str | None] = Field(
        default_factory=dict,
        description="which column holds what, where it is not called so: {prompt: question}; null: not read, "
        "as in {tools: null}",
    )
    turns: Turns = Field(
        "assistant", description="what is supervised: every assistant turn, the last one alone, or all tokens"
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="a file with a Jinja chat template, or the template itself, used instead of the tokenizer's own; "
        "null: the tokenizer's",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="variables for the chat template, such as {enable_thinking: false}"
    )
    deduplicate: Literal["exact", "folded", "near", "none"] = Field(
        "exact",
        description="keep one of the pool rows with the same tokens and labels (exact), with the same text up to case "
        "and white space (folded), or with nearly the same (near); or keep all (none)",
    )
    near_threshold: Number = Field(
        0.8, gt=0, lt=1, description="Jaccard similarity of three-word shingles from which rows are near duplicates"
    )
    leaks: Literal["remove", "keep"] = Field(
        "remove", description="pool rows that hold the text of a target or held-out row"
    )
    leak_coverage: Number | None = Field(
        0.5,
        gt=0,
        le=1,
        description="share of that text from which a part of it, in runs of eight words, counts; null: the whole alone",
    )
    max_tokens: Whole = Field(1024, ge=8, le=2**22, description="longer rows are dropped, never cut")
    max_dropped: Number = Field(
        0.5, ge=0, le=1, description="share of a split's rows that may be unusable before it is an error"
    )

    @property
    def in_domain(self) -> bool:
        """Whether the pool is its own target."""
        return self.target is None

    @field_validator("target", mode="before")
    @classmethod
    def _the_pool_is_none(cls, value: Any) -> Any:
        return None if value == "pool" else value
