"""What the torchtune recipe of the original pipeline reads: sequences that are tokens already.

The recipe's YAML names both functions; torchtune imports them by path.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from ttt_harness.data.sequences import TrainingSequence


def write_sequences(path: Path, sequences: list[TrainingSequence]) -> None:
    """Write one JSON line for each sequence: `tokens`, and `labels` with -100 where no loss is taken."""
    with path.open("w") as file:
        for sequence in sequences:
            labels = [
                token if predicted else CROSS_ENTROPY_IGNORE_IDX
                for token, predicted in zip(sequence.tokens, sequence.loss_mask, strict=True)
            ]
            file.write(json.dumps({"tokens": sequence.tokens, "labels": labels}) + "\n")


class TokenizedDataset(Dataset):
    """The sequences of a file that `write_sequences` made."""

    def __init__(self, path: str) -> None:
        self._rows = [json.loads(line) for line in Path(path).read_text().splitlines()]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._rows[index]


def tokenized_dataset(tokenizer: Any, path: str) -> TokenizedDataset:  # noqa: ARG001 - the recipe passes it
    """The dataset component."""
    return TokenizedDataset(path)


def padding_only(pad_id: int) -> SimpleNamespace:
    """The tokenizer component: the recipe takes nothing from it but the token that it pads with."""
    return SimpleNamespace(pad_id=pad_id)
