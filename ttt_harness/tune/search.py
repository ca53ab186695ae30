"""Decides which fits a search does: every setting on the first fold, and on each further fold the best so far.

On the first fold, settings that differ only in `epochs` share one fit, the longest, and are scored after their number
of epochs. Such a score is not that of a shorter fit: the learning rate warms up over the first tenth of the steps and
falls to 0 along a cosine, so in the longer fit it is still high at that point. These scores only decide which settings
are dropped; outcomes come from fits as a run does them.

The best third of the settings, and at least two, go on to the second fold; after each further fold the better half goes
on. Settings that are left at the end are fitted on the first fold too. With `full`, no setting is dropped and none
shares a fit. In-context learning needs no fit, and answers on all folds.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ttt_harness.tune.candidates import Setting
from ttt_harness.tune.fitting import Fold, Tried, Worker
from ttt_harness.tune.log import SearchLog
from ttt_harness.tuned import Asked

# task -> setting -> what was asked -> 1 where the answer was right, else 0
Outcomes = dict[str, dict[str, dict[Asked, int]]]
# a share of a fit, and what is being done
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Shared:
    """Settings that are read off one fit; the last one has the most epochs, and is the one that is fitted."""

    settings: tuple[Setting, ...]

    @property
    def fitted(self) -> Setting:
        """The one that is fitted."""
        return self.settings[-1]


@dataclass
class Found:
    """What a search has found.

    outcomes: of in-context learning, and of fits as a run does them.
    screened: as `outcomes`, after so many epochs of a longer fit.
    seconds: setting -> what each of its fits took; of a setting that was only read off, its share of the longer fit.
    tokens: that were fitted, counted once for each epoch.
    fit_time: of all fits, in seconds.
    fits, read: how many fits were done, and how many of them an earlier search had done.
    diverged: setting -> what the trainer said.
    """

    outcomes: Outcomes = field(default_factory=lambda: defaultdict(lambda: defaultdict(dict)))
    screened: Outcomes = field(default_factory=lambda: defaultdict(lambda: defaultdict(dict)))
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0
    fit_time: float = 0.0
    fits: int = 0
    read: int = 0
    diverged: dict[str, str] = field(default_factory=dict)

    def fit_seconds(self, setting: Setting) -> float:
        """The mean time of a fit, 0 where nothing is fitted."""
        return round(statistics.fmean(self.seconds.get(setting.name) or [0.0]), 3)

    def accuracy(self, name: str) -> float:
        """The share of right answers, each task counting alike; also of those that only decide what is dropped."""
        shares = []
        for task in self.outcomes:
            answers = {**self.screened[task].get(name, {}), **self.outcomes[task].get(name, {})}
            shares += [statistics.fmean(answers.values())] if answers else []
        return statistics.fmean(shares) if shares else 0.0


class Search:
    """Tries settings on folds.

    Args:
        folds: of all tasks and seeds.
        settings: the first one is in-context learning.
        worker: fits and asks.
        log: what is done.
        report: told of each step and each fit.
        full: try every setting on every fold.
    """

    def __init__(
        self,
        folds: Sequence[Fold],
        settings: Sequence[Setting],
        worker: Worker,
        log: SearchLog,
        report: Report = lambda *_: None,
        *,
        full: bool = False,
    ) -> None:
        self._folds = folds
        self._in_context, *self._settings = settings
        self._worker, self._log, self._report, self._full = worker, log, report, full
        self.found = Found()

    def run(self) -> Found:
        """Do it all; what the log has is not done again.

        Raises:
            TTTError: a fit fails, or the log cannot be written.
        """
        alive = list(self._settings)
        for number in range(1 + max(fold.number for fold in self._folds)):
            folds = [fold for fold in self._folds if fold.number == number]
            for fold in folds:
                self._try(fold, Shared((self._in_context,)))
            share = number == 0 and not self._full
            for shared in _by_trainer(shared_fits(alive) if share else [Shared((one,)) for one in alive]):
                for fold in folds:
                    self._try(fold, shared)
            if not self._full:
                alive = self._best(alive, kept(len(alive), number))
        for fold in self._folds:
            for setting in alive:
                if fold.number == 0 and not self._is_asked(fold, setting):
                    self._try(fold, Shared((setting,)))
        return self.found

    def _is_asked(self, fold: Fold, setting: Setting) -> bool:
        """Whether a fit as a run does it has answered what the fold holds out."""
        answers = self.found.outcomes[fold.task][setting.name]
        return all(question.asked in answers for question in fold.questions)

    def _try(self, fold: Fold, shared: Shared) -> None:
        fitted, found = shared.fitted, self.found
        config = replace(fitted.config, seed=fold.seed)
        epochs = [setting.epochs for setting in shared.settings] if fitted.fits else [0]
        where = f"{fold.task}, seed {fold.seed}, fold {fold.number + 1}: {fitted.name}"
        key = self._worker.key(fold, config, epochs)
        tried = self._log.get(key)
        if tried is None:
            tried = self._worker.tried(
                fold,
                config,
                epochs,
                lambda done, steps, loss: self._report(
                    fitted.epochs / steps, f"{where}, step {done}/{steps}, loss {loss:.3f}"
                ),
            )
            self._log.add(key, fold, fitted.name, tried)
        else:
            found.read += fitted.fits
            self._report(float(fitted.epochs), f"{where}, done before")
        self._take(fold, shared, tried)

    def _take(self, fold: Fold, shared: Shared, tried: Tried) -> None:
        fitted, found = shared.fitted, self.found
        found.fits += fitted.fits
        found.tokens += tried.tokens
        found.fit_time += tried.seconds
        for setting in shared.settings:
            as_run = setting is fitted
            answers = tried.outcomes[setting.epochs if fitted.fits else 0]
            (found.outcomes if as_run else found.screened)[fold.task][setting.name].update(answers)
            if tried.diverged:
                found.diverged[setting.name] = tried.diverged
            elif fitted.fits and (as_run or fold.number == 0):
                found.seconds[setting.name].append(tried.seconds * setting.epochs / max(fitted.epochs, 1))

    def _best(self, alive: Sequence[Setting], count: int) -> list[Setting]:
        """The best so far, in the order of the grid; of equals the cheaper, then the earlier one."""
        ranked = sorted(
            alive, key=lambda one: (-self.found.accuracy(one.name), one.epochs * one.config.num_permutations)
        )
        return [setting for setting in alive if setting in ranked[:count]]


def kept(alive: int, number: int) -> int:
    """How many of so many settings go on after the fold of this number."""
    least = min(alive, 2 if number == 0 else 1)
    return max(least, math.ceil(alive / (3 if number == 0 else 2)))


def shared_fits(settings: Sequence[Setting]) -> list[Shared]:
    """The settings, those that differ in their epochs alone together."""
    together: dict[object, list[Setting]] = {}
    for setting in settings:
        together.setdefault(setting.shared_fit, []).append(setting)
    return [Shared(tuple(sorted(some, key=lambda one: one.epochs))) for some in together.values()]


def _by_trainer(shared: Sequence[Shared]) -> Iterator[Shared]:
    """Those that one loaded model fits, one after the other."""
    groups: dict[object, list[Shared]] = {}
    for one in shared:
        config = one.fitted.config
        groups.setdefault((config.lora_rank, config.lora_alpha, config.lora_dropout), []).append(one)
    for group in groups.values():
        yield from group


def planned_epochs(folds: Sequence[Fold], settings: Sequence[Setting], *, full: bool) -> float:
    """Epochs that a search fits, where what goes on has as many as the settings have on average."""
    counts: Mapping[int, int] = _counts(folds)
    mean = statistics.fmean(setting.epochs for setting in settings)
    alive, total = len(settings), 0.0
    for number, count in sorted(counts.items()):
        if number == 0 and not full:
            total += count * sum(shared.fitted.epochs for shared in shared_fits(settings))
        else:
            total += count * alive * mean
        alive = alive if full else kept(alive, number)
    return total if full else total + counts[0] * alive * mean


def _counts(folds: Sequence[Fold]) -> dict[int, int]:
    counts: dict[int, int] = defaultdict(int)
    for fold in folds:
        counts[fold.number] += 1
    return counts
