"""Nothing of the user's files is run, and nothing in the data decides where anything is written."""

from __future__ import annotations

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from gradpursuit.cli import main
from gradpursuit.config import ModelSection, load_config
from gradpursuit.errors import ConfigError, ModelError
from gradpursuit.trajectory.model import load_model, load_tokenizer
from jobs import Job


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code-was-run"


def test_pickled_weights_are_not_unpickled(tiny_path: Path, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"lm_head.weight": Bomb(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(ModelSection(path=str(folder), device="cpu"))
    assert not mark.exists()


def test_pickles_are_no_data(job: Job, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pool.pkl", "pool.parquet", "pool.arrow", "pool.json", "pool.csv"):
        (job.folder / name).write_bytes(pickle.dumps([Bomb(mark)]))
        job.save(data={"pool": str(job.folder / name)})
        assert main(["inspect", str(job.path)]) == 2
        assert name in capsys.readouterr().err
    assert not mark.exists()


def test_code_beside_a_model_is_run_only_if_asked(tiny_path: Path, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_path, folder)
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (folder / "own.py").write_text(
        code + "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    (folder / "config.json").write_text(json.dumps(config))
    section = ModelSection(path=str(folder), device="cpu")
    with pytest.raises(
        ModelError, match=r"Python code of their own, which is not run; .* model.trust_remote_code: true"
    ):
        load_model(section)
    assert not mark.exists()
    trusted = load_model(section.model_copy(update={"trust_remote_code": True}))
    assert type(trusted).__name__ == "Own"
    assert mark.exists()


def test_code_beside_a_tokenizer_is_not_run(tiny_path: Path, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_path, folder)
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.update(tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with suppress(ModelError):  # it may as well find another class that reads tokenizer.json
        load_tokenizer(ModelSection(path=str(folder)))
    assert not mark.exists()


def test_yaml_makes_no_objects(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "c.yaml"
    for tag in ("python/object/apply:pathlib.Path.touch", "python/name:os.system", "python/object/new:os.system"):
        path.write_text(f"model: {{path: m}}\ndata: !!{tag} [{str(mark)!r}]\n")
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_config(path)
        path.write_text("model: {path: m}\ndata: {pool: p, target: t}\n")
        config = load_config(path, [f"model.path=!!{tag} [{str(mark)!r}]"])
        assert config.model.path.startswith("!!")  # the text itself
    assert not mark.exists()


def test_names_in_the_data_are_no_paths(job: Job) -> None:
    evil = ["../../evil", "/tmp/evil", "a/b", "..", "x\u0000y", "CON", "~"]
    rows = [{**job.row(i), "id": name, "file": name, "source": name} for i, name in enumerate(evil)]
    job.write("pool.jsonl", [*rows, *(job.row(i) for i in range(10, 30))])
    job.save(data={"pool": {"path": str(job.folder / "pool.jsonl"), "name": "../../evil"}})
    before = {path for path in job.folder.parent.rglob("*") if job.run_dir not in path.parents}
    assert main(["warmup", str(job.path)]) == 0
    after = {path for path in job.folder.parent.rglob("*") if job.run_dir not in path.parents}
    assert after - before <= {job.run_dir}
    assert {path.name for path in (job.run_dir / "data").iterdir()} == {
        "pool.parquet",
        "target.parquet",
        "heldout.parquet",
        "dropped.jsonl",
    }


def test_templates_of_models_run_in_a_sandbox(tiny_path: Path, tmp_path: Path, mark: Path) -> None:
    from gradpursuit.data import Renderer
    from gradpursuit.errors import DataError

    tokenizer = load_tokenizer(ModelSection(path=str(tiny_path)))
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    for template in (escape, "{% generation %}" + escape + "{% endgeneration %}"):
        tokenizer.chat_template = template
        with pytest.raises(DataError, match="the chat template refuses this conversation"):
            Renderer(tokenizer)([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    assert not mark.exists()
