"""Which rows of a data set are a task's demonstrations, and which are evaluated.

splits = Splits("mine (mine.yaml)", dataset, config)
drawing = splits.draw(settings, listed=None)
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import datasets
from lm_eval.config.task import TaskConfig

from ttt_harness.config import TaskSettings
from ttt_harness.errors import ConfigError, DataError
from ttt_harness.harness.user_code import Row, own_words, shown, user_code

_alone: ContextVar[bool] = ContextVar("demonstrations_alone", default=False)


@contextmanager
def demonstrations_alone() -> Iterator[None]:
    """Keep from the tasks that are made in the block all that they would evaluate: they evaluate their demonstrations.

    A setting is chosen so, and nothing that is chosen by can come from an evaluated question.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@dataclass(frozen=True)
class Drawing:
    """The demonstrations, and the rows that are evaluated.

    where: the task and its YAML, as messages name it.
    demonstrations: in their order in the prompts.
    source: where they come from, in words.
    evaluated: the rows, in the order of evaluation.
    split: the split of the evaluated rows, as their places name it.
    numbers: the place of each evaluated row in its split, counted from 1.
    alone: the evaluated rows are the demonstrations (`demonstrations_alone`).
    """

    where: str
    demonstrations: list[Row]
    source: str
    evaluated: datasets.Dataset
    split: str
    numbers: Sequence[int]
    alone: bool = False

    def rows(self, positions: Sequence[int] | None = None) -> Iterator[Row]:
        """The evaluated rows, or those at `positions` among them.

        Raises:
            DataError: a row cannot be read.
        """
        if positions is None:
            positions, docs = range(len(self.numbers)), iter(self.evaluated)
        else:
            docs = (self.evaluated[position] for position in positions)
        for position in positions:
            number = self.numbers[position]
            with _reading(self.where, number, self.split):
                doc = next(docs)
            yield Row(doc, self.split, number)


@contextmanager
def _reading(where: str, number: int, split: str) -> Iterator[None]:
    """Say which row it is that cannot be read: columns of text are decoded only here."""
    try:
        yield
    except Exception as error:  # of pyarrow and of `datasets`, of many kinds
        raise DataError(
            f"{where}: row {number} of the {split} cannot be read ({own_words(error)}); correct the data, and save "
            "texts as UTF-8."
        ) from error


