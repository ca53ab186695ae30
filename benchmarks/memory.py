"""What a fit takes at most: `python -m benchmarks.memory IN OUT` fits one batch in a process of its own.

Counted is all that comes after the imports: base weights, adapter, gradients, optimiser and activations. On a CPU that
is the largest resident set so far, less what is resident after the imports; on a GPU what torch has allocated at most.
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


def fit_peak(
    sequences: Sequence[TrainingSequence],
    folder: Path,
    *,
    model_dir: Path,
    config: TTTConfig,
    dtype: str,
    device: str,
    limit: float,
) -> dict[str, int]:
    """Fit one batch of `sequences` (a step for each batch) and return `peak_bytes`, and `base_bytes` of the weights.

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
        "sequences": [[list(sequence.tokens), list(sequence.labelled)] for sequence in sequences],
    }
    (folder / "order.json").write_text(json.dumps(order))
    longest = max(len(sequence.tokens) for sequence in sequences)
    process.run(
        f"memory of a fit, sequences of {longest} tokens",
        process.python("benchmarks.memory", folder / "order.json", folder / "answer.json"),
        log=folder / "log.txt",
        limit=limit,
    )
    return {**json.loads((folder / "answer.json").read_text()), "tokens": longest}


def filling(sequence: TrainingSequence, length: int, count: int = 2) -> list[TrainingSequence]:
    """`count` sequences of `length` tokens: the given one, again and again.

    Two are enough: sequences that fill the context pass through the model one by one, so that the second already meets
    what a batch of any size leaves behind, its gradient. Five of them would take minutes on a CPU.
    """
    repeats = length // len(sequence.tokens) + 1
    long = TrainingSequence((sequence.tokens * repeats)[:length], (sequence.labelled * repeats)[:length])
    return [long] * count


def _fit(order: dict[str, Any]) -> dict[str, int]:
    import torch

    from ttt_harness.training.checkpoint import ModelShape, read_config
    from ttt_harness.training.trainer import Trainer

    idle = resident("VmRSS")
    model_dir = Path(order["model_dir"])
    shape = ModelShape.from_config(read_config(model_dir), where=str(model_dir))
    dtype = getattr(torch, order["dtype"])
    trainer = Trainer(model_dir, shape, **order["lora"], dtype=dtype, device=order["device"])
    sequences = [TrainingSequence(tuple(tokens), tuple(labelled)) for tokens, labelled in order["sequences"]]
    trainer.fit(sequences, batch_size=order["batch_size"], epochs=1, lr=1e-4, warmup_ratio=0.0, seed=0)
    cuda = order["device"] == "cuda"
    base = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if not p.requires_grad)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - idle,
        "base_bytes": base,
        "limit_bytes": int(WEIGHTS_FACTOR * base + FIXED_BYTES),
    }


if __name__ == "__main__":
    answer = _fit(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
