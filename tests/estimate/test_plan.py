"""The plan: tokens as the fit and the prompts have them, times that follow from them, and the fewest GPUs."""

import json
from itertools import pairwise

import pytest

from ttt_harness import cli
from ttt_harness.errors import ConfigError
from ttt_harness.estimate.cost import cost_of, fitted_once
from ttt_harness.estimate.plan import cheapest, seconds_of, spread_cells, spread_tasks
from ttt_harness.estimate.rates import Rates, measured_rates
from ttt_harness.estimate.tokens import TokenCounts, count_tokens
from ttt_harness.methods import SETTINGS
from ttt_harness.sweep.axes import parse_points
from ttt_harness.sweep.grid import cells_of

RATES = Rates(fit=100.0, answer=1000.0, start=30.0, source="")
TOKENS = [
    TokenCounts(name, description=10, demonstrations=500, pairs=600, question=40.0, answer=10.0, questions=200)
    for name in ("a", "b", "c")
]


def cells(methods, seeds=(42,), **options):
    return cells_of(
        methods, list(seeds), {"tasks": ["t"], "model_args": {"pretrained": "m"}, "metadata": {}, **options}
    )


def work(methods, seeds=(42,), tokens=TOKENS):
    return fitted_once(cost_of(cell, tokens) for cell in cells(methods, seeds))


@pytest.mark.parametrize(
    ("method", "fits", "answer", "prefix"),
    [
        ("random", [], 0, 0),
        ("zero_shot", [], 10_000, 10),
        ("icl", [], 10_000, 500),
        ("icl_vote", [], 50_000, 2500),
        ("ttt", [40 * 500] * 3, 10_000, 500),
        ("e2e", [4 * 600] * 3, 10_000, 10),
        ("shared_ttt", [3 * 40 * 500], 10_000, 500),
        ("shared_e2e", [3 * 6 * 600], 10_000, 10),
    ],
)
def test_what_a_method_makes_of_the_tokens(method, fits, answer, prefix):
    (one,) = work([method])
    assert list(one.fits.values()) == fits
    assert {task.key for task in one.tasks} == (set(one.fits) or {None})
    assert [task.answer for task in one.tasks] == [answer] * 3
    assert one.prefix == (prefix,) * 3


def test_methods_that_share_an_adapter_fit_it_once():
    found = {
        (one.cell.method, one.cell.seed): sum(one.fits.values())
        for one in work(["ttt", "ttt_vote", "ttt_loss_all", "ttt_leave_one_out"], [42, 43])
    }
    assert {name for name, fit in found.items() if fit} == {
        *(("ttt", 42), ("ttt_loss_all", 42), ("ttt", 43), ("ttt_loss_all", 43))
    }


class TestGrids:
    """Of axes: each cell is counted, and each adapter fitted once."""

    @staticmethod
    def fits(methods: list[str], *grid: str) -> dict[str, float]:
        call = {"tasks": ["t"], "model_args": {"pretrained": "m"}, "metadata": {}}
        found = cells_of(methods, [42], call, parse_points(grid, None))
        return {one.cell.setting: one.fit for one in fitted_once(cost_of(cell, TOKENS) for cell in found)}

    def test_cells_that_no_axis_tells_apart_are_one(self):
        assert self.fits(["icl", "ttt"], "lr=1e-4,1e-3", "epochs=1,3") == {
            "icl": 0,
            **{f"ttt, lr={lr}, epochs=1": 3 * 20_000 for lr in ("1e-4", "1e-3")},
            **{f"ttt, lr={lr}, epochs=3": 3 * 60_000 for lr in ("1e-4", "1e-3")},
        }

    def test_votes_share_their_adapter_and_cost_answers(self):
        assert self.fits(["ttt_vote"], "vote_permutations=3,5") == {
            "ttt_vote, vote_permutations=3": 3 * 20_000,
            "ttt_vote, vote_permutations=5": 0,
        }

    def test_permutations_are_the_sequences_of_a_fit(self):
        assert self.fits(["ttt"], "num_permutations=10,20") == {
            "ttt, num_permutations=10": 3 * 5000,
            "ttt, num_permutations=20": 3 * 10_000,
        }

    def test_the_command_counts_the_cells_of_a_file_and_draws_k_demonstrations(self, tiny_model, tmp_path, capsys):
        (tmp_path / "grid.yaml").write_text(
            "methods: [icl, ttt]\nseeds: 42\ngrid: {k: [2, 4], lr: [1e-4, 1e-3]}\nlimit: 4\n"
            f"tasks: procedural_ttt_boolean_expressions\nmodel_args: {{pretrained: {tiny_model}}}\n"
        )
        rates = ["--fit_rate", "1000", "--answer_rate", "1000"]
        assert cli.main(["plan", "--config", str(tmp_path / "grid.yaml"), *rates]) == 0
        both = capsys.readouterr().out.splitlines()[0]
        assert both.startswith("6 cells of 1 task: ")
        tokens = []
        for k in (2, 4):
            assert cli.main(["plan", "--config", str(tmp_path / "grid.yaml"), *rates, "--grid", f"k={k}"]) == 0
            first = capsys.readouterr().out.splitlines()[0]
            assert first.startswith("2 cells of 1 task: ")
            tokens.append(float(first.split()[5]))
        assert float(both.split()[5]) == pytest.approx(2 * sum(tokens), rel=0.01)
        assert 1.2 < tokens[1] / tokens[0] < 2


