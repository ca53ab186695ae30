"""Sweeps over settings: what is an axis, which setting is best, and whether that is more than chance."""

import json

import numpy as np
import pytest

from tests.report.runs import ttt, write_run
from ttt_harness import cli
from ttt_harness.errors import ReportError
from ttt_harness.report.axes import varied
from ttt_harness.report.results import find_runs
from ttt_harness.report.summary import read

TASKS = ["t_one", "t_two"]


def write(folder, share, *, seed=42, draw=0, method="ttt", samples=True, group="g", k=10, n=80, **settings):
    """A run whose answers are right with probability `share`; equal `draw`s draw alike."""
    rng = np.random.default_rng([draw, seed])
    scores = {task: [float(x) for x in rng.random(n) < share] for task in TASKS}
    facts = ttt(TASKS, method=method, seed=seed, k=k, **settings)
    metadata = {"seed": seed, "k": k}
    return write_run(
        folder, scores, source="ttt_vllm", ttt=facts, metadata=metadata, samples=samples, group=group, shots=k
    )


def grid(folder, shares, seeds=(42, 43), **options):
    """Runs of each learning rate."""
    for lr, share in shares.items():
        for seed in seeds:
            write(folder / f"lr={lr}" / f"seed{seed}", share, seed=seed, lr=lr, **options)


def test_what_differs_besides_the_seed_is_an_axis(tmp_path):
    grid(tmp_path, {1e-4: 0.5, 3e-4: 0.5})
    write(tmp_path / "epochs", 0.5, lr=1e-4, epochs=3)
    assert varied(find_runs(tmp_path)) == ["epochs", "lr"]


def test_seeds_models_folders_and_devices_are_no_axes(tmp_path):
    write(tmp_path / "a", 0.5, seed=42, model_dir="/x/model", device="cpu")
    write(tmp_path / "b", 0.5, seed=43, model_dir="/y/model", device="cuda:0")
    assert varied(find_runs(tmp_path)) == []


def test_what_older_results_do_not_state_is_no_axis(tmp_path):
    write(tmp_path / "a", 0.5, seed=42)
    write(tmp_path / "b", 0.5, seed=43, new_setting=True)
    assert varied(find_runs(tmp_path)) == []


def test_another_k_is_one_axis(tmp_path):
    for k in (5, 10):
        write(tmp_path / f"{k}", 0.5, k=k)
    assert varied(find_runs(tmp_path)) == ["k"]


def test_one_row_for_each_setting_in_the_order_of_the_values(tmp_path):
    grid(tmp_path, {1e-3: 0.5, 5e-5: 0.5, 3e-4: 0.5})
    write(tmp_path / "icl", 0.5, method="icl")
    assert read([tmp_path]).labels == ["icl", "ttt, lr=5e-05", "ttt, lr=0.0003", "ttt, lr=0.001"]


def test_runs_that_differ_in_the_seed_alone_are_no_sweep(tmp_path):
    grid(tmp_path, {1e-4: 0.5})
    assert read([tmp_path]).sweeps == ()


def test_a_clear_best(tmp_path):
    grid(tmp_path, {1e-4: 0.3, 3e-4: 0.8, 1e-3: 0.4})
    (sweep,) = read([tmp_path]).sweeps
    assert sweep.best.settings == {"lr": 3e-4}
    assert not any(rival.within_noise for rival in sweep.rivals)
    assert sweep.verdict == "ttt: lr=0.0003 has the best g of 3 settings, and is clearly better than all 2 others."


def test_a_best_within_noise_is_said_to_be(tmp_path):
    for draw, lr in enumerate((1e-4, 3e-4, 1e-3)):
        write(tmp_path / f"{lr}", 0.5, lr=lr, draw=draw)
    (sweep,) = read([tmp_path]).sweeps
    assert all(rival.within_noise for rival in sweep.rivals)
    assert "within noise of all others: these runs do not tell which setting is best" in sweep.verdict


def test_noise_is_rarely_taken_for_a_lead(tmp_path):
    """Of 40 sweeps over three settings that do nothing, at most a few have a leader, as 5 % says for each best."""
    leaders = 0
    for trial in range(40):
        folder = tmp_path / str(trial)
        for i, lr in enumerate((1e-4, 3e-4, 1e-3)):
            write(folder / f"{lr}", 0.5, lr=lr, draw=1000 + 3 * trial + i, n=40)
        (sweep,) = read([folder]).sweeps
        leaders += not any(rival.within_noise for rival in sweep.rivals)
    assert leaders <= 5


