"""The answer rules, on a table of odd outputs, and the score."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.filters import build_filter_ensemble

from ttt_harness.errors import ConfigError
from ttt_harness.harness.filters import AnswerFilter, extract_answer, majority, score_answer


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        # nothing there
        ("word", "", ""),
        ("sequence", "", ""),
        ("letter", "", ""),
        ("word", " \n\t ", ""),
        ("sequence", " \n\t ", ""),
        ("letter", " \n\t ", ""),
        # one word
        ("word", " True", "true"),
        ("word", " True.", "true"),
        ("word", "Yes, because", "yes,"),
        ("word", "False\n\nQ: and so on", "false"),
        ("word", "\n\nNo", "no"),
        ("word", "valid\u00a0argument", "valid"),
        ("word", " -12", "-12"),
        ("word", "- 12", "-"),
        ("word", "3.5", "3"),
        ("word", "1,000", "1,000"),
        ("word", ".5", ""),
        ("word", "...", ""),
        ("word", "ÄPFEL Birnen", "äpfel"),
        ("word", "十二 个", "十二"),
        ("word", "**Yes**", "**yes**"),
        ("word", "a-b c", "a-b"),
        # sequences
        ("sequence", " ] ) >", "] ) >"),
        ("sequence", " ] ]\n> >", "] ]"),
        ("sequence", "\n ] ]", "] ]"),
        ("sequence", "] ]\r\nQ:", "] ]"),
        ("sequence", "Apple Bear CAT", "apple bear cat"),
        ("sequence", "a-b c", "a"),
        ("sequence", "apple bear - in order", "apple bear"),
        ("sequence", "-12", ""),
        ("sequence", "- apple bear", ""),
        ("sequence", "apple bear. Done", "apple bear"),
        ("sequence", "apple  bear", "apple  bear"),
        ("sequence", "a.b-c", "a"),
        ("sequence", "don't it&t", "don't it&t"),
        # letters
        ("letter", " (A)", "(a)"),
        ("letter", "A", "(a)"),
        ("letter", "a)", "(a)"),
        ("letter", "B.", "(b)"),
        ("letter", "(C).", "(c)"),
        ("letter", "(B) because (A) is wrong", "(b)"),
        ("letter", "Answer: (A)", "(a)"),
        ("letter", "The", "(t)"),
        ("letter", "(", "("),
        ("letter", "(a", "(a"),
        ("letter", "( A )", "("),
        ("letter", "[A]", "([)"),
        ("letter", ".", ""),
        ("letter", ".A", ""),
        ("letter", "-A", "(-)"),
        ("letter", "\n(D)\nQ:", "(d)"),
        ("letter", "É", "(é)"),
    ],
)
def test_the_answer_is_cut_out_of_the_text(rule, text, answer):
    assert extract_answer(text, rule) == answer


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        ([], ""),
        (["b"], "b"),
        (["a", "b", "b"], "b"),
        (["b", "a"], "a"),
        (["b", "c", "a", "c", "b"], "b"),
        (["", "", "a"], ""),
    ],
)
def test_the_most_frequent_answer_wins_and_of_several_the_first_in_order(answers, winner):
    assert majority(answers) == winner


@pytest.mark.parametrize(
    ("target", "results", "accuracy"),
    [
        ("True", ["true"], 1.0),
        ("True", [["true"]], 1.0),
        (" (A)\n", ["(a)"], 1.0),
        ("True", ["tru"], 0.0),
        ("True", [""], 0.0),
        ("Monsters, Inc", ["(m)"], 0.0),
        ("Yes", [["yes"], ["no"], ["yes"]], 1.0),
        ("Yes", [["yes"], ["no"]], 0.0),
        ("No", ["yes", "no"], 1.0),
        ("No", [["yes", "no", "no"]], 1.0),
        ("No", [[]], 0.0),
    ],
)
def test_the_vote_of_a_document_is_compared_with_its_target(target, results, accuracy):
    assert score_answer({"input": "?", "target": target}, results) == {"acc": accuracy}


def test_lm_eval_finds_the_filter_by_its_name_and_keeps_order_and_number():
    instances = [Instance("generate_until", {}, ("?", {}), 0, resps=texts) for texts in ([" A", "(B)"], ["c."])]
    build_filter_ensemble("answer", [["bbh_answer", {"rule": "letter"}]]).apply(instances)
    assert [instance.filtered_resps["answer"] for instance in instances] == [["(a)", "(b)"], ["(c)"]]


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="no rule 'number': use one of word, sequence, letter"):
        AnswerFilter(rule="number")
