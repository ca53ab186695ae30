"""A task whose answers a tiny model can learn, loaded as the command loads it."""

import json
from pathlib import Path
from typing import Any

from ttt_harness.config import TTTConfig
from ttt_harness.sweep.lm_eval_call import parse_call
from ttt_harness.sweep.loading import Loaded
from ttt_harness.tune.candidates import Setting
from ttt_harness.tune.loading import load_demonstrations
from ttt_harness.tune.prepare import Prepared, prepare

TASK = """
task: {name}
class: !function ttt_harness.TTTTask
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
doc_to_text: "Q: is {{{{number}}}} large?\\nA:"
doc_to_target: answer
{more}
metadata: {{k: 8}}
"""
FIRST_WORD = """
filter_list:
  - name: first word
    filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]
"""
KINDS = {
    "whole": 'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}',
    "first_word": 'generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8}' + FIRST_WORD,
    "chosen": "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no', 'not at all']",
}
FIT = TTTConfig(lr=3e-3, epochs=4, num_permutations=8, fit_batch_size=2, lora_rank=8, lora_dropout=0.0, k=8)


def write_tasks(folder: Path) -> None:
    """One task for each of `KINDS`."""
    answers = ["yes", "no", "not at all"]
    rows = [{"number": number, "answer": answers[number * 7 % 5 % 3]} for number in range(10, 30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, more in KINDS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=folder / "rows.jsonl", more=more))


def loaded(model: Path, folder: Path, *options: str, **more: Any) -> Loaded:
    """The tasks and the model class, with the demonstrations alone."""
    fit = {name: getattr(FIT, name) for name in ("lora_rank", "lora_dropout", "k")}
    args = {"pretrained": model, "dtype": "float32", **fit, "max_model_len": 512, "adapter_dir": folder / "adapters"}
    text = ",".join(f"{name}={value}" for name, value in {**args, **more}.items())
    given = ["--include_path", str(folder), "--tasks", ",".join(KINDS), "--model_args", text, *options]
    call = parse_call({"output_path": "."}, given)
    return load_demonstrations({**call, "model": "ttt_vllm", "output_path": None, "log_samples": False})


def prepared(of: Loaded, task: str) -> Prepared:
    """Four folds of two demonstrations."""
    setting = Setting("fit", {"method": "ttt"}, FIT)
    return prepare(of, task, seed=42, count=4, order_count=2, settings=[setting])