def listed_samples(where: str, config: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The demonstrations that a YAML lists, if it does.

    Raises:
        ConfigError: `fewshot_config.samples` is no list of examples.
        DataError: it is a function that raises something.
    """
    samples = (config.get("fewshot_config") or {}).get("samples")
    if callable(samples):
        with user_code(where, "fewshot_config.samples"):
            samples = samples()
    if samples is None:
        return None
    if not (isinstance(samples, list) and samples and all(isinstance(sample, Mapping) for sample in samples)):
        raise ConfigError(
            f"{where}: fewshot_config.samples must be a list of examples (mappings of columns), or a function that "
            "returns one; list at least one, or take the key out."
        )
    return samples


class Splits:
    """A data set's splits, and what a declaration makes of them.

    Args:
        where: the task and its YAML, as messages name it.
        dataset: rows by the names of splits.
        config: the declaration.

    Raises:
        DataError: it is not clear which split is evaluated, or that split is not there, empty or streamed.
    """

    def __init__(self, where: str, dataset: Mapping[str, Any], config: TaskConfig) -> None:
        self.where, self.dataset, self.config = where, dataset, config
        self.fewshot: Any = config.fewshot_config
        self.evaluated = config.test_split or config.validation_split or self._default()
        self._pool = self._docs(self.evaluated, config.process_docs)

    def _default(self) -> str:
        """The data set's `test`, its `validation`, or its only split."""
        names = list(self.dataset)
        found = next((name for name in ("test", "validation") if name in names), names[0] if len(names) == 1 else None)
        if found is None:
            raise DataError(
                f"{self.where} does not say which split to evaluate, and the data set has {', '.join(names)}; "
                "add test_split."
            )
        return found

    def _docs(self, split: str, process_docs: Callable[..., Any] | None) -> datasets.Dataset:
        """A split after `process_docs`."""
        if split not in self.dataset:
            raise DataError(
                f"{self.where}: the data set has no split {shown(split)}; it has {', '.join(self.dataset)}: correct "
                "the YAML's test_split, fewshot_split, training_split or validation_split."
            )
        docs = self.dataset[split]
        if isinstance(docs, datasets.IterableDataset):
            raise DataError(
                f"{self.where}: the split '{split}' is streamed, and demonstrations are drawn from a whole split; take "
                "streaming out of dataset_kwargs."
            )
        if process_docs:
            with user_code(self.where, f"process_docs for the split '{split}'"):
                docs = process_docs(docs)
                docs = docs if isinstance(docs, datasets.Dataset) else datasets.Dataset.from_list(list(docs))
        if not isinstance(docs, datasets.Dataset):  # of a custom_dataset, as lm-eval takes it
            with user_code(self.where, f"the split '{split}' of custom_dataset"):
                docs = datasets.Dataset.from_list(list(docs))
        if not len(docs):
            after = " after process_docs" if process_docs else ""
            raise DataError(
                f"{self.where}: the split '{split}' is empty{after}; check the data, or name another split."
            )
        return docs

    def draw(self, settings: TaskSettings, listed: Sequence[Mapping[str, Any]] | None) -> Drawing:
        """The demonstrations, and what is evaluated; for Args and Raises, see `_draw`."""
        drawing = self._draw(settings, listed)
        if not _alone.get() or not drawing.demonstrations:
            return drawing
        rows = datasets.Dataset.from_list([dict(row) for row in drawing.demonstrations])
        numbers = [row.number for row in drawing.demonstrations]
        source = drawing.source
        return Drawing(self.where, drawing.demonstrations, source, rows, "demonstrations", numbers, alone=True)

    def _draw(self, settings: TaskSettings, listed: Sequence[Mapping[str, Any]] | None) -> Drawing:
        """The demonstrations, and what is evaluated.

        Args:
            settings: `k` and `seed`.
            listed: demonstrations that the YAML lists, of which the first k are taken; None to draw them.

        Raises:
            ConfigError: there are not so many examples.
            DataError: the split of the demonstrations is not there, empty or streamed.
        """
        if listed is not None:
            samples = [Row(doc, None, number, number) for number, doc in enumerate(listed[: settings.k], 1)]
            return self._all_evaluated(samples, "fewshot_config.samples")
        config, split = self.config, self.fewshot.split
        process_docs = self.fewshot.process_docs
        if split is None:
            named = (config.training_split, config.validation_split if config.test_split else None)
            split = next((name for name in named if name), "train" if "train" in self.dataset else self.evaluated)
            process_docs = config.process_docs
        if split == self.evaluated:
            return self._taken_out(settings)
        pool = self._docs(split, process_docs)
        if settings.k > len(pool):
            raise ConfigError(
                f"k={settings.k} is not allowed for {self.where}: its demonstrations come from the split '{split}', "
                f"which has {len(pool)} examples; set k to at most {len(pool)}."
            )
        first = self.fewshot.sampler == "first_n"
        order = list(range(settings.k)) if first else _shuffled(len(pool), settings.seed)
        demonstrations = self._demonstrations(pool, order[: settings.k], _split_name(split, process_docs))
        return self._all_evaluated(demonstrations, f"split {split}{', the first' if first else ''}")

    def _all_evaluated(self, demonstrations: list[Row], source: str) -> Drawing:
        name = _split_name(self.evaluated, self.config.process_docs)
        return Drawing(self.where, demonstrations, source, self._pool, name, range(1, len(self._pool) + 1))

    def _taken_out(self, settings: TaskSettings) -> Drawing:
        """Demonstrations out of the evaluated split, of which the others are evaluated."""
        k, pool, split = settings.k, self._pool, self.evaluated
        if self.fewshot.process_docs is not self.config.process_docs:
            raise ConfigError(
                f"{self.where}: fewshot_config.process_docs needs examples of its own, but the demonstrations come out "
                f"of the evaluated split '{split}'; name a fewshot_split, or take fewshot_config.process_docs out."
            )
        if k >= len(pool):
            raise ConfigError(
                f"k={k} is not allowed for {self.where}: k must be smaller than its number of examples, {len(pool)}, "
                "since the others are evaluated."
            )
        order, name = _shuffled(len(pool), settings.seed), _split_name(split, self.config.process_docs)
        demonstrations = self._demonstrations(pool, order[:k], name)
        numbers = [index + 1 for index in order[k:]]
        source = f"split {split}, and not evaluated"
        return Drawing(self.where, demonstrations, source, pool.select(order[k:]), name, numbers)

    def _demonstrations(self, pool: datasets.Dataset, order: Sequence[int], split: str) -> list[Row]:
        rows = []
        for number, index in enumerate(order, 1):
            with _reading(self.where, index + 1, split):
                rows.append(Row(pool[index], split, index + 1, number))
        return rows


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _split_name(split: str, process_docs: Any) -> str:
    return f"split '{split}'{' after process_docs' if process_docs else ''}"
