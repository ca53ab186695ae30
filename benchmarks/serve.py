"""One vLLM engine that answers tasks one after the other, in a process of its own: `python -m benchmarks.serve IN OUT`.

It serves the original pipeline as that does it (vLLM's defaults, no prefix caching), and measures this project's engine
with adapters and without. What is asked comes as a JSON file (`write_order`), what it took goes into another:

    import_seconds, start_seconds    until vLLM is imported; until its engine is ready
    passes                           one for each pass asked for: adapter and together (whether), seconds,
                                     tasks: name -> seconds (none of a pass together)
    answers, generated               of the first pass: task -> texts; task -> tokens of each answer
    idle_bytes, peak_bytes           resident after the imports, and at most (on a GPU: the card's memory in use)
"""

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.workload import TaskWork


def write_order(
    path: Path,
    work: Sequence[TaskWork],
    *,
    engine: Mapping[str, Any],
    adapters: Mapping[str, str],
    passes: Sequence[str],
    own_engine: bool,
    lengths: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write what a serving process is to do.

    Args:
        path: the file.
        work: the tasks.
        engine: arguments of vLLM's `LLM`.
        adapters: task -> PEFT directory.
        passes: all requests are answered once for each entry: `base` (without adapters), `adapter` (each task's with
            its adapter, one task after the other) or `together` (likewise, but all tasks' in one batch).
        own_engine: this project's engine, its defaults and its environment, rather than vLLM's.
        lengths: task -> number of tokens that each answer is made to have, in place of the tasks' own stops.
    """
    tasks = []
    for task in work:
        requests: dict[str, Any] = {"prompts": [list(request.tokens) for request in task.requests]}
        if lengths is None:
            requests["params"] = [{"max_tokens": r.max_tokens, "stop": list(r.stop)} for r in task.requests]
        else:
            requests["params"] = [{"max_tokens": n, "min_tokens": n, "ignore_eos": True} for n in lengths[task.name]]
        tasks.append({"name": task.name, "adapter": adapters[task.name], **requests})
    order = {"engine": dict(engine), "own_engine": own_engine, "passes": list(passes), "tasks": tasks}
    path.write_text(json.dumps(order))


def serve(order: Mapping[str, Any]) -> dict[str, Any]:
    """Start the engine, answer, and return what it took."""
    start = time.perf_counter()
    if order["own_engine"]:
        from ttt_harness.serving.environment import prepare_environment

        prepare_environment()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine: Any
    if order["own_engine"]:
        from ttt_harness.serving.engine import Engine, default_engine_args

        engine = Engine(**{**default_engine_args(), **order["engine"]})
        imported, idle = time.perf_counter(), resident("VmRSS")
        llm = engine.start()
    else:
        imported, idle = time.perf_counter(), resident("VmRSS")
        engine = llm = LLM(**order["engine"])
    started = time.perf_counter()
    requests = {
        task["name"]: LoRARequest(lora_name=task["name"], lora_int_id=number, lora_path=task["adapter"])
        for number, task in enumerate(order["tasks"], 1)
    }
    result: dict[str, Any] = {
        "import_seconds": imported - start,
        "start_seconds": started - imported,
        "idle_bytes": idle,
        "passes": [],
        "answers": {},
        "generated": {},
    }
    if order["own_engine"]:
        # The first requests of an engine are slow; passes are compared by the others.
        short = [{"prompt_token_ids": task["prompts"][0][:16]} for task in order["tasks"]]
        engine.generate(short, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    for kind in order["passes"]:
        if order["own_engine"]:
            llm.reset_prefix_cache()
        seconds = {}
        for batch in [order["tasks"]] if kind == "together" else [[task] for task in order["tasks"]]:
            prompts = [{"prompt_token_ids": prompt} for task in batch for prompt in task["prompts"]]
            params = [SamplingParams(temperature=0, **values) for task in batch for values in task["params"]]
            adapters = [requests[task["name"]] for task in batch for _ in task["prompts"]]
            begin = time.perf_counter()
            outputs = engine.generate(
                prompts, params, use_tqdm=False, lora_request=None if kind == "base" else adapters
            )
            seconds[batch[0]["name"]] = time.perf_counter() - begin
            if not result["passes"]:
                (only,) = batch
                result["answers"][only["name"]] = [output.outputs[0].text for output in outputs]
                result["generated"][only["name"]] = [len(output.outputs[0].token_ids) for output in outputs]
        together = kind == "together"
        result["passes"].append(
            {
                "adapter": kind != "base",
                "together": together,
                "seconds": sum(seconds.values()),
                "tasks": {} if together else seconds,
            }
        )
    result["peak_bytes"] = _peak()
    return result


def resident(field: str) -> int:
    """Bytes, of `VmRSS` (resident now) or `VmHWM` (at most so far), of this process; 0 where the system has no such."""
    path = Path("/proc/self/status")
    match = re.search(rf"^{field}:\s*(\d+) kB", path.read_text(), re.MULTILINE) if path.is_file() else None
    return int(match.group(1)) * 1024 if match else 0


def _peak() -> int:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    return resident("VmHWM")


if __name__ == "__main__":
    answer = serve(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
