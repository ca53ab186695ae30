"""TTT tasks of every shape that lm-eval can express: their demonstrations, their prompts, and what they refuse.

`tests/user_tasks` holds YAMLs as a user would write them. Their prompts are held against those of lm-eval's own class,
given the same demonstrations as listed samples.
"""

import pickle
import random
from functools import partial
from pathlib import Path

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoTokenizer

from ttt_harness.data.chat import asked_text, conversation_text
from ttt_harness.data.support import in_context_text
from ttt_harness.errors import ConfigError, DataError, TTTError
from ttt_harness.harness.task import support_set_of

USER_TASKS = Path(__file__).resolve().parents[1] / "user_tasks"
NAMES = sorted(path.stem for path in USER_TASKS.glob("*.yaml"))
# question, answer of each demonstration; where they come from; how many are evaluated
EXPECTED = {
    "antonyms": (3, "split test, and not evaluated", 5),
    "blanks": (2, "split validation, and not evaluated", 3),
    "capitals": (10, "split train, and not evaluated", 2),
    "colours": (3, "split test, and not evaluated", 7),
    "gsm8k_three_lines": (5, "split train", 4),
    "last_words": (3, "split train, and not evaluated", 4),
    "listed_colours": (3, "fewshot_config.samples", 10),
    "short_capitals": (2, "fewshot_config.samples", 10),
    "sums": (4, "split train", 4),
}


