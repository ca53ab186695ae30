"""The work that both pipelines are given: for each task its training sequences, its prompts and how answers are scored.

It is made once, with the project's own tasks and sequences, so that neither side trains on or answers anything else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_harness.config import TTTConfig, nearest
from ttt_harness.data.sequences import TrainingSequence, in_context_sequences
from ttt_harness.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """A prompt, as text and as token ids, and when its answer ends."""

    text: str
    tokens: tuple[int, ...]
    stop: tuple[str, ...]
    max_tokens: int


@dataclass
class TaskWork:
    """One task: what to fit on, and what to answer."""

    name: str
    sequences: list[TrainingSequence]
    requests: list[Request]
    task: Any  # lm-eval's task object, with one instance for each request

    @property
    def train_tokens(self) -> int:
        """Tokens of all training sequences."""
        return sum(len(sequence.tokens) for sequence in self.sequences)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.tokens) for request in self.requests)

    def accuracy(self, answers: Sequence[str]) -> float:
        """The task's score of `answers` to its first questions, in order, by its own filters and metric."""
        instances = self.task.instances
        for instance, answer in zip(instances, [*answers, *[""] * (len(instances) - len(answers))], strict=True):
            instance.resps = [answer]
            instance.filtered_resps = {}
        self.task.apply_filters()
        scores = []
        for instance in instances[: len(answers)]:
            (filtered,) = instance.filtered_resps.values()
            scores.append(float(self.task.process_results(instance.doc, [filtered])["acc"]))
        return sum(scores) / len(scores)


class Tokenizer:
    """A model's tokenizer, as lm-eval's `vllm` model uses it."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters that each stands for."""
        encoding = self._tokenizer(text, return_offsets_mapping=True)
        return encoding.input_ids, encoding.offset_mapping

    def count(self, text: str) -> int:
        """Tokens of an answer's text."""
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)


class Workload:
    """The tasks `names` (or groups of them) with `limit` questions each, under the fit settings of `config`.

    Raises:
        ConfigError: a name is not that of a TTT task or group.
    """

    def __init__(
        self, tokenizer: Tokenizer, names: Sequence[str], *, limit: int, config: TTTConfig, generation_budget: str
    ) -> None:
        import ttt_harness.task_configs
        from lm_eval.tasks import TaskManager

        folder = Path(ttt_harness.task_configs.__file__).parent
        metadata = {"k": config.k, "seed": config.seed, "generation_budget": generation_budget}
        # lm-eval's own tasks, which nothing here needs, take 12 s to index.
        manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
        self._members: dict[str, list[str]] = {}
        self._work: dict[str, TaskWork] = {}
        for name in dict.fromkeys(names):
            if name not in manager.all_tasks:
                near = nearest(name, manager.all_tasks)
                raise ConfigError(f"--tasks {name}: there is no such task or group in task_configs/.{near}")
            loaded = manager.load([name])["tasks"]
            self._members[name] = list(loaded)
            for leaf, task in loaded.items():
                if leaf not in self._work:
                    self._work[leaf] = _task_work(leaf, task, tokenizer, limit, config)

    def tasks(self, names: Sequence[str]) -> list[TaskWork]:
        """The work of `names`, a group's tasks in its place, each once."""
        return [self._work[leaf] for leaf in dict.fromkeys(leaf for name in names for leaf in self._members[name])]


def _task_work(name: str, task: Any, tokenizer: Tokenizer, limit: int, config: TTTConfig) -> TaskWork:
    task.build_all_requests(limit=limit)
    sequences = in_context_sequences(
        task.instances[0].support_set,
        tokenizer.encode,
        num_permutations=config.num_permutations,
        shuffle=config.shuffle,
        seed=config.seed,
        loss_on=config.loss_on,
    )
    return TaskWork(name, sequences, [_request(tokenizer, instance) for instance in task.instances], task)


def _request(tokenizer: Tokenizer, instance: Any) -> Request:
    text, options = instance.args
    tokens, _ = tokenizer.encode(text)
    return Request(text, tuple(tokens), tuple(options["until"]), int(options["max_gen_toks"]))
