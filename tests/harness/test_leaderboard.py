"""The tasks that everyone knows: the very requests of lm-eval's own, with local data in the hub's layout."""

from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

import ttt_harness

FOLDER = Path(__file__).resolve().parents[2] / "task_configs"
STOCK = Path(lm_eval.__file__).parent / "tasks"
BBH = sorted(path.stem for path in (STOCK / "leaderboard/bbh_mc").glob("[!_]*.yaml"))


def ours(name, **metadata):
    return TaskManager(include_path=FOLDER, include_defaults=False, metadata=metadata).load([name])["tasks"][name]


def stock(path):
    """lm-eval's own task, as its own index builds it."""
    config = load_yaml(STOCK / path)
    for key in ("tag", "group"):
        config.pop(key, None)
    return ConfigurableTask(config=config)


def requests(task):
    task.build_all_requests()
    return [(one.request_type, one.args, one.doc, one.idx, one.doc_id) for one in task.instances]


def bbh_rows(name, count=14):
    """Questions of our own, with the answers of lm-eval's task."""
    choices = load_yaml(STOCK / f"leaderboard/bbh_mc/{name}.yaml")["doc_to_choice"]
    return [{"input": f"{name}, question {i}?", "target": choices[i % len(choices)]} for i in range(count)]


def test_leaderboard_bbh_ttt_asks_the_very_requests_of_leaderboard_bbh(hub):
    hub("SaylorTwift/bbh", {name: {"test": bbh_rows(name)} for name in BBH})
    assert len(BBH) == 24
    for name in BBH:
        task = ours(f"leaderboard_bbh_ttt_{name}", method="icl")
        assert isinstance(task, ttt_harness.TTTTask)
        assert requests(task) == requests(stock(f"leaderboard/bbh_mc/{name}.yaml"))
        assert len(task.eval_docs) == 14
        assert task.config.metric_list[0]["metric"] == "acc_norm"
        listed = load_yaml(STOCK / f"leaderboard/bbh_mc/{name}.yaml")["fewshot_config"]["samples"]
        assert [pair.answer for pair in task.support_set().demonstrations] == [one["target"] for one in listed]


def test_a_stated_k_draws_from_the_leaderboards_data_and_leaves_the_rest(hub):
    rows = bbh_rows("navigate")
    hub("SaylorTwift/bbh", {"navigate": {"test": rows}})
    task = ours("leaderboard_bbh_ttt_navigate", k=5, seed=7)
    drawn, rest = list(task.fewshot_docs()), list(task.eval_docs)
    assert len(drawn) == 5
    assert sorted(row["input"] for row in [*drawn, *rest]) == sorted(row["input"] for row in rows)
    assert drawn != list(ours("leaderboard_bbh_ttt_navigate", k=5, seed=8).fewshot_docs())


def test_groups_are_those_of_lm_eval():
    groups = {path.stem: load_yaml(path) for path in FOLDER.rglob("_*.yaml")}
    bbh = load_yaml(STOCK / "leaderboard/bbh_mc/_leaderboard_bbh.yaml")
    own = groups["_leaderboard_bbh_ttt"]
    assert own["task"] == [name.replace("leaderboard_bbh", "leaderboard_bbh_ttt") for name in bbh["task"]]
    assert own["aggregate_metric_list"] == bbh["aggregate_metric_list"]
    manager = TaskManager(include_path=FOLDER, include_defaults=False)
    stock_mmlu = [load_yaml(path) for path in (STOCK / "mmlu/default").glob("mmlu_*.yaml")]
    assert len(stock_mmlu) == 57
    for task in stock_mmlu:
        tag = task["tag"].replace("mmlu", "mmlu_ttt", 1)
        assert task["task"].replace("mmlu", "mmlu_ttt", 1) in manager.task_index[tag].tags
    for area in ("stem", "other", "social_sciences", "humanities"):
        assert groups[f"_mmlu_ttt_{area}"]["task"] == [f"mmlu_ttt_{area}_tasks"]
        assert f"mmlu_ttt_{area}" in groups["_mmlu_ttt"]["task"]
    # A tag of lm-eval's that came along with an include would take that tag's tasks away.
    assert all(tag.startswith("mmlu_ttt_") for tag in manager.all_tags)


def mmlu_rows(split, count):
    return [
        {"question": f" {split} {i}? ", "subject": "anatomy", "choices": [f"{c}{i}" for c in "wxyz"], "answer": i % 4}
        for i in range(count)
    ]


def test_mmlu_ttt_asks_the_very_requests_of_five_shot_mmlu(hub):
    hub("cais/mmlu", {"anatomy": {"dev": mmlu_rows("dev", 5), "test": mmlu_rows("test", 9)}})
    task, plain = ours("mmlu_ttt_anatomy"), stock("mmlu/default/mmlu_anatomy.yaml")
    plain.set_config("num_fewshot", 5)
    assert requests(task) == requests(plain)
    assert task.config.metadata["k"] == 5
    assert len(task.eval_docs) == 9


def test_arc_challenge_ttt_draws_from_its_training_split_and_evaluates_all_of_its_test_split(hub):
    def rows(split, count):
        return [
            {
                "id": f"{split}{i}",
                "question": f"{split} {i}?",
                "choices": {"text": [f"{c}{i}" for c in "abcd"], "label": list("ABCD")},
                "answerKey": "ABCD"[i % 4],
            }
            for i in range(count)
        ]

    splits = {split: rows(split, 12) for split in ("train", "validation", "test")}
    hub("allenai/ai2_arc", {"ARC-Challenge": splits})
    task = ours("arc_challenge_ttt", k=4)
    assert [doc["id"] for doc in task.eval_docs] == [row["id"] for row in splits["test"]]
    assert all(doc["id"].startswith("train") for doc in task.fewshot_docs())
    assert len({doc["id"] for doc in task.fewshot_docs()}) == 4
    for pair, doc in zip(task.support_set().demonstrations, task.fewshot_docs(), strict=True):
        assert pair.answer == doc["choices"]["text"]["ABCD".index(doc["answerKey"])]
        assert pair.question == f"Question: {doc['question']}\nAnswer: "


def test_gsm8k_ttt_has_lm_evals_number_of_shots_and_its_filters(hub):
    def rows(split, count):
        return [{"question": f"{split} {i}?", "answer": f"So it is {i}.\n#### {i}"} for i in range(count)]

    hub("openai/gsm8k", {"main": {"train": rows("train", 9), "test": rows("test", 4)}})
    task = ours("gsm8k_ttt")
    assert len(task.fewshot_docs()) == task.config.num_fewshot == 5
    assert len(task.eval_docs) == 4
    assert [one["name"] for one in task.config.filter_list] == ["strict-match", "flexible-extract"]
    (first, *_) = requests(task)
    assert first[1][0].count("Question: train") == 5
    assert first[1][0].endswith("Question: test 0?\nAnswer:")


@pytest.mark.parametrize("name", ["arc_challenge", "gsm8k"])
def test_lm_evals_own_task_stays_in_its_tag(name):
    folder = STOCK / name.partition("_")[0]
    (tag,) = load_yaml(folder / f"{name}.yaml")["tag"]
    manager = TaskManager(include_path=[folder, FOLDER], include_defaults=False)
    assert name in manager.task_index[tag].tags
    assert f"{name}_ttt" not in manager.task_index[tag].tags
