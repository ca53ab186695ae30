"""Grid files: what they may hold, and that everything else is one sentence."""

from pathlib import Path

import pytest

from ttt_harness import cli
from ttt_harness.sweep.grid_file import read_grid_file

HEAD = "methods: icl\nseeds: 42\noutput_path: out\nmodel_args: {pretrained: m}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_a_file_may_hold_all_that_a_grid_needs(tmp_path):
    grid = "grid:\n- {lr: 1e-4, epochs: 1}\n- &b {lr: 3e-4, epochs: [1, 3]}\n- *b\n"
    (tmp_path / "grid.yaml").write_text(f"{grid}log_samples: true\nsystem_instruction: 'x'\n")
    assert read_grid_file(tmp_path / "grid.yaml") == {
        "grid": [{"lr": "1e-4", "epochs": 1}, *([{"lr": "3e-4", "epochs": [1, 3]}] * 2)],
        "log_samples": True,
        "system_instruction": "x",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: 3", "--tasks 3 is not allowed: in --config it must be a text or a list."),
        ("tasks: {a: b}", "--tasks {'a': 'b'} is not allowed"),
        ("tasks: [a, 3]", "tasks=['a', 3] is not allowed: write names of tasks."),
        ("tasks: [[a]]", "tasks=[['a']] is not allowed"),
        ("tasks: []", "tasks is missing"),
        ("tasks: t\nlimit: ten", "--limit 'ten' is not allowed"),
        ("tasks: t\nlimit: true", "--limit True is not allowed: in --config it must be a number."),
        ("tasks: t\nlimit: 0", "--limit 0 is not allowed"),
        ("tasks: t\nlimit: -1", "--limit -1 is not allowed"),
        ("tasks: t\nlimit: .nan", "--limit nan is not allowed"),
        ("tasks: t\nlimit: [4]", "--limit [4] is not allowed"),
        ("tasks: t\nlog_samples: 3", "--log_samples 3 is not allowed: in --config it must be true or false."),
        ("tasks: t\nlog_samples: 'yes'", "--log_samples 'yes' is not allowed"),
        ("tasks: t\nsystem_instruction: 3", "--system_instruction 3 is not allowed: in --config it must be a text."),
        ("tasks: t\nmetadata: 3", "--metadata 3 is not allowed: in --config it must be a text or keys with values."),
        ("tasks: t\nmetadata: [k, 3]", "--metadata ['k', 3] is not allowed"),
        ("tasks: t\ngen_kwargs: 1", "--gen_kwargs 1 is not allowed"),
        ("tasks: t\nseed: abc", "--seed 'abc' is not allowed"),
        ("tasks: t\nsamples: 3", "--samples 3 is not allowed"),
        ("tasks: t\nmax_batch_size: 1.5", "--max_batch_size 1.5 is not allowed"),
        ("tasks: t\nhf_hub_log_args: {nonsense: 1}", "unexpected keyword argument 'nonsense'"),
        ("1: 2", "'1' in line 5 is none"),
        ("true: 2", "'true' in line 5 is none"),
        ("metadata: {1: 2}", "'1' in line 5 is none"),
        ("metadata: {[a]: 2}", "'sequence' in line 5 is none"),
        ("null: 2", "'null' in line 5 is none"),
        ("seeds: 43", "gives 'seeds' twice, in line 5 again"),
        ("metadata: {k: 1, k: 2}", "gives 'k' twice"),
        (f"limit: {'9' * 5000}", "has 5000 digits"),
        (f"metadata: {{k: {'9' * 5000}}}", "has 5000 digits"),
        (f"limit: 0x{'f' * 5000}", "digits"),
        ("tasks: 2026-01-01", "such: '2026-01-01' in line 5 (timestamp)"),
        ("tasks: !!set {a, b}", "such: in line 5 (set)"),
        ("tasks: !!omap [a: 1]", "such: in line 5 (omap)"),
        ("tasks: !!binary aGVsbG8=", "(binary)"),
        ("tasks: !!python/object/apply:os.system [ls]", "such: in line 5"),
        (BOMB, "holds more than 10000 values"),
        (MERGES, "holds more than 10000 values"),
        ("a: &a [*a]", "is nested too deeply"),
        (f"a: {'[' * 50}{']' * 50}", "is nested too deeply"),
        (f"a: {'[' * 5000}{']' * 5000}", "is nested too deeply"),
        ("a: [", "is not YAML"),
        ("a: *b", "is not YAML"),
        ("---\na: 1", "is not YAML"),
        ("methodss: icl", "methodss in --config is neither methods, nor seeds, nor grid"),
        ("grid: 3\ntasks: t", "grid: 3 is not allowed: write axes"),
        ("grid: []\ntasks: t", "grid=[] is not allowed"),
        ("grid: {}\ntasks: t", "grid: {} is not allowed"),
        ("grid: [lr]\ntasks: t", "grid: lr is not allowed"),
        ("grid: {lr: }\ntasks: t", "lr=None is not allowed"),
        ("grid: {lr: {a: 1}}\ntasks: t", "lr={'a': 1} is not allowed"),
        ("grid: {lr: [[1e-4]]}\ntasks: t", "lr=['1e-4'] is not allowed"),
        ("grid: {lr: true}\ntasks: t", "lr=True is not allowed"),
    ],
)
def test_bad_input_is_one_sentence(text, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(HEAD + text + "\n")
    assert cli.main(["sweep", "--config", "grid.yaml"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 500
    assert any(part in error for part in said.split("|")), error
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("methods: 3\nseeds: 1", "3 is not a method"),
        ("methods: true\nseeds: 1", "methods=True is not allowed"),
        ("methods: {icl: 1}\nseeds: 1", "methods={'icl': 1} is not allowed"),
        ("methods: [[icl]]\nseeds: 1", "methods=['icl'] is not allowed"),
        ("methods: icl\nseeds: ten", "seeds=ten is not allowed"),
        ("methods: icl\nseeds: -1", "seeds=-1 is not allowed"),
        ("methods: icl\nseeds: 1.5", "seeds=1.5 is not allowed"),
        ("methods: icl\nseeds: '99999999999999999999999999999'", "seeds=99999999999999999999999999999 is not allowed"),
        (f"methods: icl\nseeds: '{'9' * 5000}'", "seeds=999"),
        (f"methods: '{'x' * 5000}'\nseeds: 1", "is not a method"),
        ("methods: icl\nseeds: 1\noutput_path: 3", "--output_path 3 is not allowed: in --config it must be a text."),
        ("methods: icl\nseeds: 1\nmodel_args: 3", "--model_args 3 is not allowed"),
        ("methods: icl\nseeds: 1\nmodel_args: 0", "--model_args 0 is not allowed"),
        ("methods: icl\nseeds: 1\nmodel_args: [a]", "--model_args ['a'] is not allowed"),
        ("methods: icl\nseeds: 1\nmodel: hf\nmodel_args: {pretrained: m}", "--model is not an option of a sweep"),
    ],
)
def test_bad_methods_seeds_and_options_are_one_sentence(head, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = "" if "output_path" in head else "\noutput_path: out"
    Path("grid.yaml").write_text(f"{head}\ntasks: t{out}\n")
    assert cli.main(["sweep", "--config", "grid.yaml"]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert len(error) < 500


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \x00", b""])
def test_a_file_that_is_no_text(content, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_bytes(content)
    assert cli.main(["sweep", "--config", str(tmp_path / "grid.yaml")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_in_a_file_s_place(tmp_path, capsys):
    assert cli.main(["sweep", "--config", str(tmp_path)]) == 1
    assert "cannot be read: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit", "ten"], "--limit 'ten' is not allowed"),
        (["--limit", "9" * 5000], "--limit inf is not allowed"),
        (["--num_fewshot", "many"], "--num_fewshot 'many' is not allowed"),
        (["--samples", "{x"], "--samples '{x' is not allowed"),
        (["--seed", "a,b"], "--seed 'a,b' is not allowed"),
        (["--model_args", f"pretrained=m,lr={'9' * 5000}"], "lr=|digits|not allowed"),
        (["--model_args", "pretrained"], "--model_args"),
        (["--model_args", "{'pretrained': 1}"], "JSON"),
        (["--gen_kwargs", "temperature"], "--gen_kwargs"),
        (["--tasks"], "--tasks/-t: expected at least one argument"),
        (["--limit"], "--limit/-L: expected one argument"),
        (["--seeds", "9" * 5000], "seeds=999"),
        (["--hf_hub_log_args", "nonsense=1"], "unexpected keyword argument"),
    ],
)
def test_bad_options_are_one_sentence(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    grid = {"--methods": "icl", "--seeds": "1", "--tasks": "t", "--model_args": "pretrained=m", "--output_path": "out"}
    given = [word for pair in grid.items() if pair[0] not in options for word in pair]
    assert cli.main(["sweep", *given, *options]) == 1
    error = capsys.readouterr().err
    assert any(part in error for part in said.split("|")), error
    assert error.count("\n") == 1
    assert len(error) < 700
    assert not list(tmp_path.iterdir())
