"""What determines an adapter: its settings, which name it together with the base model and the training sequences."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttt_harness.adapters.names import adapter_key
from ttt_harness.data.sequences import TrainingSequence

# Part of every adapter's name; raise it when a change of the code changes what the same settings lead to.
FIT_VERSION = 4


@dataclass(frozen=True)
class FitSettings:
    """What determines an adapter, besides the base model's weights and the training sequences.

    dtype: of the weights, by torch's name ("bfloat16"); device: "cuda" or "cpu".
    """

    dtype: str
    device: str
    rank: int
    alpha: float
    dropout: float
    batch_size: int
    epochs: int
    lr: float
    warmup_ratio: float
    seed: int

    def loop(self) -> dict[str, Any]:
        """The arguments of `Trainer.fit`."""
        return {
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "lr": self.lr,
            "warmup_ratio": self.warmup_ratio,
            "seed": self.seed,
        }

    def determinants(self, base_model: str, sequences: Sequence[TrainingSequence]) -> dict[str, Any]:
        """All that the adapter depends on that is fitted on `sequences`; `base_model` is the hash of the base model."""
        pairs = [(sequence.tokens, sequence.loss_mask) for sequence in sequences]
        return {
            "fit_version": FIT_VERSION,
            "base_model": base_model,
            "sequences": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
            "dtype": f"torch.{self.dtype}",
            "device": self.device,
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "fit": self.loop(),
        }

    def key(self, base_model: str, sequences: Sequence[TrainingSequence]) -> str:
        """The name of the adapter that is fitted on `sequences`; see `determinants`."""
        return adapter_key(self.determinants(base_model, sequences))