def test_one_worker_takes_the_sum_of_all_parts():
    estimate = spread_tasks(work(["ttt"]), RATES, 1)
    assert estimate.seconds == pytest.approx(30 + 3 * (20_000 / 100 + (500 + 10_000) / 1000))
    assert estimate.bound == "the fits"
    assert spread_tasks(work(["icl"]), RATES, 1).seconds == pytest.approx(30 + 3 * 10.5)
    assert spread_tasks(work(["icl"]), Rates(100, 1000, 0, ""), 1).bound == "the answers"
    assert spread_cells(work(["icl"], range(4)), RATES, 4).seconds == pytest.approx(30 + 3 * 10.5)


def test_many_workers_wait_for_the_longest_fit():
    estimate = spread_tasks(work(["ttt"]), RATES, 64)
    assert 230 < estimate.seconds < 235
    assert estimate.bound.startswith("the longest fit, ")
    assert spread_cells(work(["ttt", "icl"]), RATES, 64).bound == "the longest cell, ttt, seed 42"


@pytest.mark.parametrize("spread", [spread_tasks, spread_cells])
def test_more_gpus_are_never_slower_by_more_than_the_shared_reading(spread):
    grid = work([name for name in SETTINGS if name != "random"], range(3))
    seconds = [spread(grid, RATES, gpus).seconds for gpus in (1, 2, 4, 8, 16, 32, 64)]
    assert all(later <= earlier * 1.01 for earlier, later in pairwise(seconds))


def test_workers_of_two_gpus_are_half_as_many():
    grid = work(["ttt"], range(2))
    assert spread_tasks(grid, RATES, 8, 2).seconds == spread_tasks(grid, RATES, 4).seconds


def test_the_cheapest_number_is_the_smallest_that_meets_the_deadline():
    grid = work(["ttt"], range(8))
    estimates = [spread_cells(grid, RATES, gpus) for gpus in range(1, 65)]
    one = cheapest(estimates, 2 * 661.5 + 1)
    assert one.gpus == 4
    assert cheapest(estimates, 600) is None


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("40m", 2400), ("2h", 7200), ("1.5d", 129600)])
def test_deadlines(text, seconds):
    assert seconds_of(text) == seconds


RECORDS = {
    "a": {"train_tokens": 20_000, "fit_seconds": 100.0, "requests": 100, "generate_seconds": 5.0},
    "b": {"train_tokens": 20_000, "fit_seconds": 0.1, "reused": True, "requests": 100, "generate_seconds": 6.0},
}


def test_rates_are_those_of_a_run(tmp_path):
    results = {"results": {"a": {"acc,none": 1}}, "config": {"ttt": {"tasks": RECORDS}}}
    (tmp_path / "results_2026-01-01T00-00-00.json").write_text(json.dumps(results))
    tokens = {one.name: one for one in TOKENS}
    rates = measured_rates(tmp_path, tokens, None)
    assert rates.fit == 200
    assert rates.answer == pytest.approx(2 * (500 + 100 * 50) / 11)
    assert rates.start == 0
    assert measured_rates(tmp_path, tokens, 9.0).start == 9


def test_rates_are_those_of_the_benchmark(tmp_path):
    stage = {"tasks": RECORDS, "seconds": 150.0, "fit_seconds": 100.0, "generate_seconds": 11.0}
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"runs": [{"stages": {"ours": stage}}, {"stages": {}}]}))
    rates = measured_rates(file, {one.name: one for one in TOKENS}, None)
    assert (rates.fit, rates.start) == (200, 39)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ('{"runs": []}', "holds no run of this project"),
        ('{"results": {"a": {"acc,none": 1}}}', "no run with a fit"),
        (
            '{"results": {"x": {"acc,none": 1}}, "config": {"ttt": {"tasks": {"x": {"fit_seconds": 1}}}}}',
            "none of these",
        ),
    ],
)
def test_a_file_without_rates(tmp_path, content, said):
    (tmp_path / "results_2026-01-01T00-00-00.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        measured_rates(tmp_path / "results_2026-01-01T00-00-00.json", {"a": TOKENS[0]}, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there are no measured rates"),
        (["--fit_rate", "0", "--answer_rate", "1"], "--fit_rate 0.0 is not allowed"),
        (["--deadline", "soon"], "--deadline soon is not allowed"),
        (["--methods", "icll"], "Did you mean 'icl'?"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = ["--methods", "icl", "--seeds", "42", "--tasks", "procedural_ttt", "--model_args", "pretrained=m"]
    assert cli.main(["plan", *grid, *arguments]) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_tokens_are_those_of_the_prompts_and_of_the_training_sequences(tiny_model):
    """Compared with the requests that lm-eval makes, and the sequences that a fit is given."""
    from transformers import AutoTokenizer

    from ttt_harness.data.sequences import in_context_sequences
    from ttt_harness.sweep.lm_eval_call import load_tasks, one_task_index

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def with_offsets(text):
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        return encoding.input_ids, encoding.offset_mapping

    (cell,) = cells(
        ["ttt"], tasks=["procedural_ttt_boolean_expressions"], metadata={"k": 3, "num_examples": 13}, limit=8
    )
    with one_task_index():
        (found,) = count_tokens(cell, encode)
        (task,) = load_tasks(cell.call).values()
    task.build_all_requests(limit=8, rank=0, world_size=1)
    prompts = [len(encode(instance.args[0])) for instance in task.instances]
    assert found.questions == len(prompts) == 8
    counted = found.demonstrations + found.question
    assert counted == pytest.approx(sum(prompts) / len(prompts), rel=0.02)
    sequences = in_context_sequences(
        task.support_set(), with_offsets, num_permutations=4, shuffle=True, seed=42, loss_on="outputs"
    )
    assert found.demonstrations == pytest.approx(sum(len(s.tokens) for s in sequences) / 4, rel=0.02)
