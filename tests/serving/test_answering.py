"""What is wrong with requests is said before an engine starts; sampling is repeatable, whatever the batch."""

import json
import random

import pytest
from lm_eval.api.instance import Instance
from lm_eval.utils import simple_parse_args_string

from ttt_harness.errors import ConfigError, DataError, ModelError, TTTError

WINDOW = 256


@pytest.fixture(scope="module")
def answering(tiny_model):
    from ttt_harness.serving.answering import Answering
    from ttt_harness.serving.engine import default_engine_args

    made = Answering(tiny_model, {**default_engine_args(), "dtype": "float32", "max_model_len": WINDOW})
    yield made
    assert not made.model.running


def generation(prompt="Q: one?\nA:", task="mine", **arguments):
    given = {"until": ["\n"], "max_gen_toks": 8} | arguments
    return Instance("generate_until", {}, (prompt, given), 0, (task, 0, 1))


def scoring(context, continuation):
    return Instance("loglikelihood", {}, (context, continuation), 0, ("mine", 0, 1))


def prepare(answering, request, kind, **options):
    answering.check(kind, answering.seeded(kind, [request], seed=0), **{"fitted": False, **options})


def refusal(answering, request, kind="generate_until", **options):
    with pytest.raises(TTTError) as caught:
        prepare(answering, request, kind, **options)
    assert "\n" not in str(caught.value)
    assert "mine" in str(caught.value) or isinstance(caught.value, ModelError)
    return caught.value


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        ({"temprature": 0.5}, "Did you mean 'temperature'?"),
        ({"do_sample": True, "temperature": -1}, "temperature=-1 is not allowed"),
        ({"temperature": "hot"}, "temperature='hot' is not allowed"),
        ({"temperature": float("nan")}, "temperature=nan is not allowed"),
        ({"temperature": 10**400}, "too large"),
        ({"temperature": 10**5000}, "vLLM refuses the generation arguments"),
        ({"temperature": -(10**5000)}, "[a number of thousands of digits]"),
        ({"do_sample": "no"}, "it is true or false"),
        ({"do_sample": 1}, "it is true or false"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 is not allowed"),
        ({"max_gen_toks": -3.0}, "max_gen_toks=-3 is not allowed"),
        ({"max_gen_toks": 2.5}, "whole number of tokens"),
        ({"max_gen_toks": True}, "whole number of tokens"),
        ({"max_gen_toks": "1e3"}, "whole number of tokens"),
        ({"max_gen_toks": float("nan")}, "whole number of tokens"),
        ({"max_gen_toks": float("inf")}, "whole number of tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not allowed"),
        ({"max_tokens": [3]}, "max_tokens=[3] is not allowed"),
        ({"until": [""]}, "none of them empty"),
        ({"until": ""}, "none of them empty"),
        ({"until": ["\n", None]}, "none of them empty"),
        ({"until": 5}, "none of them empty"),
        ({"until": {"a": 1}}, "none of them empty"),
        ({"stop": ["x"]}, "use until"),
        ({"n": 2}, "use repeats"),
        ({"num_beams": 4}, "num_beams"),
        ({"detokenize": False}, "answers are texts"),
        ({"output_kind": 1}, "read when they are whole"),
        ({"top_p": 1.5, "do_sample": True}, "top_p must be in (0, 1]"),
        ({"top_p": "high"}, "vLLM refuses the generation arguments"),
        ({"top_k": -2}, "top_k"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"logprobs": 50}, "50"),
        ({"stop_token_ids": [5000]}, "5000"),
        ({"bad_words": [""]}, "bad_words"),
        ({"seed": "lucky"}, "seed"),
        ({"seed": 10**5000}, "vLLM refuses the generation arguments"),
        ({"logit_bias": {1: "much"}}, "vLLM refuses the generation arguments"),
        ({"": 2}, "'' is no generation argument"),
    ],
)
def test_generation_arguments_are_refused_in_one_sentence(answering, arguments, telling):
    assert telling in str(refusal(answering, generation(**arguments)))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"temperature": 0.5, "do_sample": True},
        {"max_gen_toks": None, "max_new_tokens": 3},
        {"max_gen_toks": 8.0},
        {"until": "\n"},
        {"until": []},
        {"until": None},
        {"top_k": 5, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [3]},
    ],
)
def test_generation_arguments_that_vllm_takes_are_taken(answering, arguments):
    answering.check("generate_until", [generation(**arguments)], fitted=False)


