"""How one real engine answers: greedily or drawn, by whose adapter, prompts cut or whole, in which template."""

import json
import shutil

import pytest

from ttt_harness.errors import ConfigError, DataError

pytestmark = pytest.mark.integration

ENGINE = {"enable_lora": True, "max_lora_rank": 8, "max_model_len": 512, "dtype": "float32"}
FIT = {"num_permutations": 2, "epochs": 2, "lora_rank": 8, "lr": 1e-2, "k": 3}
TASK = """
task: {name}
class: !function ttt_harness.TTTTask
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_target: a
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8{more}}}
repeats: {repeats}
"""
TEMPLATES = [
    {"name": name, "template": f"{{% for m in messages %}}{mark}{{{{ m.content }}}}\n{{% endfor %}}{mark}"}
    for name, mark in (("short", "#"), ("tools", "@"))
]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """The tiny model with two chat templates, none of them its default."""
    folder = tmp_path_factory.mktemp("model") / "templates"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATES}))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, words in (("short", 1), ("long", 150)):
        written = [{"q": f"what is {i}?" + " word" * words, "a": f"it is {i}"} for i in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    for name, rows, repeats, more in [
        ("greedy", "short", 1, ""),
        ("drawn", "short", 3, ", do_sample: true"),
        ("long", "long", 1, ""),
    ]:
        text = TASK.format(name=name, rows=folder / f"{rows}.jsonl", repeats=repeats, more=more)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def evaluate(model, tasks, tmp_path_factory):
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    store = tmp_path_factory.mktemp("adapters")

    def run(task, options=None, batch_size=1, **model_args):
        args = {"pretrained": str(model), "adapter_dir": str(store), **ENGINE, **FIT, "method": "icl", **model_args}
        manager = TaskManager(include_path=tasks, include_defaults=False, metadata=args)
        tracker = EvaluationTracker()
        given = {"task_manager": manager, "bootstrap_iters": 0, "limit": 4, "evaluation_tracker": tracker}
        results = simple_evaluate("ttt_vllm", args, [task], batch_size=batch_size, **{**given, **(options or {})})
        return {**results, "chat_template": tracker.general_config_tracker.chat_template}

    return run


def answers(results):
    ((_, samples),) = results["samples"].items()
    return [sample["resps"][0] for sample in samples]


def record(results):
    ((_, record),) = results["config"]["ttt"]["tasks"].items()
    return record


@pytest.fixture(scope="module")
def greedy(evaluate):
    return evaluate("greedy")


def test_a_task_that_asks_for_no_sampling_is_answered_greedily(evaluate, greedy):
    assert answers(evaluate("greedy")) == answers(greedy)
    assert answers(evaluate("greedy", {"gen_kwargs": {"temperature": 0.0}})) == answers(greedy)
    assert "sampling" not in record(greedy)
    drawn = evaluate("greedy", {"gen_kwargs": {"temperature": 1.0}})
    assert answers(drawn) != answers(greedy)


def test_drawn_answers_are_those_of_the_seed_whatever_the_batches(evaluate):
    first = evaluate("drawn")
    assert record(first)["sampling"]["temperature"] == 1.0
    assert all(len(set(repeats)) > 1 for repeats in answers(first))
    assert answers(evaluate("drawn", batch_size=2)) == answers(first)
    other = evaluate("drawn", {"limit": 2})
    assert answers(other) == answers(first)[:2]
    # the demonstrations are drawn with the seed as well, so that other prompts would be answered
    same_prompts = evaluate("drawn", {"gen_kwargs": {"seed": 5}})
    assert answers(same_prompts) != answers(first)
    assert all(len(set(repeats)) == 1 for repeats in answers(same_prompts))  # as lm-eval's class does


def test_an_adapter_of_the_users_answers_all_prompts_and_is_named(evaluate, greedy):
    fitted = evaluate("greedy", method="ttt")
    path = record(fitted)["adapter"]
    served = evaluate("greedy", lora_local_path=path)
    assert record(served)["adapter"] == path
    assert answers(served) == answers(fitted) != answers(greedy)
    assert answers(evaluate("greedy")) == answers(greedy)


def test_prompts_are_cut_where_that_is_asked_for_and_counted(evaluate):
    with pytest.raises(DataError, match=r"long: a prompt has .* the context window holds 512"):
        evaluate("long")
    cut = evaluate("long", truncate=True)
    assert record(cut)["truncated"] == 4
    assert len(answers(cut)) == 4


def test_the_named_template_is_in_prompts_and_in_what_is_fitted(evaluate):
    runs = {
        name: evaluate("greedy", {"apply_chat_template": name, "fewshot_as_multiturn": False}, method="ttt")
        for name in ("short", "tools")
    }
    for name, mark in (("short", "#"), ("tools", "@")):
        ((_, samples),) = runs[name]["samples"].items()
        prompts = [sample["arguments"][0][0] for sample in samples]
        assert all(prompt.startswith(mark) and prompt.endswith(f"\n{mark}") for prompt in prompts)
        assert runs[name]["chat_template"].startswith("{% for")
        assert mark in runs[name]["chat_template"]
    short, tools = (record(run) for run in runs.values())
    assert short["adapter"] != tools["adapter"]
    assert short["losses"] != tools["losses"]


@pytest.mark.parametrize("name", ["chatml", True])
def test_a_template_that_is_not_there_is_refused(evaluate, name):
    with pytest.raises(ConfigError, match="use --apply_chat_template with one of short, tools"):
        evaluate("greedy", {"apply_chat_template": name})
    with pytest.raises(ConfigError, match="use --apply_chat_template with one of short, tools"):
        evaluate("greedy", {"apply_chat_template": name, "evaluation_tracker": None})
