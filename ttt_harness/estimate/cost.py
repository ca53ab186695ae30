"""What a cell of a grid costs, in tokens to fit and to answer."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from ttt_harness.config import TaskSettings, TTTConfig
from ttt_harness.estimate.tokens import TokenCounts
from ttt_harness.methods import SETTINGS, Sequences
from ttt_harness.run.schedule import Task
from ttt_harness.sweep.grid import Cell
from ttt_harness.tuned.arguments import explicit_arguments


@dataclass(frozen=True)
class CellCost:
    """What one cell costs.

    fits: the tokens of each fit, by the name of the task that it is for, or of the method whose tasks share it.
    tasks: the tokens of each task's answers.
    prefix: for each task, the tokens that a worker reads before the task's first question.
    adapters: what determines the cell's adapters; cells where it is the same share them. Empty without adapters.
    """

    cell: Cell
    fits: Mapping[str, float]
    tasks: tuple[Task, ...]
    prefix: tuple[float, ...]
    adapters: str

    @property
    def fit(self) -> float:
        """The tokens of all fits."""
        return sum(self.fits.values())

    @property
    def answers(self) -> float:
        """The tokens of all answers of one worker, with what is before them."""
        return sum(prefix + task.answer for task, prefix in zip(self.tasks, self.prefix, strict=True))


def cost_of(cell: Cell, counts: Sequence[TokenCounts]) -> CellCost:
    """What the cell costs whose tasks have these tokens."""
    setting = SETTINGS[cell.method]
    method = setting.method
    if method is None:  # random guesses
        guesses = tuple(Task(one.name, None, 0, one.questions) for one in counts)
        return CellCost(cell, {}, guesses, (0,) * len(counts), "")
    args = cell.call["model_args"]
    config = TTTConfig.from_mapping(explicit_arguments(args))
    votes = TaskSettings.from_mapping({**args, **(cell.call.get("metadata") or {})}).vote_permutations
    fits: dict[str, float] = {}
    keys = [(cell.setting if method.shared else one.name) if method.fits else None for one in counts]
    for key, one in zip(keys, counts, strict=True):
        if key is not None:
            fits[key] = fits.get(key, 0.0) + _fit_tokens(config, one)
    answers = [votes * one.questions * (one.question + one.answer) for one in counts]
    in_context = method.prompts_hold_demonstrations and cell.call.get("num_fewshot") != 0
    return CellCost(
        cell=cell,
        fits=fits,
        tasks=tuple(
            Task(one.name, key, answer, one.questions) for one, key, answer in zip(counts, keys, answers, strict=True)
        ),
        prefix=tuple(votes * float(one.demonstrations if in_context else one.description) for one in counts),
        adapters=json.dumps(asdict(config), sort_keys=True) if fits else "",
    )


def _fit_tokens(config: TTTConfig, counts: TokenCounts) -> float:
    """The tokens of a task's training sequences, in all epochs."""
    of_epoch = {
        None: 0,
        Sequences.SINGLE_PAIRS: counts.pairs,
        Sequences.IN_CONTEXT: config.num_permutations * counts.demonstrations,
    }
    return float(config.epochs * of_epoch[config.how.sequences])


def fitted_once(costs: Iterable[CellCost]) -> list[CellCost]:
    """The costs in order, without the fits of adapters that an earlier cell leaves in the store."""
    found, there = [], set()
    for one in costs:
        if one.adapters in there:
            one = replace(one, fits={})
        there.add(one.adapters)
        found.append(one)
    return found
