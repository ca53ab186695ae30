"""The worked example of task_configs/README.md, and README.md's from Python: word for word but for the model."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "task_configs" / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def block(language, containing):
    (found,) = [text for kind, text in BLOCKS if kind == language and containing in text]
    return found


def test_the_table_of_keys_is_complete():
    from ttt_harness.config import TaskSettings

    keys = re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert keys == [*TaskSettings.names(), "choices"]


def test_every_yaml_of_the_guide_is_read():
    for kind, text in BLOCKS:
        if kind == "yaml":
            assert yaml.safe_load(text.replace("!function ", ""))


@pytest.mark.integration
def test_the_worked_example_works(tiny_model, tmp_path, monkeypatch, capfd):
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import _index

    from ttt_harness.cli import main

    folder = tmp_path / "my_tasks"
    folder.mkdir()
    (folder / "capitals.jsonl").write_text(block("jsonl", "France"), encoding="utf-8")
    (folder / "capitals.yaml").write_text(block("yaml", "capitals.jsonl"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTT_CACHE_DIR", str(tmp_path / "cache"))
    # Reading lm-eval's own ten thousand files takes 10 s a command and proves nothing here.
    read = _index.TaskIndex._iter_yaml_files
    own = staticmethod(lambda root: read(root) if root.name == "my_tasks" else [])
    monkeypatch.setattr(_index.TaskIndex, "_iter_yaml_files", own)
    # The engine of the other tests, so that it is not started again for each command.
    small = f"pretrained={tiny_model},enable_lora=True,max_lora_rank=8,max_model_len=2048,dtype=float32"
    small += ",lora_rank=8,lr=1e-2,num_permutations=4"
    *runs, compare = block("", "lm_eval validate").splitlines()
    for command in runs:
        monkeypatch.setattr(sys, "argv", shlex.split(command.replace("pretrained=embedded", small)))
        cli_evaluate()
    said = capfd.readouterr()
    assert "All tasks found and valid" in said.out
    assert "Country: " in said.out + said.err  # --write_out
    assert main(shlex.split(compare)[1:]) == 0
    table = capfd.readouterr().out
    assert "capitals" in table
    assert "TTT" in table
    (samples,) = (tmp_path / "out" / "ttt").rglob("samples_capitals_*.jsonl")
    assert len(samples.read_text().splitlines()) == 7


@pytest.mark.integration
def test_the_example_from_python_works(tiny_model, tmp_path, monkeypatch, capfd):
    from lm_eval.tasks import _index

    monkeypatch.setenv("TTT_CACHE_DIR", str(tmp_path / "cache"))
    read = _index.TaskIndex._iter_yaml_files
    own = staticmethod(lambda root: read(root) if root.name == "task_configs" else [])
    monkeypatch.setattr(_index.TaskIndex, "_iter_yaml_files", own)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    small = {"pretrained": str(tiny_model), "enable_lora": True, "max_lora_rank": 8, "max_model_len": 2048}
    small |= {"dtype": "float32", "lora_rank": 8, "lr": 1e-2, "k": 3}
    assert '{"pretrained": "embedded", ' in code
    code = code.replace('{"pretrained": "embedded", ', "{**small, ")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__", "small": small})
    accuracy, loss = re.findall(r"^(?:accuracy|loss of the fit) (\S+)$", capfd.readouterr().out, re.MULTILINE)
    assert 0 <= float(accuracy) <= 1
    assert float(loss) > 0
