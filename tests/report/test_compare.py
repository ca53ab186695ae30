"""Comparing runs: pairs, differences, groups, warnings, refusals."""

import json

import numpy as np
import pytest

from tests.report.runs import ttt, write_run
from ttt_harness.errors import ReportError
from ttt_harness.report.compare import MEAN_ROW, compare_runs, distinct_labels
from ttt_harness.report.results import find_run, read_run


def bits(n, seed, share=0.5):
    return [float(x) for x in np.random.default_rng(seed).random(n) < share]


@pytest.fixture
def two(tmp_path):
    base = write_run(
        tmp_path / "icl", {"bbh_ttt_snarks": bits(50, 1), "bbh_ttt_navigate": bits(80, 2)}, group="bbh_ttt"
    )
    other = write_run(
        tmp_path / "ttt",
        {"bbh_ttt_snarks": bits(50, 3), "bbh_ttt_navigate": bits(80, 4, 0.8)},
        group="bbh_ttt",
        source="ttt_vllm",
        ttt=ttt(["bbh_ttt_snarks", "bbh_ttt_navigate"]),
    )
    return read_run(base), read_run(other)


def rows(base, other, **options):
    return {row.name: row for row in compare_runs(base, [other], **options).others[0].rows}


def warnings(base, other, **options):
    return " ".join(compare_runs(base, [other], **options).others[0].warnings)


def test_differences_and_counts(two):
    found = rows(*two)
    assert list(found) == ["bbh_ttt", "bbh_ttt_snarks", "bbh_ttt_navigate"]
    base, other = np.array(bits(80, 2)), np.array(bits(80, 4, 0.8))
    row = found["bbh_ttt_navigate"]
    assert row.difference.value == pytest.approx(other.mean() - base.mean())
    assert (row.won, row.lost, row.n) == (((other > base).sum()), ((other < base).sum()), 80)
    group = found["bbh_ttt"]
    tasks = [found["bbh_ttt_snarks"], row]
    assert group.difference.value == pytest.approx(np.mean([r.difference.value for r in tasks]))
    assert group.difference.test == "bootstrap_within_tasks"
    assert (group.won, group.n, group.p_holm) == (sum(r.won for r in tasks), 130, None)
    assert row.p_holm >= row.difference.p
    assert warnings(*two) == ""


def test_swapping_mirrors_everything(two):
    there, back = rows(*two), rows(*two[::-1])
    for name, row in there.items():
        mirror = back[name]
        d, m = row.difference, mirror.difference
        assert (d.value, d.low, d.high, d.p) == (-m.value, -m.high, -m.low, m.p)
        assert (row.won, row.lost, row.p_holm) == (mirror.lost, mirror.won, mirror.p_holm)


def test_a_run_against_itself_is_exactly_zero(two):
    for row in rows(two[0], two[0], allow_same_run=True).values():
        assert (row.difference.value, row.difference.p, row.won, row.lost) == (0, 1, 0, 0)