def test_answers_are_greedy_unless_sampling_is_asked_for(answering):
    for arguments, temperature in [("", 0), ("do_sample=False", 0), ("temperature=0.7", 0.7)]:
        given = simple_parse_args_string(arguments)
        kwargs, until, budget = answering.modify_gen_kwargs({"until": ["\n"], **given}, eos="</s>")
        assert kwargs["temperature"] == temperature
        assert (until, budget) == (["\n", "</s>"], 256)
    # vLLM's default is 1
    assert "temperature" not in answering.modify_gen_kwargs({"do_sample": True})[0]


def test_each_request_that_samples_has_a_seed_of_its_own_in_any_order(answering):
    requests = [generation(f"Q: {number}?", task, temperature=1.0) for number in range(3) for task in ("one", "two")]
    requests += [generation("Q: 0?", "one", temperature=1.0)]  # a repeat
    seeded = answering.seeded("generate_until", requests, seed=1)
    seeds = [request.args[1]["seed"] for request in seeded]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert not any("seed" in request.args[1] for request in requests)  # what lm-eval logs is the task's

    order = list(range(len(requests) - 1))
    random.Random(0).shuffle(order)
    shuffled = answering.seeded("generate_until", [requests[index] for index in order], seed=1)
    assert [request.args[1]["seed"] for request in shuffled] == [seeds[index] for index in order]
    assert [request.args[1]["seed"] for request in answering.seeded("generate_until", requests, seed=2)] != seeds


def test_greedy_requests_and_those_with_a_seed_stay_as_they_are(answering):
    requests = [generation(), generation(temperature=1.0, seed=7)]
    assert answering.seeded("generate_until", requests, seed=1) == requests
    answers = [scoring("a", "b")]
    assert answering.seeded("loglikelihood", answers, seed=1) == answers


def test_what_a_request_carries_beside_its_arguments_stays_with_it(answering):
    request = generation(temperature=1.0)
    request.support_set = object()
    (seeded,) = answering.seeded("generate_until", [request], seed=1)
    assert seeded.support_set is request.support_set


def test_results_can_state_how_answers_were_drawn(answering):
    greedy = answering.check("generate_until", [generation()], fitted=False)
    assert greedy.sampling is None
    drawn = answering.check("generate_until", [generation(do_sample=True, top_p=0.9)], fitted=False)
    assert drawn.sampling == {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "min_p": 0.0}


def prompt_of(answering, tokens):
    """A text of so many tokens, none of which is special."""
    text = "!" * tokens  # no merge of the tiny tokenizer has it
    assert len(answering.tok_encode(text)) == tokens
    return text


def test_a_prompt_and_its_budget_fill_the_window_and_no_more(answering):
    fits = generation(prompt_of(answering, WINDOW - 40), max_gen_toks=40)
    assert answering.check("generate_until", [generation(), fits], fitted=False).truncated == 0
    over = generation(prompt_of(answering, WINDOW - 39), max_gen_toks=40)
    error = refusal(answering, over)
    assert isinstance(error, DataError)
    for number in (WINDOW - 39, 40, WINDOW):
        assert str(number) in str(error)
    assert "truncate=true" in str(error)
    assert answering.check("generate_until", [over, fits, over], fitted=False, truncate=True).truncated == 2


