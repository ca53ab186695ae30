"""What a cell of a grid costs, in tokens to fit and to answer."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from ttt_harness.cluster.schedule import Task
from ttt_harness.config import TaskSettings, TTTConfig
from ttt_harness.estimate.tokens import TokenCounts
from ttt_harness.methods import SETTINGS, Sequences
from ttt_harness.sweep.grid import Cell


@dataclass(frozen=True)
class CellCost:
    """What one cell costs.

    tasks: the tokens of each task's own fit and of its answers.
    prefix: for each task, the tokens that a worker reads before the task's first question.
    shared_fit: the tokens of the fit of one adapter for all tasks.
    adapters: what determines the cell's adapters; cells where it is the same share them. Empty without adapters.
    """

    cell: Cell
    tasks: tuple[Task, ...]
    prefix: tuple[float, ...]
    shared_fit: float
    adapters: str

    @property
    def fit(self) -> float:
        """The tokens of all fits."""
        return self.shared_fit + sum(task.fit for task in self.tasks)

    @property
    def answers(self) -> float:
        """The tokens of all answers of one worker, with what is before them."""
        return sum(prefix + task.answer for task, prefix in zip(self.tasks, self.prefix, strict=True))


def cost_of(cell: Cell, counts: Sequence[TokenCounts]) -> CellCost:
    """What the cell costs whose tasks have these tokens."""
    setting = SETTINGS[cell.method]
    method = setting.method
    if method is None:  # random guesses
        tasks = tuple(Task(one.name, 0, 0, one.questions) for one in counts)
        return CellCost(cell, tasks, (0,) * len(counts), 0, "")
    args = cell.call["model_args"]
    config = TTTConfig.from_mapping(args)
    votes = TaskSettings.from_mapping({**args, **(cell.call.get("metadata") or {})}).vote_permutations
    fits = [_fit_tokens(config, one) for one in counts]
    answers = [votes * one.questions * (one.question + one.answer) for one in counts]
    in_context = method.prompts_hold_demonstrations and cell.call.get("num_fewshot") != 0
    return CellCost(
        cell=cell,
        tasks=tuple(
            Task(one.name, 0 if method.shared else fit, answer, one.questions)
            for one, fit, answer in zip(counts, fits, answers, strict=True)
        ),
        prefix=tuple(votes * float(one.demonstrations if in_context else one.description) for one in counts),
        shared_fit=sum(fits) if method.shared else 0.0,
        adapters=json.dumps(asdict(config), sort_keys=True) if any(fits) else "",
    )


def _fit_tokens(config: TTTConfig, counts: TokenCounts) -> float:
    """The tokens of a task's training sequences, in all epochs."""
    of_epoch = {
        None: 0,
        Sequences.SINGLE_PAIRS: counts.pairs,
        Sequences.IN_CONTEXT: config.num_permutations * counts.demonstrations,
    }
    return float((config.epochs or 0) * of_epoch[config.how.sequences])


def fitted_once(costs: Iterable[CellCost]) -> list[CellCost]:
    """The costs in order, without the fits of adapters that an earlier cell leaves in the store."""
    found, there = [], set()
    for one in costs:
        if one.adapters in there:
            one = replace(one, tasks=tuple(replace(task, fit=0) for task in one.tasks), shared_fit=0)
        there.add(one.adapters)
        found.append(one)
    return found
