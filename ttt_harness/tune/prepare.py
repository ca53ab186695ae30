"""Makes the folds of a loaded task, with all questions and training sequences, before anything is fitted."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ttt_harness.config import TTTConfig
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.data.support import SupportSet
from ttt_harness.errors import ConfigError
from ttt_harness.run.fitter import work_of_fit
from ttt_harness.run.groups import Group, Preparation
from ttt_harness.sweep.loading import Loaded
from ttt_harness.tune.candidates import Setting
from ttt_harness.tune.fitting import Fold
from ttt_harness.tune.folds import folds, orders
from ttt_harness.tune.held_out import Asker
from ttt_harness.tuned import Asked

if TYPE_CHECKING:
    from ttt_harness.harness.task import TTTTask

DEFAULT_FOLDS = 5


@dataclass(frozen=True)
class Prepared:
    """A task with one seed.

    folds: of its demonstrations.
    tokens: that a fit of a run trains on, on all demonstrations and as the mean over the settings.
    """

    task: str
    seed: int
    folds: tuple[Fold, ...]
    tokens: float


def prepare(
    loaded: Loaded, task: str, *, seed: int, count: int | None, order_count: int, settings: Sequence[Setting]
) -> Prepared:
    """Make the folds of a task.

    Args:
        seed: of the demonstrations, of the folds and of the fits.
        count: of folds; None for five, or as many as there are demonstrations.
        order_count: in how many orders of the others a demonstration is asked.
        settings: all that will be tried.

    Raises:
        ConfigError: there are fewer demonstrations than folds, or fewer than two.
        DataError: a demonstration cannot be asked, or a sequence is too long.
    """
    drawn: TTTTask = loaded.tasks[task]
    support = drawn.support_set(**loaded.chat.options())
    k = len(support.demonstrations)
    if count is not None and count > k:
        raise ConfigError(
            f"--folds {count} is not allowed for {drawn.where}, which has {k} demonstrations; use at most {k}, or a "
            "larger k."
        )
    held_out = folds(
        [(one.question, one.answer) for one in support.demonstrations], count or min(DEFAULT_FOLDS, k), seed=seed
    )
    if len(held_out) < 2:
        different = len(held_out)
        raise ConfigError(
            f"{drawn.where} has {different} different demonstration{'' if different == 1 else 's'} (k={k}): one has to "
            "be held out, and another one to stay; set a larger k, or leave the task out."
        )
    asker = Asker(drawn, support, loaded.lm.answering, loaded.chat)
    made = []
    for number, places in enumerate(held_out):
        others = [place for place in range(k) if place not in places]
        questions = tuple(
            asker.question(Asked(seed, place, which), order)
            for place in places
            for which, order in enumerate(orders(others, order_count, seed=seed, held_out=place))
        )
        rest = replace(support, demonstrations=tuple(support.demonstrations[place] for place in others))
        sequences = _Sequences(loaded, task, rest, seed)
        for setting in settings:
            sequences(setting.config)
        made.append(Fold(task, seed, number, questions, sequences))
    whole = _Sequences(loaded, task, support, seed)
    tokens = [work_of_fit(whole(setting.config), setting.epochs) for setting in settings if setting.fits]
    return Prepared(task, seed, tuple(made), statistics.fmean(tokens))


class _Sequences:
    """The training sequences of demonstrations, by the settings that they depend on."""

    def __init__(self, loaded: Loaded, task: str, support: SupportSet, seed: int) -> None:
        self._loaded, self._task, self._support, self._seed = loaded, task, support, seed
        self._made: dict[tuple[object, ...], Sequence[TrainingSequence]] = {}

    def __call__(self, config: TTTConfig) -> Sequence[TrainingSequence]:
        if not config.fits:
            return ()
        asked = (config.num_permutations, config.shuffle, config.loss_on)
        if asked not in self._made:
            self._made[asked] = self._make(config)
        return self._made[asked]

    def _make(self, config: TTTConfig) -> Sequence[TrainingSequence]:
        lm = self._loaded.lm
        group = Group(self._task, [], self._support)
        Preparation(
            method=config.how,
            name=config.method,
            encode=lm.answering.encode,
            render=lm.answering.render_chat,
            max_length=lm.max_length,
            num_permutations=config.num_permutations,
            shuffle=config.shuffle,
            seed=self._seed,
            loss_on=config.loss_on,
            determinants=lambda _: {},
        ).prepare([group])
        assert lm.arguments.shape is not None
        for sequence in group.sequences:
            lm.arguments.shape.check_tokens(sequence.tokens, what=f"{self._task}: a training sequence")
        return group.sequences
