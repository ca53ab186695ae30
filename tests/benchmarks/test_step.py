"""One optimiser step in every way: all of them compute the same loss."""

import json

import pytest

from benchmarks import step
from benchmarks.__main__ import main

FOUND = [
    {"way": "fast", "tokens": 192, "seconds": 2.0, "peak_bytes": 2**30},
    {"way": "fast", "tokens": 192, "seconds": 1.0, "peak_bytes": 2**31},
    {"way": "fast", "tokens": 192, "seconds": 1.5, "peak_bytes": 2**30},
    {"way": "peft", "tokens": 192, "seconds": 3.0, "peak_bytes": 2**30},
    {"way": "fast", "tokens": 514, "seconds": 4.0, "peak_bytes": 2**30},
    {"way": "peft", "tokens": 514, "failed": "out of memory"},
]


def test_the_table_holds_medians_ratios_and_what_failed():
    assert step.table(FOUND).splitlines()[2:] == [
        "| 192 | 1.500 s (1.00), 2.0 GiB | 3.000 s (2.00), 1.0 GiB |",
        "| 514 | 4.000 s (1.00), 1.0 GiB | failed |",
    ]


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["--ways", "fast,slow"], "--ways slow is not known"),
        (["--tokens", "192,none"], "--tokens 192,none is not allowed"),
        (["--steps", "1"], "--steps 1 is not allowed"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_measured(capsys, monkeypatch, arguments, telling):
    monkeypatch.setattr("benchmarks.machine.measure", lambda: pytest.fail("measured"))
    assert main(["step", *arguments]) == 1
    assert telling in capsys.readouterr().err


@pytest.mark.integration
def test_all_ways_start_from_the_same_loss(tiny_model, tmp_path):
    output = tmp_path / "step.json"
    asked = ["--tokens", "48", "--sequences", "2", "--steps", "3", "--rank", "8", "--runs", "1"]
    assert main(["step", "--model", str(tiny_model), *asked, "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    runs = {run["way"]: run for run in written["runs"]}
    assert set(runs) == set(step.WAYS)
    first = {way: run["losses"][0] for way, run in runs.items()}
    close = 1e-5 if written["machine"]["dtype"] == "float32" else 5e-3  # bfloat16 has 8 bits
    assert first == pytest.approx(dict.fromkeys(step.WAYS, first["fast"]), rel=close)
    assert all(run["losses"][-1] < run["losses"][0] for run in runs.values())