def test_the_longest_prompt_is_the_one_with_the_most_tokens_not_characters(answering):
    many = prompt_of(answering, WINDOW)
    few = "the result. " * (WINDOW // 8)
    assert len(few) > len(many)
    assert len(answering.tok_encode(few)) < WINDOW - 8
    refusal(answering, generation(many))
    with pytest.raises(DataError, match=f"{WINDOW} tokens"):
        answering.check("generate_until", [generation(few), generation(many)], fitted=False)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("budget", [WINDOW, WINDOW + 1, 100_000])
def test_a_budget_beyond_the_window_is_refused_even_where_prompts_may_be_cut(answering, budget, truncate):
    error = refusal(answering, generation(max_gen_toks=budget), truncate=truncate)
    assert f"may have {budget} tokens" in str(error)


def test_the_default_budget_counts_where_none_is_stated(answering):
    error = refusal(answering, generation(max_gen_toks=None))  # 256 tokens
    assert "may have 256 tokens" in str(error)


def test_a_scored_text_leaves_room_for_the_token_that_vllm_generates(answering):
    text = prompt_of(answering, WINDOW - 1)
    assert answering.check("loglikelihood", [scoring(text[:9], text[9:])], fitted=False).truncated == 0
    too_long = scoring(text[:9], text[8:])
    assert isinstance(refusal(answering, too_long, kind="loglikelihood"), DataError)
    assert answering.check("loglikelihood", [too_long], fitted=False, truncate=True).truncated == 1


def test_a_prompt_without_a_token_is_refused(answering):
    assert "has no token" in str(refusal(answering, generation("")))


def test_an_answer_that_would_be_cut_itself_is_refused_even_where_prompts_may_be(answering):
    text = prompt_of(answering, WINDOW)
    answering.check("loglikelihood", [scoring(text, text[:-2])], fitted=False, truncate=True)
    for context in (text, "!", ""):
        error = refusal(answering, scoring(context, text[1:]), kind="loglikelihood", truncate=True)
        assert f"an answer has {WINDOW - 1} tokens" in str(error)


def test_half_a_character_is_refused(answering):
    assert "surrogates not allowed" in str(refusal(answering, generation("Q: \ud800?")))


def test_texts_that_nothing_stands_before_need_a_token_that_does(answering, monkeypatch):
    monkeypatch.setattr(type(answering), "prefix_token_id", None)
    answering.check("loglikelihood", [scoring("a", "b")], fitted=False)
    assert "prefix_token_id" in str(refusal(answering, scoring("", "b"), kind="loglikelihood"))


def test_whole_texts_are_cut_into_windows(answering):
    text = prompt_of(answering, 3 * WINDOW)
    request = Instance("loglikelihood_rolling", {}, (text,), 0, ("mine", 0, 1))
    assert answering.check("loglikelihood_rolling", [request], fitted=False).truncated == 0


def test_a_refusal_is_a_config_error_that_names_the_remedy(answering):
    error = refusal(answering, generation(top_k=-2))
    assert isinstance(error, ConfigError)
    assert "--gen_kwargs" in str(error)


TURNS = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def with_templates(make_model):
    """Makes an `Answering` of a model whose tokenizer has these chat templates."""
    from ttt_harness.serving.answering import Answering
    from ttt_harness.serving.engine import default_engine_args

    def make(templates):
        folder = make_model()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": templates}))
        return Answering(folder, {**default_engine_args(), "dtype": "float32"})

    return make


def named(**texts):
    return [{"name": name, "template": f"{text} {{{{ messages[0]['content'] }}}}"} for name, text in texts.items()]


def test_the_named_template_renders_prompts_and_training_texts(with_templates):
    model = with_templates(named(short="S", tools="T"))
    for name, text in [("short", "S hello"), ("tools", "T hello"), ("short", "S hello")]:
        recorded = model.chat_template(name)
        assert recorded.startswith(text[0])
        assert model.apply_chat_template(TURNS) == text
        assert model.render_chat(TURNS, True) == text


@pytest.mark.parametrize("name", ["chatml", "", "default", True])
def test_a_template_that_is_not_there_is_refused_with_those_that_are(with_templates, name):
    model = with_templates(named(short="S", tools="T"))
    with pytest.raises(ConfigError, match="one of short, tools"):
        model.chat_template(name)
    with pytest.raises(ConfigError, match="one of short, tools"):
        model.apply_chat_template(TURNS)


def test_the_default_template_is_used_where_none_is_named(with_templates):
    model = with_templates(named(default="D", tools="T"))
    assert model.apply_chat_template(TURNS) == "D hello"
    assert model.chat_template(True).startswith("D")
    assert model.chat_template(False) is None


def test_the_only_template_of_a_model_has_one_name(with_templates):
    model = with_templates(named(only="O")[0]["template"])
    assert model.chat_template(True) == model.chat_template("default")
    with pytest.raises(ConfigError, match="one of default"):
        model.chat_template("chatml")


def test_a_model_without_a_template_says_so(answering):
    for given in (True, "chatml"):
        with pytest.raises(ConfigError, match="has no chat template; leave out"):
            answering.chat_template(given)


def test_thinking_is_no_way_to_score_given_answers(answering, monkeypatch):
    monkeypatch.setattr(answering, "enable_thinking", True)
    assert "enable_thinking" in str(refusal(answering, scoring("a", "b"), kind="loglikelihood"))
