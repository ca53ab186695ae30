"""Complete runs through lm-eval: in-process where several share one engine, and one as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from ttt_harness import cli
from ttt_harness.errors import ConfigError, DataError, ModelError, TTTError

pytestmark = pytest.mark.integration

TASKS = ["procedural_ttt_boolean_expressions", "procedural_ttt_word_sorting"]
FIT = {"k": 3, "num_permutations": 4, "lora_rank": 8, "lr": 1e-2, "epochs": 2}
# One engine serves every in-process run of this file, so all of them ask for the same one.
ENGINE = {"enable_lora": True, "max_lora_rank": 8, "max_model_len": 2048, "dtype": "float32"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def evaluate(tiny_model, store):
    import ttt_harness.task_configs
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = Path(ttt_harness.task_configs.__file__).parent

    def run(tasks=TASKS, limit=6, num_fewshot=None, **model_args):
        args = {"pretrained": str(tiny_model), "adapter_dir": str(store), **ENGINE, **FIT, **model_args}
        # lm-eval's own tasks, which nothing here needs, take 12 s to index.
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=args)
        options = {"task_manager": manager, "num_fewshot": num_fewshot, "limit": limit, "bootstrap_iters": 0}
        return simple_evaluate("ttt_vllm", args, tasks, batch_size=1, **options)

    return run


def answers(results):
    return {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


def prompts(results):
    return {task: [sample["arguments"][0][0] for sample in samples] for task, samples in results["samples"].items()}


@pytest.fixture(scope="module")
def first_run(evaluate):
    return evaluate()


def test_a_run_fits_each_task_and_says_what_it_cost(first_run):
    ttt = first_run["config"]["ttt"]
    assert ttt["settings"]["method"] == "ttt"
    assert ttt["settings"]["lr"] == 1e-2
    assert set(ttt["tasks"]) == set(TASKS)
    for record in ttt["tasks"].values():
        assert record["reused"] is False
        assert record["changes_output"] is True
        assert record["train_sequences"] == 4
        assert record["train_tokens"] > 100
        assert len(record["losses"]) == 2
        assert (record["first_loss"], record["last_loss"]) == (record["losses"][0], record["losses"][-1])
        assert record["fit_seconds"] > 0
        assert record["generate_seconds"] > 0
        files = {path.name for path in Path(record["adapter"]).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "ttt.json"}


def test_a_second_run_fits_nothing_and_gives_the_same_answers(first_run, evaluate, store):
    written = {path: path.stat().st_mtime_ns for path in store.rglob("adapter_*")}
    records = {path: path.read_bytes() for path in store.rglob("ttt.json")}  # whose time is that of the last use
    again = evaluate()
    assert answers(again) == answers(first_run)
    assert all(record["reused"] for record in again["config"]["ttt"]["tasks"].values())
    assert {path: path.stat().st_mtime_ns for path in store.rglob("adapter_*")} == written
    assert {path: path.read_bytes() for path in store.rglob("ttt.json")} == records


def test_answers_beside_fits_are_the_same(first_run, evaluate, tmp_path, monkeypatch):
    """What a GPU with room for both does, here on the CPU."""
    from ttt_harness.run import local
    from ttt_harness.run.schedule import Stages

    monkeypatch.setattr(local, "stages_of", lambda _: Stages.OVERLAPPED)
    beside = evaluate(adapter_dir=str(tmp_path / "adapters"))
    assert answers(beside) == answers(first_run)
    assert not any(record["reused"] for record in beside["config"]["ttt"]["tasks"].values())


def test_a_damaged_adapter_is_fitted_again(first_run, evaluate, caplog):
    adapter = Path(first_run["config"]["ttt"]["tasks"][TASKS[0]]["adapter"])
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    again = evaluate()
    assert "damaged" in caplog.text
    assert answers(again) == answers(first_run)
    assert weights.read_bytes() == whole  # the same seed, the same bytes
    assert again["config"]["ttt"]["tasks"][TASKS[0]]["reused"] is False


def test_other_settings_have_other_adapters(first_run, evaluate):
    other = evaluate(lr=2e-2)
    paths = {record["adapter"] for run in (first_run, other) for record in run["config"]["ttt"]["tasks"].values()}
    assert len(paths) == 4


def test_in_context_runs_ask_the_same_prompts_and_fit_nothing(first_run, evaluate):
    icl = evaluate(method="icl")
    assert prompts(icl) == prompts(first_run)
    assert all(record["adapter"] is None for record in icl["config"]["ttt"]["tasks"].values())


def test_zero_shot_runs_leave_out_the_demonstrations(first_run, evaluate):
    zero = evaluate(method="icl", num_fewshot=0)
    for task in TASKS:
        for short, long in zip(prompts(zero)[task], prompts(first_run)[task], strict=True):
            description, _, question = short.partition("\n\n")
            assert long.startswith(description)
            assert long.endswith(question)
            assert short.count("\nA:") == 1
            assert long.count("\nA:") == 4


@pytest.mark.parametrize(
    ("arguments", "error", "telling"),
    [
        ({"lora_rang": 8}, ConfigError, "Did you mean 'lora_rank'?"),
        ({"method": "tttt"}, ConfigError, "one of ttt, shared_ttt"),
        ({"loss_on": "inputs"}, ConfigError, "one of outputs, all, last"),
        ({"lora_rank": 600}, ConfigError, "from 1 to 512"),
        ({"max_lora_rank": 12}, ConfigError, "vLLM takes one of 8, 16"),
        ({"lora_rank": 64, "max_lora_rank": 8}, ConfigError, "for lora_rank=64"),
        ({"k": 0}, ConfigError, "k=0"),
        ({"k": -1}, ConfigError, "k=-1 is not allowed"),
        ({"k": "ten"}, ConfigError, "k='ten' is not allowed"),
        ({"k": 250}, ConfigError, "smaller than its number of examples, 250"),
        ({"vote_permutations": 0}, ConfigError, "vote_permutations=0"),
        ({"leave_one_out": True, "k": 1}, ConfigError, "with k=1"),
        ({"pretrained": "/nowhere/model"}, ModelError, "there is no such directory"),
        ({"pretrained": None}, ConfigError, "pretrained is missing"),
        ({"k": 90}, DataError, "the context window holds"),
        ({"data_parallel_size": 0}, ConfigError, "data_parallel_size=0 is not allowed"),
        ({"data_parallel_size": 2.5}, ConfigError, "data_parallel_size=2.5 is not allowed"),
    ],
)
def test_bad_input_is_one_sentence_before_any_model_is_loaded(evaluate, arguments, error, telling, monkeypatch):
    from ttt_harness.serving import engine
    from ttt_harness.training import trainer

    def load(*_: object, **__: object):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(engine, "LLM", load)
    monkeypatch.setattr(trainer, "load_base_model", load)
    with pytest.raises(error) as refusal:
        evaluate(**{**arguments})
    assert telling in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_shared_adapter_is_fitted_once_on_all_tasks(evaluate):
    records = evaluate(method="shared_ttt")["config"]["ttt"]["tasks"]
    first, second = (records[task] for task in TASKS)
    assert first["adapter"] == second["adapter"]
    assert first["train_sequences"] == 8


@pytest.mark.parametrize("method", ["e2e", "shared_e2e"])
def test_an_end_to_end_fit_sees_single_pairs_and_is_asked_without_demonstrations(evaluate, method):
    results = evaluate(method=method)
    record = results["config"]["ttt"]["tasks"][TASKS[0]]
    assert record["train_sequences"] == (6 if method == "shared_e2e" else 3)
    assert all(prompt.count("\nA:") == 1 for prompt in prompts(results)[TASKS[0]])


@pytest.mark.parametrize("arguments", [{"loss_on": "all"}, {"loss_on": "last"}, {"shuffle": False}])
def test_each_variant_of_the_fit_has_its_own_adapter(first_run, evaluate, arguments):
    results = evaluate(**arguments)
    for task in TASKS:
        one, other = (run["config"]["ttt"]["tasks"][task] for run in (first_run, results))
        assert one["adapter"] != other["adapter"]
        assert one["losses"] != other["losses"]


def test_a_vote_asks_under_permutations_and_uses_the_same_adapter(first_run, evaluate):
    results = evaluate(vote_permutations=5)
    for task in TASKS:
        assert (
            results["config"]["ttt"]["tasks"][task]["adapter"] == first_run["config"]["ttt"]["tasks"][task]["adapter"]
        )
        for sample in results["samples"][task]:
            asked = [arguments[0] for arguments in sample["arguments"]]
            assert len(set(asked)) == 5
            assert len({"".join(sorted(prompt)) for prompt in asked}) == 1  # the same demonstrations
            assert len({prompt.rpartition("\n\n")[2] for prompt in asked}) == 1  # the same question, last


def test_leave_one_out_leaves_the_last_demonstration_out_of_the_prompt(first_run, evaluate):
    results = evaluate(leave_one_out=True)
    for task in TASKS:
        one, other = prompts(results)[task][0], prompts(first_run)[task][0]
        assert one.count("\nA:") == other.count("\nA:") - 1
        assert other.startswith(one.rpartition("\n\n")[0])


def run_lm_eval(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TTT_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # lm-eval's own vllm starts faster so, too
    command = [sys.executable, "-m", "lm_eval", "run", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_a_user_goes_from_a_qwen3_checkpoint_to_a_report(save_tokenizer, tmp_path):
    model = tmp_path / "Qwen3-tiny"
    model.mkdir()
    write_checkpoint(model, CHECKPOINTS["qwen3"])
    save_tokenizer(model)
    args = f"pretrained={model},k=3,num_permutations=4,lora_rank=8,lr=1e-2"
    result = run_lm_eval(
        tmp_path, "--model", "ttt_vllm", "--model_args", args, "--tasks", "procedural_ttt", "--limit", "3",
        "--output_path", "out", "--log_samples",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "procedural_ttt_boolean_expressions" in result.stdout
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    tasks = results["config"]["ttt"]["tasks"]
    scores = [results["results"][task]["acc,answer"] for task in tasks]
    assert results["groups"]["procedural_ttt"]["acc,answer"] == pytest.approx(sum(scores) / len(scores))
    assert len(list((tmp_path / "cache" / "adapters").iterdir())) == len(tasks) == 8
    (check,) = [record["served_check"] for record in tasks.values() if "served_check" in record]
    assert check["verdict"] == "served as trained"
    assert "procedural_ttt_navigate (4/8): fitting" in result.stderr
    assert "INFO 1" not in result.stderr  # vLLM's start-up lines
    assert cli.main(["report", str(tmp_path / "out"), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Qwen3-tiny" in page
    assert all(task in page for task in tasks)


@pytest.mark.parametrize("option", ["--use_cache", "--model_args"])
def test_the_command_line_ends_with_one_sentence(tiny_model, tmp_path, option):
    args = f"pretrained={tiny_model}" + (",num_permutation=3" if option == "--model_args" else "")
    extra = ["--use_cache", "cache"] if option == "--use_cache" else []
    result = run_lm_eval(
        tmp_path, "--model", "ttt_vllm", "--model_args", args, "--tasks", TASKS[0], "--limit", "2", *extra
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert ("--use_cache" if extra else "Did you mean 'num_permutations'?") in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("model", "args"),
    [
        ("vllm", "enforce_eager=True,dtype=float32,max_model_len=2048,gpu_memory_utilization=0.3"),
        ("hf", "dtype=float32"),
    ],
)
def test_lm_evals_own_models_run_the_same_tasks(tiny_model, tmp_path, first_run, model, args):
    result = run_lm_eval(
        tmp_path, "--model", model, "--model_args", f"pretrained={tiny_model},{args}", "--metadata", '{"k": 3}',
        "--tasks", ",".join(TASKS), "--limit", "6", "--output_path", "out", "--log_samples", "--batch_size", "4",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for task in TASKS:
        (path,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        asked = [sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples]
        assert asked == prompts(first_run)[task]


def test_errors_are_exceptions_to_python_callers():
    assert issubclass(ConfigError, TTTError)
    assert not issubclass(TTTError, SystemExit)
