"""Inputs made after public bug reports, and what is right for each: `lm_eval`'s own command, and result files.

The inputs are no part of the project. They lie in the folder that `TTT_CASES_DIR` names, or in `../shared/cases` beside
the checkout, one folder a case: `cmd` holds the arguments of `lm_eval`, one call a line, to be run from within the
folder. A folder that `EXPECTED` does not know must be scored, or refused in one sentence.

Calls that are to be refused are made where neither an engine nor a trainer can be made: they are refused before.
"""

import contextlib
import io
import json
import logging
import os
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pytest

from ttt_harness.cli import main
from ttt_harness.errors import TTTError

CASES = Path(os.environ.get("TTT_CASES_DIR") or Path(__file__).resolve().parents[3] / "shared" / "cases")
FIT = "num_permutations=2,epochs=1,lora_rank=8,lr=1e-2,dtype=float32,max_model_len=2048"
SCORED = "scored"
NONE = pytest.param(
    None, marks=pytest.mark.skip(reason=f"no cases in {CASES}: name their folder by TTT_CASES_DIR"), id="none"
)
REFUSED_BY_LM_EVAL = "refused by lm-eval itself, as its own class would be"

# What each call of a case has to end with: words of the refusal, or one of the above. None: scored or refused.
EXPECTED: dict[str, list[tuple[str, ...] | str | None]] = {
    "04_choice_index_not_in_list": [("h04", "Red ", "doc_to_target")],
    "06_yaml_norway_choices": [("h06", "doc_to_choice", "quote")],
    "08_choice_quotes_literal_eval": [("h08", "doc_to_choice", "Tom's")],
    "09_metric_typo": [("h09", "exact_mach", "exact_match")],
    "106_lora_local_path": [SCORED],
    "10_aggregation_typo": [("h10", "average", "mean")],
    "11_filter_typo": [("h11", "strip_whitespace", "remove_whitespace")],
    "15_until_empty_string": [("until",)],
    "17_target_looks_like_list": [SCORED],
    "18_null_target": [("h18", "doc_to_target")],
    "22_empty_choice": [("h22", "empty")],
    "24_arc_struct_choices": [("h24", "doc_to_choice", "text")],
    "25_string_label_other_case": [("h25", "Yes")],
    "30_limit_forms": [SCORED, ("limit", "0"), ("limit", "-1"), SCORED],
    "31_samples_unsorted": [SCORED, ("h31", "-1"), ("h31",), ("h31", "99"), ("other",)],
    "32_gen_kwargs": [SCORED, ("temprature", "temperature"), ("temperature", "-1"), ("max_gen_toks", "0"), SCORED],
    "34_predict_only": [SCORED, REFUSED_BY_LM_EVAL],
    "39_context_budget": [("400", "256")],
    "40_gen_toks_beyond_window": [("4096", "2048")],
    "43_metadata_list": [("h43", "metadata")],
    "49_num_fewshot_zero": [("h49", "num_fewshot", "icl")],
    "84_templates_unknown": [("chatml", "tool_use")],
}


@dataclass(frozen=True)
class Call:
    """One line of a case's `cmd`."""

    folder: Path
    number: int
    arguments: str
    expected: tuple[str, ...] | str | None

    @property
    def name(self) -> str:
        return f"{self.folder.name}-{self.number}"


def calls() -> Iterator[Call]:
    for cmd in sorted(CASES.glob("*/cmd")):
        lines = cmd.read_text(encoding="utf-8").splitlines()
        expected = EXPECTED.get(cmd.parent.name, [None] * len(lines))
        assert len(expected) == len(lines), cmd
        for number, (line, one) in enumerate(zip(lines, expected, strict=True), start=1):
            yield Call(cmd.parent, number, line, one)


def results() -> list[Any]:
    """The folders of hostile results files."""
    return [pytest.param(path, id=path.name) for path in sorted(CASES.glob("results_*"))] or [NONE]


