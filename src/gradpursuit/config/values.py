"""What sections are made of: the section itself, and kinds of values that YAML and flags write alike."""

from __future__ import annotations

import re
from fractions import Fraction as Ratio
from math import ceil
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

from gradpursuit.remote import require_no_secrets

SECRET = "secret"  # the type of an error whose value is not repeated


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def listed(value: Any) -> Any:
    """A text as the list that it means: its parts between commas; a name that holds a comma needs a list of its own."""
    if not isinstance(value, str):
        return value
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise ValueError("a name is empty; one that holds a comma itself is written ['a,b']")
    return names


Names = Annotated[list[str], BeforeValidator(listed)]
Whole = Annotated[int, Strict()]  # without it `true` would be 1 and `2.0` would be 2
Number = Annotated[float, BeforeValidator(_no_truth_value)]  # not strict: YAML takes 2e-4 for text
Fraction = Annotated[Number, Field(gt=0, le=1)]


def without_secrets(value: str, what: str) -> str:
    """`value`, a URL or an address, if it carries no credentials."""
    try:
        return require_no_secrets(value, what)
    except ValueError as error:
        raise PydanticCustomError(SECRET, "{reason}", {"reason": str(error)}) from None


def _budget(value: Any) -> Any:
    """A count of examples (an integer) or a share of the pool (anything else that is a number)."""
    expected = "expected a count of examples, such as 50, or a share of the pool, such as 0.05"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(expected)
    try:
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        number = float(number) if isinstance(number, str) else number
    except ValueError:
        raise ValueError(expected) from None
    if not 0 < number < 2**31 or (isinstance(number, float) and number > 1):
        raise ValueError("a count of examples is at least 1, a share of the pool above 0 and at most 1")
    return number


Budget = Annotated[int | float, BeforeValidator(_budget)]


def rows_of(budget: float, rows: int) -> int:
    """A budget in rows: a count as it is, a share of `rows` rounded up, as if it had been written as a ratio."""
    return budget if isinstance(budget, int) else ceil(Ratio(str(budget)) * rows)


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
    if name in (OWN, "pool"):
        raise ValueError(f"'{name}' is what the run's own {'target' if name == OWN else 'pool'} is called")
    return name


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