@pytest.fixture(autouse=True)
def data(hub):
    """gsm8k, as on the hub; the other data sets lie beside the YAMLs."""
    rows = {
        split: [{"question": f"{split} {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(count)]
        for split, count in (("train", 9), ("test", 4))
    }
    hub("openai/gsm8k", {"main": rows})


def load(name, folder=USER_TASKS, **metadata):
    return TaskManager(include_path=folder, include_defaults=False, metadata=metadata).load([name])["tasks"][name]


def twin(task, monkeypatch):
    """lm-eval's own class with the same YAML, told to be greedy, and the task's demonstrations as listed samples."""
    config = load_yaml(USER_TASKS / f"{task.config.task}.yaml")
    for key in ("class", "tag", "fewshot_split", "custom_dataset"):
        config.pop(key, None)
    samples = [dict(doc) for doc in task.fewshot_docs()]
    config["fewshot_config"] = {**(config.get("fewshot_config") or {}), "samples": samples, "sampler": "first_n"}
    config["num_fewshot"] = len(samples)
    if task.config.test_split:
        config["test_split"] = task.config.test_split
    if config["task"] == "sums":
        config["doc_to_target"] = "{{answer}}"  # lm-eval stops at a column of numbers
    monkeypatch.setattr(ConfigurableTask, "download", lambda self, *_, **__: setattr(self, "dataset", task.dataset))
    plain = ConfigurableTask(config=config)
    if plain.OUTPUT_TYPE == "generate_until":
        plain.set_config("generation_kwargs", {"do_sample": False, "temperature": 0.0}, update=True)
    return plain


def asked(task, docs, **options):
    """The prompt and the request of each document."""
    found = []
    for doc in docs:
        prefix = task.doc_to_prefix(doc)
        context = task.fewshot_context(doc, task.config.num_fewshot, gen_prefix=prefix, **options)
        chat = {key: options[key] for key in ("apply_chat_template", "chat_template") if key in options}
        made = task.construct_requests(doc, context, metadata=(None, None, 1), **chat)
        found += [(one.request_type, one.args) for one in (made if isinstance(made, list) else [made])]
    return found


def test_the_tree_has_each_shape():
    assert sorted(EXPECTED) == NAMES
    kinds = {load_yaml(USER_TASKS / f"{name}.yaml").get("output_type", "generate_until") for name in NAMES}
    assert kinds == {"generate_until", "multiple_choice", "loglikelihood"}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_lm_evals_own_and_begin_with_the_text_that_is_trained_on(name, monkeypatch):
    task = load(name)
    k, source, evaluated = EXPECTED[name]
    assert (task.config.metadata["k"], task.drawn_from, len(task.eval_docs)) == (k, source, evaluated)
    assert task.config.metadata["demonstrations"] == source
    task.build_all_requests(system_instruction="Be brief.")
    made = [(one.request_type, one.args) for one in task.instances]
    plain = twin(task, monkeypatch)
    assert made == asked(plain, task.eval_docs, system_instruction="Be brief.")
    text = in_context_text(task.instances[0].support_set, range(k)).text
    assert all(one.args[0].startswith(text) for one in task.instances)
    assert text.count(task.fewshot_cfg.fewshot_delimiter) >= k


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("multiturn", [True, False])
def test_chats_are_lm_evals_own_and_are_trained_on_through_the_same_template(name, multiturn, monkeypatch, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{{bos_token}}{% for m in messages %}<{{m.role}}>{{m.content|trim}}{% if not loop.last or m.role == 'user' or "
        "not add_generation_prompt %}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def render(messages, add_generation_prompt=True):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def open_or_closed(messages, ask):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)

    options = {
        "system_instruction": "Be brief.",
        "apply_chat_template": True,
        "fewshot_as_multiturn": multiturn,
        "chat_template": render,
    }
    task = load(name)
    k = EXPECTED[name][0]
    task.build_all_requests(**options)
    plain = twin(task, monkeypatch)
    assert [(one.request_type, one.args) for one in task.instances] == asked(plain, task.eval_docs, **options)
    support = task.instances[0].support_set
    if multiturn:
        annotated = conversation_text(support, range(k), open_or_closed)
        assert all(one.args[0].startswith(annotated.text) for one in task.instances)
    else:
        annotated = asked_text(support, range(k), open_or_closed)
        task.sampler.df = task.fewshot_docs()[: k - 1]
        last = task.fewshot_docs()[k - 1]
        if task.fewshot_cfg.doc_to_text == task.config.doc_to_text and not task.multiple_input:
            prefix = task.doc_to_prefix(last)
            prompt = plain.fewshot_context(last, k - 1, gen_prefix=prefix, **options)
            assert annotated.text.startswith(prompt)
    answers = [pair.answer.strip() for pair in support.demonstrations]
    assert [annotated.text[slice(*span)].strip() for span in annotated.targets] == answers
    assert all(annotated.text[slice(*span)].endswith("</s>\n") for span in annotated.answers[-1:])


def test_the_same_seed_draws_the_same_and_another_seed_others():
    drawn = [[doc["country"] for doc in load("capitals", k=4, seed=seed).fewshot_docs()] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    rows = [
        doc["country"]
        for doc in datasets.load_dataset("json", data_files=str(USER_TASKS / "data/capitals.jsonl"))["train"]
    ]
    random.Random(1).shuffle(rows)
    task = load("capitals", k=4, seed=1)
    assert [doc["country"] for doc in [*task.fewshot_docs(), *task.eval_docs]] == rows


def test_a_stated_k_takes_the_place_of_listed_samples():
    task = load("listed_colours", k=4)
    assert task.drawn_from == "split test, and not evaluated"
    assert len(task.fewshot_docs()) == 4
    assert len(task.eval_docs) == 6


def test_process_docs_comes_before_the_drawing():
    task = load("short_capitals", k=3)
    assert all(doc["question"].isupper() for doc in [*task.fewshot_docs(), *task.eval_docs])
    assert len(task.fewshot_docs()) + len(task.eval_docs) == 10


@pytest.mark.parametrize("name", sorted({*NAMES} - {"short_capitals"}))  # whose samples have a form of their own
def test_an_end_to_end_run_learns_what_a_zero_shot_prompt_asks(name, monkeypatch):
    task = load(name, method="e2e")
    assert task.config.num_fewshot == 0
    plain = twin(task, monkeypatch)
    plain.config.num_fewshot = 0
    support = task.support_set()
    for doc, pair in zip(task.fewshot_docs(), support.demonstrations, strict=True):
        learned = support.head(pair) + pair.question + pair.answer
        requests = asked(plain, [doc])
        if task.OUTPUT_TYPE == "generate_until":
            ((_, (prompt, _)),) = requests
            assert learned == prompt + task.config.target_delimiter + pair.answer
        else:
            assert learned in ["".join(args) for _, args in requests]


# Demonstration sources


def write(folder, text, **files):
    (folder / "mine.yaml").write_text(f"task: mine\nclass: !function ttt_harness.TTTTask\n{text}", encoding="utf-8")
    for name, rows in files.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    return folder


def rows(start, stop):
    return [{"q": f"question {i}", "a": f"answer {i}"} for i in range(start, stop)]


HEAD = 'dataset_path: parquet\ndoc_to_text: "{{q}}"\ndoc_to_target: a\n'
SPLITS = "dataset_kwargs: {data_files: {train: train.parquet, validation: validation.parquet, test: test.parquet}}\n"


@pytest.mark.parametrize(
    ("lines", "source", "evaluated"),
    [
        ("", "split train", 20),
        ("test_split: test\n", "split train", 20),
        ("test_split: test\nfewshot_split: validation\n", "split validation", 20),
        ("test_split: test\nvalidation_split: validation\n", "split validation", 20),
        ("test_split: test\nvalidation_split: validation\ntraining_split: train\n", "split train", 20),
        ("validation_split: validation\n", "split train", 10),
        ("test_split: test\nfewshot_split: test\n", "split test, and not evaluated", 17),
        ("test_split: test\nfewshot_config: {split: train, sampler: first_n}\n", "split train, the first", 20),
    ],
)
def test_demonstrations_come_from_the_split_that_is_for_them(tmp_path, lines, source, evaluated):
    files = {"train": rows(0, 30), "validation": rows(30, 40), "test": rows(40, 60)}
    task = load("mine", write(tmp_path, HEAD + SPLITS + lines, **files), k=3)
    assert (task.drawn_from, len(task.eval_docs), len(task.fewshot_docs())) == (source, evaluated, 3)
    if source.endswith("the first"):
        assert list(task.fewshot_docs()) == rows(0, 3)


TEST = "dataset_kwargs: {data_files: {test: test.parquet}}\ntest_split: test\n"
TRAINED = "dataset_kwargs: {data_files: {train: train.parquet, test: test.parquet}}\ntest_split: test\n"
TEENS = "target: \"{{2 if 'question 1' in q else 0}}\""
KINDS = "output_type: multiple_choice\ndoc_to_choice: [x, y]\n"


@pytest.mark.parametrize(
    ("text", "metadata", "telling"),
    [
        (HEAD + TEST + "doc_to_txt: x\n", {}, ["doc_to_txt", "Did you mean 'doc_to_text'?"]),
        (HEAD + TEST + "fewshot_config: {sample: []}\n", {}, ["fewshot_config.sample", "Did you mean 'samples'?"]),
        (HEAD.replace("doc_to_target: a\n", "") + TEST, {}, ["no targets", "add doc_to_target"]),
        (HEAD.replace('doc_to_text: "{{q}}"\n', "") + TEST, {}, ["no doc_to_text"]),
        (HEAD.replace("dataset_path: parquet\n", ""), {}, ["no data set", "add dataset_path"]),
        (HEAD + TEST.replace("test.parquet", "none.parquet"), {}, ["could not be loaded", "none.parquet"]),
        (HEAD + TEST.replace("_split: test", "_split: tset"), {}, ["no split 'tset'", "it has test"]),
        (HEAD + TEST + "fewshot_split: dev\n", {}, ["no split 'dev'", "it has test"]),
        (HEAD + TEST + "process_docs: !function mine.drop\n", {}, ["the split 'test' is empty after process_docs"]),
        (HEAD + TEST, {"k": 20}, ["k=20 is not allowed", "smaller than its number of examples, 20"]),
        (HEAD + TRAINED, {"k": 31}, ["k=31 is not allowed", "which has 30 examples; set k to at most 30"]),
        (HEAD + TRAINED.replace("train.parquet", "test.parquet"), {"k": 4}, ["4 of 4 demonstrations", "overlap"]),
        (HEAD + TEST + "fewshot_config: {samples: [{q: question 41, a: answer 41}, {q: x, a: y}]}\n", {}, ["1 of 2"]),
        (HEAD + TEST + "fewshot_config: {samples: []}\n", {}, ["fewshot_config.samples", "list at least one"]),
        (HEAD + TEST + "fewshot_config: {sampler: balanced}\n", {}, ["'balanced'", "default, first_n"]),
        (HEAD.replace("target: a", "target: ''") + TEST, {}, ["no targets"]),
        (HEAD.replace("target: a", "target: 0") + TEST, {}, ["no targets"]),
        (HEAD.replace("target: a", "target: '{{\" \"}}'") + TEST, {}, ["20 rows", "10 more of the split 'test'"]),
        (HEAD.replace("{{q}}", "{{question}}") + TEST, {}, ["'question' is undefined", "columns are q, a"]),
        (HEAD + TEST + "output_type: loglikelihood_rolling\n", {}, ["whole texts", "method=icl"]),
        (HEAD + TEST + "output_type: generate\n", {}, ["output_type 'generate'"]),
        (HEAD + TEST + "doc_to_image: q\n", {}, ["asks about image", "only text"]),
        (HEAD + TEST + "doc_to_audio: q\n", {}, ["asks about audio", "only text"]),
        (HEAD + TEST + "output_type: multiple_choice\n", {}, ["without choices"]),
        (HEAD.replace("target: a", "target: 2") + TEST + KINDS, {}, ["row 18 of", "the label 2, the number of none"]),
        (HEAD.replace("target: a", TEENS) + TRAINED + KINDS, {"k": 30}, ["demonstration 1 (row", "the label 2"]),
        (HEAD + TEST.replace("{data", "{streaming: true, data"), {}, ["is streamed"]),
        (HEAD + TEST.replace("{data", "{split: test, data"), {}, ["one Dataset and not several splits"]),
        (HEAD + TEST + KINDS, {"vote_permutations": 3}, ["vote_permutations=3"]),
        (HEAD + TEST, {"vote_permutation": 3}, ["vote_permutation is no metadata key", "write vote_permutations"]),
        (HEAD + TEST + "metadata: {leave-one-out: true}\n", {}, ["leave-one-out is no", "write leave_one_out"]),
        (HEAD.replace("parquet", "json") + TEST.replace("test.parquet", "empty.jsonl"), {}, ["it has no rows"]),
    ],
)  # fmt: skip
def test_a_bad_task_is_refused_in_one_sentence_that_names_the_file(tmp_path, text, metadata, telling):
    (tmp_path / "mine.py").write_text("def drop(docs):\n    return docs.select([])\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").touch()
    folder = write(tmp_path, text, train=rows(0, 30), test=rows(40, 60))
    with pytest.raises(TTTError) as refusal:
        load("mine", folder, **metadata)
    message = str(refusal.value)
    assert str(tmp_path / "mine.yaml") in message
    for words in telling:
        assert words in message
    assert "\n" not in message
    assert str(pickle.loads(pickle.dumps(refusal.value))) == message


def test_metadata_may_hold_keys_of_ones_own_and_tokens_may_be_numbers(tmp_path):
    text = HEAD + TEST + "metadata: {author: me, seeded: no}\ngeneration_kwargs: {logit_bias: {5: 1.0}}\n"
    task = load("mine", write(tmp_path, text, train=rows(0, 30), test=rows(40, 60)))
    task.build_all_requests()
    assert task.instances[0].args[1]["logit_bias"] == {5: 1.0}


def test_overlapping_demonstrations_may_be_allowed(tmp_path):
    folder = write(tmp_path, HEAD + TRAINED.replace("train.parquet", "test.parquet"), test=rows(0, 20))
    task = load("mine", folder, k=4, overlap="allow")
    task.build_all_requests()
    assert len(task.eval_docs) == 20


def test_a_task_whose_requests_are_to_be_cached_is_refused():
    with pytest.raises(ConfigError, match="--cache_requests"):
        load("capitals").build_all_requests(cache_requests=True)


def test_a_template_that_takes_no_system_turn_is_refused_with_the_file():
    def template(messages, add_generation_prompt):  # noqa: ARG001 - as of lm-eval's models
        raise ConfigError("no system turn")

    with pytest.raises(ConfigError, match=r"sums \(.*sums.yaml\): no system turn"):
        load("sums").build_all_requests(apply_chat_template=True, chat_template=partial(template))


def test_a_plain_task_is_refused_with_the_three_lines_that_make_it_one(hub, tmp_path):
    hub("openai/gsm8k", {"main": {split: [{"question": "?", "answer": "#### 1"}] * 9 for split in ("train", "test")}})
    config = load_yaml(USER_TASKS / "gsm8k_three_lines.yaml")
    plain = ConfigurableTask(config={key: value for key, value in config.items() if key not in ("class", "tag")})
    plain.config.task = "gsm8k"
    plain.build_all_requests(limit=1)
    with pytest.raises(DataError) as refusal:
        support_set_of(plain.instances[0])
    sentence, _, lines = str(refusal.value).partition("\n")
    assert "gsm8k is not a TTT task" in sentence
    assert "on_plain_task=base" in sentence
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "it.yaml").write_text(lines, encoding="utf-8")
    assert load("gsm8k_ttt", folder, k=2, overlap="allow").OUTPUT_TYPE == "generate_until"
