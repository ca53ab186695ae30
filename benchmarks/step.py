"""One optimiser step, by this project's trainer and by what a user would write instead: `python -m benchmarks step`.

Each way is a process of its own, so that no memory is another's; the ways take turns, so that a machine that grows
slower favours none. `python -m benchmarks.step IN OUT` is that process. All do the same: the same sequences of random
tokens, the same positions in the loss, LoRA on the same projections, AdamW; dropout is left out, so that the first
losses must agree.

fast, general: this project's trainer, by the layers built from torchtune and by those of transformers.
peft, peft_checkpointing: transformers and peft in a loop of their own, attention through SDPA; the second recomputes
activations, for sequences whose activations do not fit.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import process
from benchmarks.serve import resident
from ttt_harness.data.sequences import TrainingSequence

WAYS = ("fast", "general", "peft", "peft_checkpointing")
# Of the tokens of a sequence, one in so many carries the loss, as about in BBH's demonstrations.
LOSS_EVERY = 12
LR = 1e-4


def measure(
    folder: Path,
    *,
    model_dir: Path,
    ways: Sequence[str],
    tokens: Sequence[int],
    sequences: int,
    steps: int,
    runs: int,
    rank: int,
    machine: Mapping[str, Any],
    limit: float,
    say: Callable[[str], None],
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Measure each way with each length.

    Args:
        folder: for orders and logs.
        model_dir: the base model.
        ways: some of `WAYS`.
        tokens: lengths of sequences.
        sequences: in a step.
        steps: of each process; the first is not counted, and of this project's trainer the first two are not.
        runs: processes of each way and length.
        rank: of the adapter.
        machine: `device` and `dtype`, as `benchmarks.machine` finds them.
        limit: seconds for a process.
        say: tells what is being run.
        keep: is given all that is measured so far, after each process.

    Returns:
        For each process: way, tokens, median `seconds` of a step, `peak_bytes` beyond the imports, and `losses`; or
        `failed`, with the last line of its output.
    """
    found: list[dict[str, Any]] = []
    for run in range(runs):
        for length in tokens:
            for way in ways:
                say(f"run {run + 1}: {way}, {sequences} x {length} tokens")
                work = folder / f"{way}-{length}-{run}"
                work.mkdir(parents=True)
                order = {
                    "way": way,
                    "model_dir": str(model_dir),
                    "tokens": length,
                    "sequences": sequences,
                    "steps": steps,
                    "rank": rank,
                    "device": machine["device"],
                    "dtype": machine["dtype"],
                }
                (work / "order.json").write_text(json.dumps(order))
                command = process.python("benchmarks.step", work / "order.json", work / "answer.json")
                done: dict[str, Any] = {"way": way, "tokens": length}
                try:
                    process.run(f"step, {way}", command, log=work / "log.txt", limit=limit)
                    done |= json.loads((work / "answer.json").read_text())
                except process.StageError as error:
                    done["failed"] = str(error)
                    say(f"  failed: {error}")
                found.append(done)
                keep(found)
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Medians by length and way, in Markdown, with the ratio to the first way that was measured."""
    ways = list(dict.fromkeys(one["way"] for one in found))
    lines = [
        f"| tokens a sequence | {' | '.join(ways)} |",
        f"|---:|{'---:|' * len(ways)}",
    ]
    for length in sorted({one["tokens"] for one in found}):
        cells = []
        first = None
        for way in ways:
            ran = [one for one in found if (one["way"], one["tokens"]) == (way, length) and "failed" not in one]
            if not ran:
                cells.append("failed")
                continue
            seconds = statistics.median(one["seconds"] for one in ran)
            peak = max(one["peak_bytes"] for one in ran) / 2**30
            first = first or seconds
            cells.append(f"{seconds:.3f} s ({seconds / first:.2f}), {peak:.1f} GiB")
        lines.append(f"| {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def made_up(count: int, length: int, vocabulary: int) -> list[TrainingSequence]:
    """`count` sequences of `length` tokens, drawn from the first tokens of a vocabulary; always the same."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    mask = tuple(index % LOSS_EVERY == LOSS_EVERY - 1 for index in range(length))
    rows = torch.randint(3, min(vocabulary, 1000), (count, length), generator=drawn).tolist()
    return [TrainingSequence(tuple(row), mask) for row in rows]


def _ours(order: Mapping[str, Any], *, general: bool) -> tuple[list[float], list[float]]:
    """The seconds and the losses of each step of this project's trainer."""
    import torch

    from ttt_harness.training.general import numbers
    from ttt_harness.training.model_config import read_config
    from ttt_harness.training.shape import ModelShape
    from ttt_harness.training.trainer import Trainer

    folder = Path(order["model_dir"])
    config = read_config(folder)
    shape = ModelShape.from_config(config, where=str(folder))
    if general and shape.way == "fast":
        shape = ModelShape(shape.architecture, way="general", **numbers(config, where=str(folder)))
    trainer = Trainer(
        folder,
        shape,
        rank=order["rank"],
        alpha=order["rank"],
        dropout=0.0,
        dtype=getattr(torch, order["dtype"]),
        device=order["device"],
    )
    ends: list[float] = []
    result = trainer.fit(
        made_up(order["sequences"], order["tokens"], shape.vocab_size),
        batch_size=order["sequences"],
        epochs=order["steps"],
        lr=LR,
        warmup_ratio=0.0,
        seed=0,
        on_step=lambda *_: ends.append(time.perf_counter()),
    )
    return [end - start for start, end in itertools.pairwise(ends)], result.losses


def _peft(order: Mapping[str, Any], *, checkpointing: bool) -> tuple[list[float], list[float]]:
    """The same in a loop as people write it with transformers and peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from ttt_harness.training.general import ADAPTED

    dtype = getattr(torch, order["dtype"])
    model = AutoModelForCausalLM.from_pretrained(order["model_dir"], dtype=dtype, attn_implementation="sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    targets = [name for name in ADAPTED if any(key.endswith(f".{name}") for key, _ in model.named_modules())]
    lora = LoraConfig(r=order["rank"], lora_alpha=order["rank"], target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model.to(order["device"]), lora).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01, fused=True)
    sequences = made_up(order["sequences"], order["tokens"], model.config.vocab_size)
    ids = torch.tensor([sequence.tokens for sequence in sequences], device=order["device"])
    mask = torch.tensor([sequence.loss_mask for sequence in sequences], device=order["device"])
    labels = ids.masked_fill(~mask, -100)
    ends, losses = [time.perf_counter()], []
    for _ in range(order["steps"]):
        loss = adapted(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        ends.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(ends)], losses


def _make(order: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    ways: dict[str, Callable[[], tuple[list[float], list[float]]]] = {
        "fast": lambda: _ours(order, general=False),
        "general": lambda: _ours(order, general=True),
        "peft": lambda: _peft(order, checkpointing=False),
        "peft_checkpointing": lambda: _peft(order, checkpointing=True),
    }
    if order["way"].startswith("peft"):
        import peft  # noqa: F401 - so that its imports are not counted
        import transformers  # noqa: F401
    else:
        import ttt_harness.training.trainer  # noqa: F401
    idle = resident("VmRSS")
    seconds, losses = ways[order["way"]]()
    cuda = order["device"] == "cuda"
    return {
        "seconds": statistics.median(seconds[1:] or seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - idle,
        "losses": losses,
    }


if __name__ == "__main__":
    answer = _make(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
