"""Tasks as users write them, and chats, end to end on a tiny model: every output type, every method's kind of fit."""

import shutil
from pathlib import Path

import pytest

from tests.tuned.files import candidate, tuned
from ttt_harness.adapters.names import fingerprint
from ttt_harness.errors import ConfigError, DataError
from ttt_harness.tuned import write_tuned

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).resolve().parents[1] / "user_tasks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SCORED = ["blanks", "colours", "last_words", "listed_colours"]
FIT = {"num_permutations": 3, "lora_rank": 8, "lr": 1e-2, "epochs": 2}
ENGINE = {"enable_lora": True, "max_lora_rank": 8, "max_model_len": 2048, "dtype": "float32"}
TEMPLATE = (
    "{{bos_token}}{% for m in messages %}<{{m.role}}>{{m.content}}{{eos_token}}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{raise_exception('no system turn')}}{% endif %}"


@pytest.fixture(scope="module")
def chat_model(tiny_model, tmp_path_factory):
    """The tiny model with a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture
def evaluate(chat_model, store, hub):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = {
        split: [{"question": f"{split} {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(count)]
        for split, count in (("train", 9), ("test", 4))
    }
    hub("openai/gsm8k", {"main": rows})

    def run(tasks=NAMES, folder=FOLDER, options=None, fit=FIT, **model_args):
        args = {"pretrained": str(chat_model), "adapter_dir": str(store), **ENGINE, **fit, **model_args}
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=args)
        options = {"task_manager": manager, "bootstrap_iters": 0, "limit": 3, **(options or {})}
        return simple_evaluate("ttt_vllm", args, list(tasks), batch_size=1, **options)

    return run


def requests(results, task):
    return [[list(arguments) for arguments in sample["arguments"]] for sample in results["samples"][task]]


def answers(results, task):
    return [sample["resps"] for sample in results["samples"][task]]


def test_every_shape_of_task_is_fitted_served_and_scored_with_its_adapter(evaluate):
    fitted, plain = evaluate(), evaluate(method="icl")
    records = fitted["config"]["ttt"]["tasks"]
    assert sorted(records) == NAMES
    assert len({record["adapter"] for record in records.values()}) == len(NAMES)
    for task in NAMES:
        assert records[task]["changes_output"] is True
        assert records[task]["train_sequences"] == 3
        assert requests(fitted, task) == requests(plain, task)
        metrics = [key for key in fitted["results"][task] if "," in key and "stderr" not in key]
        assert metrics
    for task in SCORED:  # a score has no ties that would hide the adapter
        assert answers(fitted, task) != answers(plain, task)
    assert fitted["configs"]["listed_colours"]["metadata"]["k"] == 3
    assert "acc_norm,none" in fitted["results"]["colours"]


def test_end_to_end_fits_learn_single_pairs_of_every_shape(evaluate):
    results = evaluate(method="e2e", epochs=1)
    records = results["config"]["ttt"]["tasks"]
    assert {task: record["train_sequences"] for task, record in records.items()} == {
        "antonyms": 3, "blanks": 2, "capitals": 10, "colours": 3, "gsm8k_three_lines": 5, "last_words": 3,
        "listed_colours": 3, "short_capitals": 2, "sums": 4,
    }  # fmt: skip
    assert all(len(prompt) < 200 for task in NAMES for ((prompt, *_), *_) in requests(results, task))


def test_tuned_settings_answer_each_task_as_they_were_chosen(evaluate, chat_model, tmp_path):
    """`blanks` and a task that the file does not hold with the settings that gain, `colours` in-context."""
    best = candidate(FIT["lr"], FIT["epochs"])
    gains, loses = ({"icl": [1 - right] * 10, best.name: [right] * 10} for right in (1, 0))
    of_few = {"icl": [0] * 2, best.name: [1] * 2}
    found = {**dict.fromkeys("abcde", gains), "blanks": of_few, "colours": {name: v[:3] for name, v in loses.items()}}
    path = tmp_path / "tuned.json"
    write_tuned(tuned(found, [best], fingerprint=fingerprint(chat_model)), path)
    tasks, fit = ["blanks", "colours", "last_words"], {"num_permutations": 3, "lora_rank": 8}
    explicit, plain = evaluate(tasks), evaluate(tasks, method="icl")
    chosen = evaluate(tasks, fit=fit, settings=str(path), choose="task")
    for_all = evaluate(tasks, fit=fit, settings=str(path))

    records = [one["config"]["ttt"]["tasks"] for one in (explicit, chosen, for_all)]
    for task in tasks:
        in_context = task == "colours"
        assert answers(chosen, task) == answers(plain if in_context else explicit, task)
        assert records[1][task]["adapter"] == (None if in_context else records[0][task]["adapter"])
        assert records[1][task]["setting"]["name"] == ("icl" if in_context else best.name)
        assert records[1][task]["setting"]["chosen_for"] == ("all tasks" if task == "last_words" else "task")
        assert answers(for_all, task) == answers(explicit, task)
        assert (records[2][task]["adapter"], records[2][task]["reused"]) == (records[0][task]["adapter"], True)
    said = chosen["config"]["ttt"]["settings"]
    assert (said["settings"], said["choose"], said["setting"]) == (str(path), "task", best.name)
    with pytest.raises(ConfigError, match="found with 3 demonstrations of colours, and here it has 2"):
        evaluate(["colours"], fit=fit, settings=str(path), options={"num_fewshot": 2})


@pytest.mark.parametrize("multiturn", [True, False])
def test_chats_are_fitted_and_asked_through_the_template(evaluate, multiturn):
    options = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn, "system_instruction": "Be brief."}
    tasks = ["antonyms", "colours", "short_capitals"]
    fitted, plain = (evaluate(tasks, options=options, method=method) for method in ("ttt", "icl"))
    for task in tasks:
        assert fitted["config"]["ttt"]["tasks"][task]["changes_output"] is True
        assert requests(fitted, task) == requests(plain, task)
        (prompt, *_), *_ = requests(fitted, task)[0]
        k = fitted["configs"][task]["metadata"]["k"]
        assert prompt.startswith("<s><system>Be brief.")
        assert prompt.count("<assistant>") == (k + 1 if multiturn else 1)
    assert answers(fitted, "colours") != answers(plain, "colours")


def test_tokens_of_training_texts_are_those_that_lm_eval_scores(evaluate, chat_model):
    from ttt_harness.harness.model import TTTVLLM

    model = TTTVLLM(str(chat_model), method="icl", **ENGINE).answering
    for options in ({}, {"apply_chat_template": True, "system_instruction": "Be brief."}):
        results = evaluate(SCORED, options=options, method="icl")
        pairs = [pair for task in SCORED for document in requests(results, task) for pair in document]
        assert len(pairs) > 20
        for context, continuation in pairs:
            scored = model._encode_pair(context, continuation)
            assert model.encode(context + continuation)[0] == [*scored[0], *scored[1]]


def test_a_template_without_a_system_turn_is_refused_before_any_model_is_loaded(
    evaluate, chat_model, tmp_path, monkeypatch
):
    from transformers import AutoTokenizer

    from ttt_harness.serving import engine

    def load(*_: object, **__: object):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(engine, "LLM", load)
    for template, telling in ((NO_SYSTEM + TEMPLATE, "cannot take a system turn"), (None, "no chat template")):
        folder = tmp_path / telling.split()[0]
        shutil.copytree(chat_model, folder)
        (folder / "chat_template.jinja").unlink()
        if template:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder)
        with pytest.raises(ConfigError) as refusal:
            evaluate(["sums"], options={"apply_chat_template": True}, pretrained=str(folder))
        message = str(refusal.value)
        assert telling in message
        assert message.startswith(f"sums ({FOLDER / 'sums.yaml'}): ")
        assert "\n" not in message


PLAIN = """task: plain
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/data/colours.json}}
test_split: test
output_type: KIND
doc_to_text: "{{thing}}"
doc_to_target: "{{colour}}"
"""


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood", "loglikelihood_rolling"])
def test_a_plain_task_is_refused_or_evaluated_with_the_base_model(evaluate, tmp_path, kind):
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "plain.yaml").write_text(PLAIN.replace("FOLDER", str(FOLDER)).replace("KIND", kind))
    shutil.copytree(FOLDER, folder / "ours")
    refused = "loglikelihood_rolling" if kind == "loglikelihood_rolling" else "class: !function ttt_harness.TTTTask"
    with pytest.raises(DataError, match=refused):
        evaluate(["plain"], folder)
    mixed = evaluate(["plain", "colours"], folder, on_plain_task="base")
    plain = evaluate(["plain"], folder, method="icl")
    record = mixed["config"]["ttt"]["tasks"]["plain"]
    assert record["adapter"] is None
    assert record["plain"] is True
    assert mixed["config"]["ttt"]["tasks"]["colours"]["changes_output"] is True
    assert answers(mixed, "plain") == answers(plain, "plain")


def test_answers_that_tokenize_to_nothing_are_refused_with_the_file(evaluate, chat_model, tmp_path):
    """A tokenizer that knows no digits drops them without a word."""
    import json

    folder, tasks = tmp_path / "blind", tmp_path / "tasks"
    shutil.copytree(chat_model, folder)
    shutil.copytree(FOLDER, tasks)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError) as refusal:
        evaluate(["sums"], tasks, pretrained=str(folder))
    message = str(refusal.value)
    assert str(tasks / "sums.yaml") in message
    assert "tokenize to nothing" in message
    assert "doc_to_target" in message
    assert "\n" not in message
