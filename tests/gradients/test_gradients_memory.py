"""Too little memory, for real: processes of their own with a limit on their address space."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, logging, os, resource, sys, traceback
import torch
from tiny import build_lora, random_rows
from gradpursuit.gradients.engine import FeatureEngine
from gradpursuit.gradients.per_example import PerExampleGradients
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.gradients.sketch import SparseSketch
from gradpursuit.trajectory.checkpoint import AdamState
from gradpursuit.trajectory.model import Compute

torch.set_num_threads(1)
model = build_lora("llama")


def prepared(tokens):
    engine = FeatureEngine(model, Compute(torch.device("cpu"), None),
                           SparseSketch(PerExampleGradients(model).sizes, 64, 2, 5), tokens)
    engine.prepare([Preconditioner("identity")], AdamState({}, {}, 1, 0.9, 0.999, 1e-8))
    return engine


def compute(engine, lengths, limit_mb):
    messages = []
    logger = logging.getLogger("gradpursuit")
    logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: messages.append(record.getMessage())
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + limit_mb * 2**20, hard))
    done = []
    found = engine.compute(random_rows(lengths), done.append)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    rows = random_rows(lengths)
    alone = prepared(100).compute([rows[i] for i in found.kept], lambda _: None)
    difference = (found.kinds[0].features - alone.kinds[0].features).norm(dim=1) / alone.kinds[0].norm
    return {"kept": found.kept, "dropped": found.dropped, "done": sum(done), "messages": messages,
            "difference": float(difference.max())}


engine = prepared(10**6)
engine.compute(random_rows([8]), lambda _: None)  # what is allocated once is there before the limit
for name, arguments in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        try:
            print(json.dumps({name: compute(engine, *arguments)}), flush=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""
CASES = {
    "batch": ([200] * 128, 150),  # attention scores alone: 128 x 4 x 200 x 200 floats = 82 MB a tensor
    "row": ([20, 3000, 30], 150),  # one tensor of attention scores: 4 x 3000 x 3000 floats = 144 MB
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")


@pytest.fixture(scope="module")
def computed() -> dict[str, dict[str, object]]:
    """What was computed of each case, in a process with that many MB more than it has when it begins."""
    here = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r})\n{CHILD}", json.dumps(CASES)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: found for line in done.stdout.splitlines() for name, found in json.loads(line).items()}


def test_a_batch_that_does_not_fit_is_halved_and_goes_on(computed: dict[str, dict[str, object]]) -> None:
    found = computed["batch"]
    assert found["kept"] == list(range(128))
    assert found["dropped"] == {}
    assert found["done"] == 128
    messages = found["messages"]
    assert isinstance(messages, list)
    assert messages[0] == (
        "out of memory on cpu with 26624 tokens in a batch: gradients.tokens_per_batch is 13312 from here on"
    )
    assert float(str(found["difference"])) < 1e-4


def test_a_row_that_does_not_fit_alone_is_dropped(computed: dict[str, dict[str, object]]) -> None:
    found = computed["row"]
    assert found["kept"] == [0, 2]
    assert found["dropped"] == {"1": "out of memory on cpu with this row alone"}
    assert found["done"] == 3
