"""The card of a data set: what a subset is, where it is from, and how to train on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from gradpursuit import __version__
from gradpursuit.files import sha256_of, write_text
from gradpursuit.selection.subset import Subset, write_rows

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_SOURCE = "https://arxiv.org/abs/2410.16710"


@dataclass(frozen=True)
class Origin:
    """Where a subset comes from.

    Attributes:
        strategy: that chose.
        budget: in words.
        model: whose gradients it followed.
        target: what was chosen for, in words.
        pool: rows of every source of the cleaned pool, by the names that :class:`Subset` uses.
        seed: of the run.
    """

    strategy: str
    budget: str
    model: str
    target: str
    pool: Mapping[str, int]
    seed: int


def write_subset(folder: Path, subset: Subset, origin: Origin, total: int | None = None) -> dict[str, Any]:
    """Write every file of a subset into `folder`: its rows (:func:`write_rows`) and `README.md`, the card.

    Args:
        folder: gets them.
        subset: the rows.
        origin: for the card.
        total: rows of the repeats file; None: four times the chosen ones.

    Returns:
        Figures: rows, tokens, rows of the repeats file, rows by source, columns of which something is to be said.
    """
    repeats = subset.repeats(total)
    as_text = write_rows(folder, subset, repeats)
    content = sha256_of(folder / "selected.parquet")
    write_text(folder / "README.md", card(subset, origin, repeats, as_text, content))
    return {
        "rows": len(subset.rows),
        "tokens": subset.tokens,
        "repeated": int(repeats.sum()),
        "sources": subset.mix,
        "columns_left_out": subset.left_out,
        "columns_as_text": as_text,
    }


def card(subset: Subset, origin: Origin, repeats: NDArray[np.int64], as_text: Sequence[str], content: str) -> str:
    """The text of the card: YAML that `datasets` and the hub read, and Markdown for people.

    `datasets` caches what it loads under the names of the folder and of the configuration, so folders of one name would
    be taken for one another: the configuration is named after the content, the sha256 (hex) of its file.
    """
    rows = len(subset.rows)
    head = {
        "pretty_name": f"{rows} rows chosen by gradpursuit ({origin.strategy})",
        "tags": ["gradpursuit", "data-selection"],
        "size_categories": [next((name for most, name in _SIZES if rows < most), "n>1M")],
        "configs": [{"config_name": f"rows-{content[:16]}", "data_files": "selected.parquet"}],
    }
    parts = [_facts(subset, origin), _sources(subset, origin), _columns(subset, as_text), _files(subset, repeats)]
    text = "\n\n".join([f"# {_plain(str(head['pretty_name']))}", *parts, _END])
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n{text}\n"


def _facts(subset: Subset, origin: Origin) -> str:
    tokens = subset.tokens
    return (
        f"{len(subset.rows):,} of {sum(origin.pool.values()):,} rows of a pool, chosen for {_plain(origin.target)} "
        f"with the strategy {_code(origin.strategy)} of gradpursuit {__version__} "
        f"([method]({_SOURCE})) and the model {_code(origin.model)}, seed {origin.seed}.\n"
        f"Budget: {_plain(origin.budget)}. The rows hold {tokens['total']:,} tokens, {tokens['supervised']:,} of them "
        f"supervised."
    )


def _sources(subset: Subset, origin: Origin) -> str:
    lines = [
        f"| {_plain(name)} | {count:,} | {subset.mix.get(name, 0):,} |"
        for name, count in sorted(origin.pool.items(), key=lambda item: (-subset.mix.get(item[0], 0), item[0]))
    ]
    return "\n".join(["## Sources", "", "| source | rows of the pool | chosen |", "|---|---:|---:|", *lines])


def _columns(subset: Subset, as_text: Sequence[str]) -> str:
    lines = [
        "Every row has its id and all columns that it had, and",
        "",
        "* `weight`: what its loss is to be multiplied by; 1 on average,",
        "* `rank`: from 1, the best; `layer`: above 1 for rows chosen after the first layer had matched the target,",
        f"* `{subset.source_column or 'source'}`: where it is from; `duplicate_of`: the id of an earlier row of the "
        "pool with the same text.",
    ]
    if subset.left_out:
        lines += ["", f"The rows have {_names(subset.left_out)} of their own, which stayed as they were."]
    if as_text:
        lines += [
            "",
            f"In `selected.parquet` and `dataset/`, {_names(as_text)} hold JSON text, as their types differ or a "
            "table would change them.",
        ]
    return "\n".join(["## Columns", "", *lines])


def _files(subset: Subset, repeats: NDArray[np.int64]) -> str:
    total = int(repeats.sum())
    exact = total * subset.weights / subset.weights.sum()
    return f"""## Files

`selected.jsonl`, `selected.parquet` and `dataset/` hold the same rows:

```python
from datasets import load_dataset, load_from_disk

rows = load_dataset("json", data_files="selected.jsonl", split="train")
rows = load_dataset("parquet", data_files="selected.parquet", split="train")
rows = load_from_disk("dataset")
```

Where `prompt` and `completion` are strings, they were rendered with the chat template, as a user's and an assistant's \
message; TRL does so with lists of messages only.

A plain trainer ignores `weight`. `gradpursuit.WeightedTrainer` uses it; any other gets `repeated.jsonl`: {total:,} \
whole rows, each as often (`repeats`, from {int(repeats.min())} to {int(repeats.max())}) as its weight says, to within \
{float(np.abs(repeats - exact).max()):.2f} repeats. One pass over it stands for {total / len(subset.rows):g} passes \
over the weighted rows."""


_END = """## Limits

Chosen for one target and model: for others these rows need not be better than any. The licence is that of the pool."""


def _names(columns: Sequence[str]) -> str:
    return ", ".join(map(_code, columns))


def _code(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _plain(text: str) -> str:
    """Text from outside as one line without meaning in Markdown."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in " ".join(text.split()))
