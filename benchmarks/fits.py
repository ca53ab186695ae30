"""Fits with nothing beside them: `python -m benchmarks.fits IN OUT` makes some in a process of its own.

What they take at most is all that comes after the imports: base weights, adapter, gradients, optimiser and activations.
On a CPU that is the largest resident set so far, less what is resident after the imports; on a GPU what torch has
allocated at most.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import process
from benchmarks.serve import resident
from ttt_harness.config import TTTConfig
from ttt_harness.data.sequences import TrainingSequence

# The promise: at most this many times the base weights, and this many bytes.
WEIGHTS_FACTOR, FIXED_BYTES = 2.5, 2**30


def make(
    fits: Sequence[Sequence[TrainingSequence]],
    folder: Path,
    *,
    model_dir: Path,
    config: TTTConfig,
    dtype: str,
    device: str,
    beside: int | None,
    limit: float,
) -> dict[str, Any]:
    """Fit an adapter on each of `fits`, one epoch, one after the other.

    Args:
        beside: tokens that a sequence may have in the engine that the trainer leaves room for on a GPU; None for none.

    Returns:
        `seconds` of each fit, `peak_bytes` of all, `base_bytes` of the base weights, and `limit_bytes`, the promise.

    Raises:
        StageError: the process failed or took longer than `limit` seconds.
    """
    folder.mkdir(parents=True)
    order = {
        "model_dir": str(model_dir),
        "dtype": dtype,
        "device": device,
        "lora": {"rank": config.lora_rank, "alpha": config.lora_alpha, "dropout": config.lora_dropout},
        "batch_size": config.fit_batch_size,
        "beside": beside,
        "fits": [[[list(sequence.tokens), list(sequence.loss_mask)] for sequence in fit] for fit in fits],
    }
    (folder / "order.json").write_text(json.dumps(order))
    process.run(
        f"{len(fits)} fit(s)",
        process.python("benchmarks.fits", folder / "order.json", folder / "answer.json"),
        log=folder / "log.txt",
        limit=limit,
    )
    return json.loads((folder / "answer.json").read_text())


def filling(sequence: TrainingSequence, length: int, count: int = 2) -> list[TrainingSequence]:
    """`count` sequences of `length` tokens: the given one, again and again.

    Two are enough: sequences that fill the context pass through the model one by one, so that the second already meets
    what a batch of any size leaves behind, its gradient. Five of them would take minutes on a CPU.
    """
    repeats = length // len(sequence.tokens) + 1
    long = TrainingSequence((sequence.tokens * repeats)[:length], (sequence.loss_mask * repeats)[:length])
    return [long] * count


def _make(order: dict[str, Any]) -> dict[str, Any]:
    import torch

    from ttt_harness.run.memory import Sizes, gpu_budget, plan_memory
    from ttt_harness.training.model_config import read_config
    from ttt_harness.training.shape import ModelShape
    from ttt_harness.training.trainer import Trainer

    idle = resident("VmRSS")
    cuda = order["device"] == "cuda"
    model_dir = Path(order["model_dir"])
    shape = ModelShape.from_config(read_config(model_dir), where=str(model_dir))
    dtype = getattr(torch, order["dtype"])
    share: dict[str, int] = {}
    if cuda and order["beside"]:
        sizes = Sizes.of(shape, order["lora"]["rank"], dtype)
        if plan := plan_memory(gpu_budget(), sizes, [order["beside"]]):
            share = {"activation_bytes": plan.activations, "memory_bytes": plan.trainer}
    trainer = Trainer(model_dir, shape, **order["lora"], dtype=dtype, device=order["device"], **share)
    seconds = []
    for fit in order["fits"]:
        sequences = [TrainingSequence(tuple(tokens), tuple(loss_mask)) for tokens, loss_mask in fit]
        result = trainer.fit(sequences, batch_size=order["batch_size"], epochs=1, lr=1e-4, warmup_ratio=0.0, seed=0)
        seconds.append(result.seconds)
    base = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if not p.requires_grad)
    return {
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - idle,
        "base_bytes": base,
        "limit_bytes": int(WEIGHTS_FACTOR * base + FIXED_BYTES),
    }


if __name__ == "__main__":
    answer = _make(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