def test_same_run_is_refused(two, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(two[0].path.read_bytes())
    with pytest.raises(ReportError, match="twice: the same run"):
        compare_runs(two[0], [two[0]])
    with pytest.raises(ReportError, match=r"copy.json: the same run"):
        compare_runs(two[1], [two[0], read_run(copy)])


def test_questions_are_paired_by_hash_not_by_place(tmp_path):
    scores = bits(40, 5)
    order = np.random.default_rng(6).permutation(40)
    base = write_run(tmp_path / "a", {"t": scores})
    other = write_run(
        tmp_path / "b", {"t": [scores[i] for i in order]}, question=lambda t, i: f"{t} question {order[i]}"
    )
    row = rows(read_run(base), read_run(other))["t"]
    assert (row.won, row.lost) == (0, 0)


def test_equal_questions_are_paired_by_place(tmp_path):
    base = write_run(tmp_path / "a", {"t": [1.0, 0.0, 1.0]}, question=lambda _t, i: "same" if i < 2 else "other")
    other = write_run(tmp_path / "b", {"t": [1.0, 1.0, 1.0]}, question=lambda _t, i: "same" if i < 2 else "other")
    row = rows(read_run(base), read_run(other))["t"]
    assert (row.won, row.lost, row.n) == (1, 0, 3)


def test_different_questions_are_refused(tmp_path):
    base = write_run(tmp_path / "a", {"t": bits(40, 5)})
    fewer = write_run(tmp_path / "b", {"t": bits(20, 5)})
    elsewhere = write_run(tmp_path / "c", {"t": bits(40, 5)}, question=lambda _t, i: f"another {i}")
    with pytest.raises(ReportError, match=r"20 of 40 are only in the first and 0 of 20"):
        compare_runs(read_run(base), [read_run(fewer)])
    with pytest.raises(ReportError, match=r"40 of 40 are only in the first and 40 of 40"):
        compare_runs(read_run(base), [read_run(elsewhere)])


def test_without_samples_it_is_unpaired_and_says_so(tmp_path):
    base = write_run(tmp_path / "a", {"t": bits(40, 1), "u": bits(40, 2)}, samples=False, group="g")
    other = write_run(tmp_path / "b", {"t": bits(40, 3), "u": bits(40, 4)}, group="g")
    found = rows(read_run(base), read_run(other))
    assert {row.difference.test for row in found.values()} == {"z_unpaired"}
    assert found["t"].won is None
    assert "Unpaired" in warnings(read_run(base), read_run(other))
    assert "--log_samples" in warnings(read_run(base), read_run(other))


def test_a_score_that_is_no_mean_of_its_questions_is_not_paired(tmp_path):
    base = write_run(tmp_path / "a", {"t": bits(40, 1)})
    raw = json.loads(base.read_text())
    raw["results"]["t"]["acc,answer"] = 0.123  # as of a macro average
    base.write_text(json.dumps(raw))
    other = write_run(tmp_path / "b", {"t": bits(40, 3)})
    assert rows(read_run(base), read_run(other))["t"].difference.test == "z_unpaired"
    assert "not the mean" in warnings(read_run(base), read_run(other))


def test_other_metrics_are_bootstrapped(tmp_path):
    values = np.random.default_rng(1).random((2, 40))
    base = write_run(tmp_path / "a", {"t": list(values[0])}, metric="f1", filter_name="none")
    other = write_run(tmp_path / "b", {"t": list(values[1])}, metric="f1", filter_name="none")
    assert rows(read_run(base), read_run(other))["t"].difference.test == "bootstrap_paired"


def test_lower_is_better_turns_won_and_lost(tmp_path):
    base = write_run(tmp_path / "a", {"t": [2.0, 2.0, 2.0]}, metric="perplexity", higher_is_better=False)
    other = write_run(tmp_path / "b", {"t": [1.0, 1.5, 3.0]}, metric="perplexity", higher_is_better=False)
    row = rows(read_run(base), read_run(other))["t"]
    assert (row.won, row.lost) == (2, 1)
    assert row.difference.value == pytest.approx(-1 / 6)


def test_a_group_weighted_by_size_is_compared_so(tmp_path):
    scores = [{"t": bits(40, 1), "u": bits(90, 2)}, {"t": bits(40, 3), "u": bits(90, 4)}]
    paths = [write_run(tmp_path / str(i), s, group="g", weight_by_size=True) for i, s in enumerate(scores)]
    group = rows(*map(read_run, paths))["g"]
    expected = (sum(map(sum, scores[1].values())) - sum(map(sum, scores[0].values()))) / 130
    assert group.difference.value == pytest.approx(expected)
    assert group.difference.test == "bootstrap_within_tasks"


def test_tasks_without_a_group_get_their_mean(tmp_path):
    base = write_run(tmp_path / "a", {"t": bits(40, 1), "u": bits(90, 2)})
    other = write_run(tmp_path / "b", {"t": bits(40, 3), "u": bits(90, 4), "v": bits(9, 1)})
    found = rows(read_run(base), read_run(other))
    assert list(found) == [MEAN_ROW, "t", "u"]
    assert "left out: v" in warnings(read_run(base), read_run(other))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metadata": {"seed": 43}}, "Seeds of the split differ: 42 and 43 in t"),
        ({"metadata": {"k": 5}}, "demonstrations k differ: 10 and 5"),
        ({"change": {"versions": {"t": 2.0}}}, "Task versions differ: 1.0 and 2.0"),
        ({"change": {"lm_eval_version": "0.4.9"}}, "lm-eval versions differ: 0.4.13 and 0.4.9"),
        ({"change": {"n-samples": {"t": {"original": 40, "effective": 7}}}}, "Numbers of questions differ: 40 and 7"),
        ({"prompt": lambda _t, i: f"Another prompt {i}"}, "Prompts differ in t"),
        ({"shots": 0}, "in the prompt differ: 10 and 0"),
        ({"change": {"chat_template_sha": "abc"}}, "Chat templates differ"),
        ({"change": {"configs": {"t": {"test_split": "dev", "metadata": {"k": 10, "seed": 42}}}}}, "splits differ"),
    ],
)
def test_warns_of_what_is_not_comparable(tmp_path, options, said):
    base = write_run(tmp_path / "a", {"t": bits(40, 1)})
    other = write_run(tmp_path / "b", {"t": bits(40, 3)}, **options)
    assert said in warnings(read_run(base), read_run(other))


