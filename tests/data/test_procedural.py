"""The procedural tasks: right answers in BBH's formats, the same everywhere, and as many as one asks for.

Every answer is checked by a solver that shares nothing with the generators: it reads the question as a person would.
The solvers in turn are checked on the examples of the BBH twins, which also proves that the formats are the same.
"""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from ttt_harness.data.procedural import PROCEDURAL_TASKS, generate_examples, load_procedural
from ttt_harness.errors import ConfigError

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
# Beginnings of the words for the things that are counted, those of the generator and those of BBH.
THINGS = {
    "animals": "bear camel cat chicken cow dog donkey duck fish frog goat horse mouse mice pig rabbit sheep snail "
    "snake turtle owl",
    "fruits": "banana blackberr cherr fig grape lemon mango nectarine peach pear plum raspberr strawberr apple apricot "
    "orange",
    "musical instruments": "banjo cello clarinet drum flute guitar harp piano saxophone trombone trumpet tuba violin "
    "accordion oboe",
    "vegetables": "cabbage carrot cauliflower head garlic leek lettuce parsnip potato radish stalk turnip yam "
    "artichoke onion",
}


def solve_boolean_expressions(text):
    expression = re.fullmatch(r"((?:True|False|and|or|not|\(|\)|\s)+) is", text)[1]
    assert len(expression.split()) == 8
    return str(eval(expression))


def solve_multistep_arithmetic_two(text):
    four = r"-?\d(?: [-+*] -?\d){3}"
    return str(eval(re.fullmatch(rf"(\(\({four}\) [-+*] \({four}\)\)) =", text)[1]))


def solve_dyck_languages(text):
    question = "Complete the rest of the sequence, making sure that the parentheses are closed properly. Input: "
    word = text.removeprefix(question).split(" ")
    pairs = dict(zip(")]}>", "([{<", strict=True))
    stack = []
    for bracket in word:
        if bracket in pairs:
            assert stack.pop() == pairs[bracket]
        else:
            assert bracket in pairs.values()
            stack.append(bracket)
    assert 1 <= len(stack) <= 3
    return " ".join(next(close for close, opening in pairs.items() if opening == b) for b in reversed(stack))


def solve_navigate(text):
    pattern = (
        r"If you follow these instructions, do you return to the starting point\? "
        r"(Always face forward\. )?((?:[A-Z][a-z0-9 ]+\. ?)+)\nOptions:\n- Yes\n- No"
    )
    fixed, body = re.fullmatch(pattern, text).groups()
    position, heading = 0j, 1j
    for instruction in body.strip(".").split(". "):
        if turn := re.fullmatch(r"Turn (left|right|around)", instruction):
            assert not fixed
            heading *= {"left": 1j, "right": -1j, "around": -1}[turn[1]]
            continue
        number, plural, way = re.fullmatch(r"Take (\d+) step(s?)(?: (\w+))?", instruction).groups()
        assert (int(number) != 1) == bool(plural)
        assert bool(way) == bool(fixed)
        position += int(number) * heading * {None: 1, "forward": 1, "backward": -1, "left": 1j, "right": -1j}[way]
    return "Yes" if position == 0 else "No"


def solve_object_counting(text):
    body, kind = re.fullmatch(r"I have (.+, and .+)\. How many ([a-z ]+) do I have\?", text).groups()
    total = 0
    for item in re.split(r", and |, ", body):
        number, thing = item.split(" ", 1)
        assert (number == "an") == (NUMBERS[number] == 1 and thing[0] in "aeiou")
        if kind == "objects" or any(thing.startswith(word) for word in THINGS[kind].split()):
            total += NUMBERS[number]
    return str(total)


def solve_tracking_shuffled_objects_three_objects(text):
    story, options = text.split("\nOptions:\n")
    letters = dict(reversed(line.split(" ", 1)) for line in options.split("\n"))
    start, course = story.split("\n")
    assert start.startswith("Alice, Bob, and Claire are ")
    holdings = r"(Alice|Bob|Claire) (?:gets|is dancing with|has an?|is playing) ([^,.]+?)(?=, |\.$)"
    holds = dict(re.findall(holdings, start.split(": ")[1]))
    assert list(holds.values()) == list(letters)
    swap = r"(First|Then|Finally), (Alice|Bob|Claire) and (Alice|Bob|Claire) (?:swap|switch|trade) [a-z ]+\."
    swaps = re.findall(swap, course)
    assert [when for when, _, _ in swaps] == ["First", "Then", "Finally"]
    for _, one, other in swaps:
        assert one != other
        holds[one], holds[other] = holds[other], holds[one]
    person = re.search(r"At the end of the \w+, (\w+) (?:has|has the|is dancing with|is playing)$", course)[1]
    return letters[holds[person]]


def solve_web_of_lies(text):
    first, chain, last = re.fullmatch(r"Question: (\w+ [a-z ]+)\. (.+)\. Does (\w+) tell the truth\?", text).groups()
    words = {"tells the truth": True, "lies": False}
    person, claim = first.split(" ", 1)
    honest = {person: words[claim]}
    for sentence in chain.split(". "):
        speaker, about, claim = re.fullmatch(r"(\w+) says (\w+) (.+)", sentence).groups()
        assert speaker not in honest
        honest[speaker] = words[claim] == honest[about]
    assert list(honest)[-1] == last
    assert len(honest) == 5
    return "Yes" if honest[last] else "No"


