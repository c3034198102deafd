"""Flip single bits in the files of a small run, and see whether `gradpursuit verify`, a report and the stages notice.

Each flip is one bit of one file, drawn by the seed, in a fresh copy of the run. `verify` must name the file (but for
log.txt, to which every command adds). After some of the flips a report and one stage command are run as well: each must
refuse, or make again what was damaged, so that its results are the same bytes as before.

    python benchmarks/flips.py                        # makes a run with a tiny model in runs/flips, then flips 400 bits
    python benchmarks/flips.py runs/quickstart        # of a run that is there; it is copied, never changed
    python benchmarks/flips.py --flips 40 --after 10  # fewer

Every flip is a line of the results file, so that a benchmark that was stopped goes on where it was. With the tiny run a
flip takes less than a second, and the commands after it some seconds more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from gradpursuit.cli import main as gradpursuit

VERBS = ("warmup", "collect", "select", "export", "budget", "compare")
UNSEEN = ("log.txt",)
TIMED = ("report.html", "report.json", "manifest.json", "config.yaml", "log.txt", ".lock", "evaluation/results.jsonl")


def main() -> int:
    """Flip, and print what was found; 1 if a flip was not."""
    text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=text[0], epilog=text[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="a finished run folder (default: a tiny one is made)")
    parser.add_argument("--flips", type=int, default=400, help="bits to flip, each on its own (default: %(default)s)")
    parser.add_argument("--after", type=int, default=400, help="flips followed by a report and a stage command")
    parser.add_argument("--seed", type=int, default=0, help="draws files, bytes and bits (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("flips.jsonl"), help="results (default: %(default)s)")
    arguments = parser.parse_args()
    run = (arguments.run or tiny_run(Path("runs/flips"))).resolve()
    lines = arguments.out.read_text(encoding="utf-8").splitlines() if arguments.out.is_file() else []
    done = {(line["run"], line["seed"], line["flip"]): line for line in map(json.loads, lines)}
    found = []
    with tempfile.TemporaryDirectory() as scratch, arguments.out.open("a", encoding="utf-8") as out:
        for number in range(arguments.flips):
            line = done.get((str(run), arguments.seed, number))
            if line is None or (number < arguments.after and "report" not in line):
                line = one_flip(run, Path(scratch), arguments.seed, number, after=number < arguments.after)
                out.write(json.dumps(line) + "\n")
                out.flush()
                print(json.dumps(line), file=sys.stderr)
            found.append(line)
    return summary(found)


def one_flip(run: Path, scratch: Path, seed: int, number: int, *, after: bool) -> dict[str, Any]:
    """Flip one bit in a copy of the run, and say what became of it."""
    draw = random.Random(f"{seed}-{number}")
    names = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    names = [name for name in names if (run / name).stat().st_size]
    name = draw.choice(names)
    byte, bit = draw.randrange((run / name).stat().st_size), draw.randrange(8)
    line = {"run": str(run), "seed": seed, "flip": number, "file": name, "byte": byte, "bit": bit}
    copy = scratch / "run"

    def damaged() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        content = bytearray((copy / name).read_bytes())
        content[byte] ^= 1 << bit
        (copy / name).write_bytes(content)

    damaged()
    code, said = command("verify", str(copy), "--sample", "0")
    line["found"] = code != 0 and str(copy / name) in said
    if after:
        before = {path: (run / path).read_bytes() for path in names if path not in (name, *TIMED)}
        page = content_of(run / "report.json")
        code, said = command("report", str(copy))
        if code:
            line["report"] = "refused" if str(copy / name) in said else f"refused without the name: {said[-300:]}"
        else:
            line["report"] = "same" if content_of(copy / "report.json") == page else "DIFFERENT"
        damaged()
        verb = draw.choice(VERBS)
        words = ["export", str(copy), "--k", "3"] if verb == "budget" else [verb, str(copy)]
        code, said = command(*words)
        changed = [path for path, content in before.items() if bytes_of(copy / path) != content]
        again = "made again" if bytes_of(copy / name) == (run / name).read_bytes() else "not used"
        line["verb"], line["result"] = verb, again if not changed else f"DIFFERENT: {', '.join(changed)}"
        if code:
            line["result"] = "refused" if str(copy / name) in said else f"refused without the name: {said[-300:]}"
    return line


def command(*words: str) -> tuple[int, str]:
    """Run one command of the program, quietly: its exit code and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = gradpursuit([*words, "--quiet"])
        except SystemExit as error:
            code = int(error.code or 0)
    return code, said.getvalue()