def test_warns_of_other_questions_by_task_hash_where_samples_are_lost(tmp_path):
    base = write_run(tmp_path / "a", {"t": bits(40, 1)})
    other = write_run(tmp_path / "b", {"t": bits(40, 3)}, question=lambda _t, i: f"another {i}")
    next(other.parent.glob("samples_*")).unlink()
    assert "Questions or prompts differ in t" in warnings(read_run(base), read_run(other))


def test_metric_can_be_chosen(tmp_path):
    paths = []
    for name in "ab":
        path = write_run(tmp_path / name, {"t": bits(40, 1)})
        raw = json.loads(path.read_text())
        raw["results"]["t"] |= {"acc_norm,none": 0.5, "acc_norm_stderr,none": 0.1}
        path.write_text(json.dumps(raw))
        paths.append(read_run(path))
    assert str(rows(*paths)["t"].metric) == "acc,answer"
    for wanted in ("acc_norm", "acc_norm,none"):
        assert str(rows(*paths, metric=wanted)["t"].metric) == "acc_norm,none"
    with pytest.raises(ReportError, match="no shared task has the metric bleu; choose from acc,answer, acc_norm,none"):
        rows(*paths, metric="bleu")


def test_published_figures_stand_beside(two):
    comparison = compare_runs(two[0], [two[1]], reference=True)
    row = {row.name: row for row in comparison.others[0].rows}["bbh_ttt_snarks"]
    assert (row.published_base.mean, row.published_other.mean) == (pytest.approx(0.7024), pytest.approx(0.7762))
    assert dict(comparison.reference.methods) == {"10-shot": "few_shot", "ttt": "ttt"}
    assert "arXiv 2411.07279" in comparison.reference.source
    assert "SmolLM2-135M-Instruct" in comparison.reference.differs
    assert "seed 42" in comparison.reference.differs


def test_published_needs_bbh(tmp_path):
    runs = [read_run(write_run(tmp_path / name, {"procedural_ttt_snarks": bits(9, 1)})) for name in "ab"]
    with pytest.raises(ReportError, match="no published figures"):
        compare_runs(runs[0], runs[1:], reference=True)


@pytest.mark.parametrize(
    ("settings", "metadata", "method"),
    [
        ({}, {}, "ttt"),
        ({}, {"vote_permutations": 5}, "ttt_vote"),
        ({"shuffle": False}, {}, "ttt_no_shuffle"),
        ({"loss_on": "all"}, {}, "ttt_loss_all"),
        ({"loss_on": "last"}, {}, "ttt_loss_last"),
        ({"method": "shared_ttt"}, {}, "shared_ttt"),
        ({"method": "e2e"}, {}, "e2e"),
        ({"method": "shared_e2e"}, {}, "shared_e2e"),
        ({"method": "icl"}, {}, "few_shot"),
    ],
)
def test_each_method_has_its_published_twin(tmp_path, settings, metadata, method):
    from ttt_harness.report.published import published_for

    path = write_run(
        tmp_path, {"bbh_ttt_snarks": bits(9, 1)}, ttt=ttt(["bbh_ttt_snarks"], **settings), metadata=metadata
    )
    assert published_for(read_run(path)).method == method


def test_labels_tell_runs_apart(tmp_path):
    def run(name, **options):
        return read_run(write_run(tmp_path / name, {"t": [1.0, 0.0]}, **options))

    icl, first = run("a"), run("b", ttt=ttt(["t"]))
    slow = run("c", ttt=ttt(["t"], lr=1e-5))
    assert distinct_labels([icl, first]) == ["10-shot", "ttt"]
    assert distinct_labels([icl, first], [None, "ours"]) == ["10-shot", "ours"]
    assert distinct_labels([first, slow]) == ["ttt lr=0.0001", "ttt lr=1e-05"]
    assert len(set(distinct_labels([icl, run("d"), run("e", model="Llama")]))) == 3
    shown, hidden = (run(f"icl{shots}", ttt=ttt(["t"], method="icl"), shots=shots) for shots in (10, 0))
    assert distinct_labels([hidden, shown]) == ["zero_shot", "icl"]
    assert distinct_labels([first, run("f", ttt=ttt(["t"]), limit=40.0)]) == ["ttt", "ttt limit=40"]
    assert distinct_labels([first, run("g", ttt=ttt(["t"]), shots=0)]) == ["ttt shots=10", "ttt shots=0"]


def test_newest_file_of_a_folder_counts_and_is_named(tmp_path):
    write_run(tmp_path, {"t": [1.0]})
    newest = write_run(tmp_path, {"t": [0.0]})
    run, remarks = find_run(tmp_path)
    assert run.path == newest
    assert "holds 2 results files" in remarks[0]