def test_some_are_within_noise(tmp_path):
    grid(tmp_path, {1e-4: 0.1, 3e-4: 0.8, 1e-3: 0.8})  # of the same draw: the same questions are right
    (sweep,) = read([tmp_path]).sweeps
    assert [rival.within_noise for rival in sweep.rivals] == [
        rival.point.settings["lr"] != 1e-4 for rival in sweep.rivals
    ]
    assert "within noise of lr=0.00" in sweep.verdict


def test_without_samples_the_standard_errors_tell(tmp_path):
    grid(tmp_path, {1e-4: 0.2, 3e-4: 0.9}, samples=False)
    (sweep,) = read([tmp_path]).sweeps
    assert sweep.rivals[0].difference.test == "z_unpaired"
    assert not sweep.rivals[0].within_noise


def test_with_another_k_other_questions_are_asked(tmp_path):
    for k, n in ((5, 85), (10, 80)):
        write(tmp_path / f"{k}", k / 12, k=k, n=n)
    (sweep,) = read([tmp_path]).sweeps
    assert sweep.best.settings == {"k": 10}
    assert sweep.rivals[0].difference.test == "z_unpaired"


@pytest.mark.parametrize("seeds", [(42,), (42, 43, 44)])
def test_intervals_hold_their_score(tmp_path, seeds):
    grid(tmp_path, {1e-4: 0.4, 3e-4: 0.6}, seeds=seeds)
    (sweep,) = read([tmp_path]).sweeps
    assert [point.seeds for point in sweep.points] == [len(seeds)] * 2
    assert all(point.low < point.mean < point.high for point in sweep.points)


def test_two_axes(tmp_path):
    for lr in (1e-4, 3e-4):
        for epochs in (1, 3):
            write(tmp_path / f"{lr}-{epochs}", 0.5 + 0.1 * epochs, lr=lr, epochs=epochs)
    (sweep,) = read([tmp_path]).sweeps
    assert sweep.axes == ("epochs", "lr")
    assert (sweep.values("lr"), sweep.values("epochs")) == ([1e-4, 3e-4], [1, 3])


def test_tasks_without_a_group(tmp_path):
    grid(tmp_path, {1e-4: 0.4, 3e-4: 0.9}, group=None)
    (sweep,) = read([tmp_path]).sweeps
    assert sweep.name == "mean of tasks"
    assert sweep.best.settings == {"lr": 3e-4}


def test_the_table_marks_the_best(tmp_path, capsys):
    grid(tmp_path, {1e-4: 0.3, 3e-4: 0.8})
    assert cli.main(["summary", str(tmp_path), "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert "| ttt: lr | g | 95 % CI | seeds | from the best | p |" in out
    assert any("| best |" in line and line.startswith("| 0.0003 |") for line in out.splitlines())
    assert "- ttt: lr=0.0003 has the best g of 2 settings, and is clearly better than the other." in out


def test_json_states_the_sweep(tmp_path, capsys):
    grid(tmp_path, {1e-4: 0.3, 3e-4: 0.8})
    assert cli.main(["summary", str(tmp_path), "--format", "json"]) == 0
    (sweep,) = json.loads(capsys.readouterr().out)["sweeps"]
    assert sweep == {"method": "ttt", "axes": ["lr"], "name": "g", "best": {"lr": 3e-4}, "within_noise": []}


def test_json_states_settings_that_are_no_numbers(tmp_path, capsys):
    for i, lr in enumerate((float("inf"), [float("nan")], None, "x", 1e-4)):
        write(tmp_path / str(i), 0.5, lr=lr)
    assert cli.main(["summary", str(tmp_path), "--format", "json"]) == 0
    found = [row["settings"]["lr"] for row in json.loads(capsys.readouterr().out)["rows"] if row["name"] == "g"]
    assert found == [1e-4, "inf", None, "[nan]", "x"]


def test_other_texts_around_the_questions_are_no_axis(tmp_path):
    for name in ("a", "b"):
        path = write(tmp_path / name, 0.5)
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template_sha": name}))
    with pytest.raises(ReportError, match=r"the runs of ttt, seed 42, differ in chat_template_sha \(a, b\)"):
        read([tmp_path])