def content_of(path: Path) -> dict[str, Any]:
    """A report without the times, which are of the moment, and without the folder, which is a copy's."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    value.pop("timings", None)
    value["asked"].pop("run", None)
    value["asked"]["config"].pop("run_dir", None)
    value["provenance"].pop("stages", None)
    return value


def bytes_of(path: Path) -> bytes | None:
    """The bytes of a file; None if there is none."""
    return path.read_bytes() if path.is_file() else None


def summary(lines: list[dict[str, Any]]) -> int:
    """Print the figures; 1 if anything went unnoticed."""
    flips, found = Counter[str](), Counter[str]()
    for line in lines:
        kind = line["file"].partition("/")[0]
        flips[kind] += 1
        found[kind] += line["found"]
    for kind, count in sorted(flips.items()):
        print(f"{kind:<16} {found[kind]:>4} of {count:>4} found by verify")
    counted = [line for line in lines if line["file"] not in UNSEEN]
    missed = [line for line in counted if not line["found"]]
    print(f"all but log.txt: {len(counted) - len(missed)} of {len(counted)} found by verify")
    for part in ("report", "result"):
        outcomes = Counter(line[part].partition(":")[0] for line in lines if part in line)
        print(f"{'reports' if part == 'report' else 'stage commands'}: {dict(sorted(outcomes.items()))}")
    wrong = [line for line in lines if "DIFFERENT" in str(line.get("report")) + str(line.get("result"))]
    for line in (*missed, *wrong):
        print(f"not noticed: {json.dumps(line)}")
    return 1 if missed or wrong else 0


def tiny_run(folder: Path) -> Path:
    """A finished run with a tiny random model, an export of a smaller budget and an added target; made once."""
    run = folder / "run"
    if (run / "exports").is_dir() and (run / "targets").is_dir():
        return run
    folder.mkdir(parents=True, exist_ok=True)
    words = {"pool": ("plus", 0, 30), "target": ("times", 0, 6), "heldout": ("times", 6, 12), "other": ("minus", 0, 6)}
    for name, (word, first, last) in words.items():
        rows = [
            {"id": f"{word}-{i}", "prompt": f"What is {i} {word} {i % 7}?", "completion": f"It is {i * 3}."}
            for i in range(first, last)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    settings = {
        "run_dir": str(run.resolve()),
        "model": {"path": str(tiny_model(folder / "model").resolve()), "device": "cpu", "precision": "float32"},
        "data": {
            "max_tokens": 512,
            **{name: str((folder / f"{name}.jsonl").resolve()) for name in ("pool", "target", "heldout")},
        },
        "warmup": {"fraction": 0.4, "epochs": 2, "checkpoints": 2, "batch_size": 4, "learning_rate": 0.01},
        "gradients": {"dim": 256, "shard_rows": 8},
        "selection": {"strategies": ["gtp", "less", "random"], "k": 5},
        "evaluation": {"seeds": 1, "epochs": 1, "batch_size": 2, "budgets": [3]},
    }
    (folder / "job.yaml").write_text(json.dumps(settings), encoding="utf-8")
    for words_of in (
        ["target", "add", str(run), "--name", "other", "--file", str(folder / "other.jsonl")],
        ["export", str(run), "--k", "3"],
        ["report", str(run)],
    ):
        if not (run / "report.html").is_file() and gradpursuit(["run", str(folder / "job.yaml"), "--quiet"]):
            raise SystemExit("the tiny run could not be made")
        if gradpursuit([*words_of, "--quiet"]):
            raise SystemExit("the tiny run could not be made")
    return run


def tiny_model(folder: Path) -> Path:
    """A two-layer Llama with random weights and the tokenizer of SmolLM2, which is fetched once."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from gradpursuit.quickstart.assets import cache_folder, smollm2

    tokenizer = AutoTokenizer.from_pretrained(smollm2(cache_folder()))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