def params(wanted: Callable[[Call], bool]) -> list[Any]:
    """The calls to make, or one that says why there are none."""
    return [pytest.param(call, id=call.name) for call in calls() if wanted(call)] or [NONE]


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    said: the refusal, None where the call ended well.
    shown: all that it printed.
    folder: where it was made.
    """

    said: str | None
    shown: str
    folder: Path


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT directory for the tiny model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def templates(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two chat templates, of which none is the default."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("templates") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.chat_template = {"tool_use": f"T: {turn}", "rag": f"R: {turn}"}
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def lm_eval(
    tiny_model: Path,
    adapter: Path,
    templates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[[Call], Outcome]:
    """Makes a call in this process, from within a copy of the case's folder."""
    import datasets
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import _index

    folder = tmp_path / "case"
    # Reading lm-eval's own ten thousand files takes 10 s a call and proves nothing here.
    read = _index.TaskIndex._iter_yaml_files
    own = staticmethod(lambda root: read(root) if root.resolve() == folder.resolve() else [])
    monkeypatch.setattr(_index.TaskIndex, "_iter_yaml_files", own)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("TTT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging, "raiseExceptions", False)  # handlers of earlier calls write to streams that are closed
    values = {"TINY": tiny_model, "FIT": FIT, "ADAPTER": adapter, "TEMPLATES": templates}

    def call(made: Call) -> Outcome:
        shutil.copytree(made.folder, folder)
        monkeypatch.chdir(folder)
        arguments = shlex.split(Template(made.arguments).substitute(values))
        monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *arguments])
        said = None
        try:
            cli_evaluate()
        except TTTError as error:  # the process would end with status 1 and this sentence
            said = str(error)
        except ValueError as error:
            if made.expected != REFUSED_BY_LM_EVAL:
                raise
            said = str(error)
        except SystemExit as end:
            said = "" if end.code in (0, None) else str(end.code)
        captured = capfd.readouterr()
        shown = captured.out + captured.err
        if said is not None and said.isdecimal():  # the sentence has been printed
            said = captured.err.strip().splitlines()[-1]
        return Outcome(said or None, shown, folder)

    return call


@pytest.fixture
def nothing_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import LLM

    from ttt_harness.training.trainer import Trainer

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(LLM, "__init__", load)
    monkeypatch.setattr(Trainer, "__init__", load)


def asks_for_the_right_questions(outcome: Outcome) -> None:
    (path,) = (outcome.folder / "out").rglob("samples_h31_*.jsonl")
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(sample["doc_id"] for sample in samples) == [2, 5, 7]


def says_that_there_is_no_score(outcome: Outcome) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(["summary", str(outcome.folder / "out")]) == 0
    assert "999" not in shown.getvalue()
    assert "no score" in shown.getvalue()


def uses_the_adapter(outcome: Outcome) -> None:
    (path,) = (outcome.folder / "out").rglob("results_*.json")
    record = json.loads(path.read_text(encoding="utf-8"))["config"]["ttt"]["tasks"]["h106"]
    assert Path(record["adapter"]).is_dir()


def takes_the_budget_of_the_command_line(outcome: Outcome) -> None:
    assert "'max_new_tokens': 3" in outcome.shown
    assert "'max_gen_toks'" not in outcome.shown


CHECKS = {
    "106_lora_local_path-1": uses_the_adapter,
    "31_samples_unsorted-1": asks_for_the_right_questions,
    "32_gen_kwargs-5": takes_the_budget_of_the_command_line,
    "34_predict_only-1": says_that_there_is_no_score,
}


def assert_one_sentence(outcome: Outcome) -> None:
    assert "Traceback" not in outcome.shown
    if outcome.said is not None:
        assert "\n" not in outcome.said
        assert len(outcome.said) > 20


@pytest.mark.usefixtures("nothing_can_be_loaded")
@pytest.mark.parametrize("call", params(lambda call: isinstance(call.expected, tuple)))
def test_what_cannot_be_right_is_refused_in_one_sentence(call: Call, lm_eval: Callable[[Call], Outcome]) -> None:
    outcome = lm_eval(call)
    assert outcome.said, "was not refused"
    assert_one_sentence(outcome)
    assert call.expected is not None
    assert [word for word in call.expected if word not in outcome.said] == [], outcome.said


@pytest.mark.integration
@pytest.mark.parametrize("call", params(lambda call: not isinstance(call.expected, tuple)))
def test_what_is_right_is_scored(call: Call, lm_eval: Callable[[Call], Outcome]) -> None:
    outcome = lm_eval(call)
    assert_one_sentence(outcome)
    if call.expected == SCORED:
        assert outcome.said is None
        CHECKS.get(call.name, lambda _: None)(outcome)
    if call.expected == REFUSED_BY_LM_EVAL:
        assert outcome.said


@pytest.mark.parametrize("folder", results())
@pytest.mark.parametrize("command", ["compare", "summary", "report"])
def test_hostile_results_are_shown_as_text_or_refused_in_one_sentence(
    folder: Path, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    status = main(
        [command, str(folder / "icl"), str(folder / "ttt"), *(["-o", str(page)] if command == "report" else [])]
    )
    captured = capfd.readouterr()
    assert status in (0, 1)
    assert "Traceback" not in captured.out + captured.err
    unseen = {c for c in captured.out + captured.err if unicodedata.category(c) == "Cc"}
    assert unseen <= {"\n"}, unseen
    if status:
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
    elif folder.name == "results_markup_method" and command != "report":
        assert "[/x] ttt" in captured.out