def solve_word_sorting(text):
    left = re.fullmatch(r"Sort the following words alphabetically: List: (\S+(?: \S+)+)", text)[1].split(" ")
    result = []
    while left:
        result.append(left.pop(left.index(min(left))))
    return " ".join(result)


SOLVERS = {name.removeprefix("solve_"): solver for name, solver in globals().items() if name.startswith("solve_")}


def answers(examples):
    return [example["target"] for example in examples]


def test_there_are_at_least_six_tasks_and_each_has_a_solver():
    assert len(PROCEDURAL_TASKS) >= 6
    assert sorted(PROCEDURAL_TASKS) == sorted(SOLVERS)


@pytest.mark.parametrize("data_seed", [0, 1, -7])
@pytest.mark.parametrize("task", PROCEDURAL_TASKS)
def test_answers_are_right_and_no_question_comes_twice(task, data_seed):
    examples = generate_examples(task, 400, data_seed)
    assert len({example["input"] for example in examples}) == 400
    assert answers(examples) == [SOLVERS[task](example["input"]) for example in examples]


@pytest.mark.skipif("TTT_BBH_DIR" not in os.environ, reason="TTT_BBH_DIR is not set: there is no BBH to compare with")
@pytest.mark.parametrize("task", PROCEDURAL_TASKS)
def test_the_solvers_read_and_solve_the_bbh_twin(task):
    path = Path(os.environ["TTT_BBH_DIR"]) / f"{task}.json"
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    assert answers(examples) == [SOLVERS[task](example["input"]) for example in examples]


# Printed by: PYTHONPATH=tests/data python -c "import test_procedural; test_procedural.print_digests()"
DIGESTS = {
    "boolean_expressions": "bbc165eccd4a0c16",
    "dyck_languages": "42bf3499ff8be3ed",
    "multistep_arithmetic_two": "17e87fb924133bec",
    "navigate": "b550e4e9f057c3f6",
    "object_counting": "b45abe11beee38be",
    "tracking_shuffled_objects_three_objects": "1a0f7073f585f0a5",
    "web_of_lies": "bbd0f93291c131cf",
    "word_sorting": "28629128f541fb72",
}


def digest(task):
    text = json.dumps(generate_examples(task, 250, 0), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def print_digests():
    for task in PROCEDURAL_TASKS:
        print(f'    "{task}": "{digest(task)}",')


@pytest.mark.parametrize("task", PROCEDURAL_TASKS)
def test_examples_are_the_same_on_every_machine_and_python(task):
    assert digest(task) == DIGESTS[task]


@pytest.mark.parametrize("task", PROCEDURAL_TASKS)
def test_a_shorter_data_set_is_the_beginning_of_a_longer_one(task):
    assert generate_examples(task, 30, 5) == generate_examples(task, 60, 5)[:30]


@pytest.mark.parametrize("task", PROCEDURAL_TASKS)
def test_another_data_seed_gives_other_examples(task):
    one, other = ({example["input"] for example in generate_examples(task, 50, seed)} for seed in (1, 2))
    assert len(one & other) < 25


@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        ("boolean_expressions", 2),
        ("navigate", 2),
        ("tracking_shuffled_objects_three_objects", 3),
        ("web_of_lies", 2),
    ],
)
def test_each_answer_is_as_frequent_as_the_others(task, kinds):
    counts = Counter(answers(generate_examples(task, 250, 3))).values()
    assert len(counts) == kinds
    assert max(counts) - min(counts) <= 1


def test_dyck_words_lack_one_two_or_three_brackets_equally_often():
    counts = Counter(len(answer.split()) for answer in answers(generate_examples("dyck_languages", 300, 0)))
    assert counts == {1: 100, 2: 100, 3: 100}


def test_the_first_statement_of_a_web_of_lies_does_not_tell_the_answer():
    examples = generate_examples("web_of_lies", 1000, 0)
    same = sum((" lies." in e["input"].split(". ")[0] + ".") == (e["target"] == "No") for e in examples)
    assert 400 < same < 600


def test_any_number_of_examples_is_possible():
    # There are only 2122 boolean expressions of eight words.
    examples = generate_examples("boolean_expressions", 1500, 0)
    assert len({example["input"] for example in examples}) == 1500
    assert len(generate_examples("boolean_expressions", 3000, 0)) == 3000


def test_the_data_set_is_one_split_that_heeds_only_its_own_metadata():
    data = load_procedural(procedural_task="navigate", num_examples=20, version=1.0, seed=43, k=5)
    assert list(data) == ["test"]
    assert data["test"].to_list() == generate_examples("navigate", 20, 0)
    assert len(load_procedural(procedural_task="navigate")["test"]) == 250
    other = load_procedural(procedural_task="navigate", num_examples=20, data_seed=1)
    assert other["test"].to_list() != data["test"].to_list()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"procedural_task": "juggling"}, "no procedural task 'juggling': use one of boolean_expressions, "),
        ({"num_examples": 0}, "num_examples is 0, but must be a whole number of at least 1"),
        ({"num_examples": -3}, "num_examples is -3"),
        ({"num_examples": "many"}, "num_examples is 'many'"),
        ({"num_examples": 2.5}, "num_examples is 2.5"),
        ({"num_examples": True}, "num_examples is True"),
        ({"data_seed": "x"}, "data_seed is 'x', but must be a whole number"),
        ({"data_seed": None}, "data_seed is None"),
    ],
)
def test_bad_arguments_are_named_with_their_rule(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_procedural(**{"procedural_task": "navigate", **arguments})
