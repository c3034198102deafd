"""How fast the pursuit is, and how good what it finds, beside other solvers and beside its own reading of the rows.

    python benchmarks/pursuit.py compare --cords VENV/bin/python --omp-gpu VENV/bin/python --out pursuit.json
    python benchmarks/pursuit.py scale --folder DISK --cords VENV/bin/python --out pursuit.json    # 17.7 GB on disk
    python benchmarks/pursuit.py growth --plot pursuit-growth.png --out pursuit.json       # needs matplotlib
    python benchmarks/pursuit.py features RUN --out pursuit.json                           # real features of a run

compare   GTP, non-negative OMP, scikit-learn, CORDS and OMP-GPU on the same problems in memory at the same k
scale     GTP on a memory-mapped float16 store of N = 270,000, D = 32,768 at k = 13,500; CORDS there is computed
growth    time against N and against D, with a plot
features  residuals of GTP and of non-negative OMP on the features that a run collected, in all types of storage

A solver that would take more than --limit seconds is timed at smaller k, doubling, and its time at the wanted k is
computed from the growth of its cost per iteration; such times are marked "computed". Every part goes into the same
JSON file and replaces only itself there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import scipy
import sklearn
from pursuit_parts import compare, features, growth, scale
from pursuit_parts.solving import threads

from store import machine

PARTS = {"compare": compare, "scale": scale, "growth": growth, "features": features}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="part", required=True)
    for name, part in PARTS.items():
        command = commands.add_parser(name, help=(part.__doc__ or "").partition(": ")[2].rstrip(".\n"))
        command.add_argument("--out", type=Path, help="file for the figures as JSON")
        part.add_arguments(command)
    arguments = parser.parse_args()
    described = {**machine(threads()), "scipy": scipy.__version__, "scikit-learn": sklearn.__version__}
    print(json.dumps(described), flush=True)
    found = PARTS[arguments.part].run(arguments)
    if arguments.out:
        merge(arguments.out, arguments.part, {"machine": described, **found})


def merge(path: Path, part: str, found: dict[str, Any]) -> None:
    """Put a part into the file, beside the others that are there."""
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[part] = found
    path.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
