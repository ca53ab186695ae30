"""How long a grid takes on 1 to 64 GPUs: its cost in tokens, measured rates, and the schedule of the run.

The tokens are counted on the tasks themselves, with the model's tokenizer (`tokens`). Tokens of a fit are those of its
training sequences, times its epochs (`cost`). Tokens of answers are those that a question has of its own and those of
its answer (as long as the task's own answers are, which a model that goes on writing exceeds), and the demonstrations
once for each worker that answers, since the prefix cache keeps them. An adapter that several cells share is fitted
once. The rates are those of a run, or given (`rates`).

Two ways to use many GPUs are compared: one run whose tasks are spread over workers (`data_parallel_size`), cell after
cell, and one job of SLURM for each cell. What is left out: loading the tasks, scoring, and a queue's waiting time.
"""

import heapq
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_harness.config import TaskSettings
from ttt_harness.errors import ConfigError
from ttt_harness.estimate.cost import CellCost, cost_of, fitted_once
from ttt_harness.estimate.rates import Rates, measured_rates, newest_benchmark
from ttt_harness.estimate.tokens import TokenCounts, count_tokens, encoder
from ttt_harness.run.schedule import Fit, Piece, Schedule, Stages, simulate
from ttt_harness.sweep.command import grid_of
from ttt_harness.sweep.display import duration
from ttt_harness.sweep.grid import Cell
from ttt_harness.sweep.grid_file import read_grid_file
from ttt_harness.sweep.lm_eval_call import one_task_index
from ttt_harness.terminal import visible

MOST_GPUS = 64
# Workers that are busy for less than this part of the time are held up by something else than the work.
BUSY = 0.9


@dataclass(frozen=True)
class Estimate:
    """The time of a grid on some GPUs, in seconds, and what keeps it from being shorter."""

    gpus: int
    seconds: float
    bound: str


def spread_tasks(cells: Sequence[CellCost], rates: Rates, gpus: int, gpus_per_worker: int = 1) -> Estimate:
    """One run, the tasks of each cell over all workers, cell after cell."""
    workers = gpus // gpus_per_worker
    total, longest = rates.start, ("", 0.0)
    for one in cells:
        schedule = Schedule(one.fits, one.tasks, workers, fit_cost=rates.answer / rates.fit)
        done = simulate(schedule, workers, _seconds(one, rates), rates.stages)
        total += max((piece.end for piece in done), default=0.0)
        fits = [(piece.piece.key, piece.end - piece.begin) for piece in done if isinstance(piece.piece, Fit)]
        longest = max([longest, *fits], key=lambda named: named[1])
    return Estimate(gpus, total, _bound(cells, rates, workers, workers, total, f"the longest fit, {longest[0]}"))


def spread_cells(cells: Sequence[CellCost], rates: Rates, gpus: int, gpus_per_worker: int = 1) -> Estimate:
    """One job for each cell, in the order of the grid, on as many workers as there are."""
    workers = gpus // gpus_per_worker
    free = [0.0] * workers
    longest = (0.0, "")
    for one in cells:
        done = simulate(Schedule(one.fits, one.tasks, 1), 1, _seconds(one, rates), rates.stages)
        seconds = rates.start + max((piece.end for piece in done), default=0.0)
        longest = max(longest, (seconds, one.cell.name))
        heapq.heappush(free, heapq.heappop(free) + seconds)
    total = max(free)
    return Estimate(gpus, total, _bound(cells, rates, workers, len(cells), total, f"the longest cell, {longest[1]}"))


def _fit_seconds(one: CellCost, rates: Rates) -> float:
    return one.fit / rates.fit


def _answer_seconds(one: CellCost, rates: Rates) -> float:
    return one.answers / rates.answer


def _bound(cells: Sequence[CellCost], rates: Rates, workers: int, starts: int, total: float, otherwise: str) -> str:
    """The largest part of the work where the workers are busy all the time, else what some of them wait for."""
    parts = {
        "the fits": sum(_fit_seconds(one, rates) for one in cells),
        "the answers": sum(_answer_seconds(one, rates) for one in cells),
        "the starts": starts * rates.start,
    }
    both = rates.stages is Stages.OVERLAPPED  # then the longer of the two is what the other is hidden behind
    busy = max(parts["the fits"], parts["the answers"]) + parts["the starts"] if both else sum(parts.values())
    if busy < BUSY * workers * total:
        return otherwise
    return max(parts, key=lambda name: parts[name])


def _seconds(one: CellCost, rates: Rates) -> Callable[[Piece], float]:
    def seconds(piece: Piece) -> float:
        if isinstance(piece, Fit):
            return one.fits[piece.key] / rates.fit
        task = one.tasks[piece.task]
        share = (piece.stop - piece.start) / task.questions
        return (one.prefix[piece.task] + share * task.answer) / rates.answer

    return seconds


def cheapest(estimates: Iterable[Estimate], deadline: float) -> Estimate | None:
    """The estimate with the fewest GPUs that ends within `deadline` seconds; None where none does."""
    return min((one for one in estimates if one.seconds <= deadline), key=lambda one: one.gpus, default=None)


def seconds_of(text: str) -> float:
    """A deadline: `90` (seconds), `40m`, `2h`, `1.5d`.

    Raises:
        ConfigError: it is none.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--deadline {text} is not allowed: write 90 (seconds), 40m, 2h or 1.5d.")
    return seconds


def plan(
    *,
    methods: str | None,
    seeds: str | None,
    grid: Sequence[str] | None,
    config: Path | None,
    options: Sequence[str],
    measured: Path | None,
    fit_rate: float | None,
    answer_rate: float | None,
    start_seconds: float | None,
    deadline: str | None,
) -> int:
    """Print how long the grid takes on 1, 2, 4, ... GPUs. Returns the exit status.

    Args:
        methods, seeds, grid, config: as of `ttt-harness sweep`.
        options: all others, which are those of `lm_eval run`; --output_path is not needed.
        measured: a run to take the rates from; by default the newest in benchmarks/results.
        fit_rate, answer_rate, start_seconds: of one worker, in the place of measured ones.
        deadline: find the fewest GPUs that meet it.

    Raises:
        TTTError: the grid or the options are not allowed, or there are no rates.
    """
    limit = seconds_of(deadline) if deadline else None
    given = {"fit_rate": fit_rate, "answer_rate": answer_rate}
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value} is not allowed: it is a number of tokens per second above 0.")
    if start_seconds is not None and not 0 <= start_seconds < float("inf"):
        raise ConfigError(f"--start_seconds {start_seconds} is not allowed: it is a number of seconds, at least 0.")
    file = {"output_path": "plan", **(read_grid_file(config) if config else {})}
    cells, _ = grid_of(methods=methods, seeds=seeds, grid=grid, file=file, options=options)
    model_args = cells[0].call["model_args"]
    each = _gpus_per_worker(model_args)
    source = None
    if None in given.values():
        source = measured or newest_benchmark(Path("benchmarks/results"))
        if source is None:
            raise ConfigError(
                "there are no measured rates: give a run with --measured DIR, or --fit_rate and --answer_rate (tokens "
                "per second of one worker)."
            )
    counts = _counts(cells, model_args)
    rates = _rates(counts[0], source, fit_rate, answer_rate, start_seconds)
    _print(fitted_once(cost_of(cell, own) for cell, own in zip(cells, counts, strict=True)), rates, each, limit)
    return 0


def _counts(cells: Sequence[Cell], model_args: Mapping[str, Any]) -> list[list[TokenCounts]]:
    """The tokens of each cell's tasks, counted once for each draw of demonstrations."""
    encode = encoder(model_args)
    counted: dict[tuple[int, int], list[TokenCounts]] = {}
    found = []
    with one_task_index():
        for cell in cells:
            draw = cell.seed, TaskSettings.from_mapping(cell.call["model_args"] | cell.call["metadata"]).k
            if draw not in counted:
                counted[draw] = count_tokens(cell, encode)
            found.append(counted[draw])
    return found


def _rates(
    counts: Sequence[TokenCounts],
    source: Path | None,
    fit_rate: float | None,
    answer_rate: float | None,
    start_seconds: float | None,
) -> Rates:
    """The rates that are given, and those of the run `source` for the others."""
    if source is None:
        assert fit_rate is not None
        assert answer_rate is not None
        return Rates(fit_rate, answer_rate, start_seconds or 0.0, "as given")
    found = measured_rates(source, {one.name: one for one in counts}, start_seconds)
    return Rates(fit_rate or found.fit, answer_rate or found.answer, found.start, found.source, found.stages)


def _gpus_per_worker(model_args: Mapping[str, Any]) -> int:
    given = model_args.get("tensor_parallel_size", 1)
    if type(given) is not int or given < 1:
        raise ConfigError(f"tensor_parallel_size={given!r} is not allowed: it is a whole number of GPUs, at least 1.")
    return given


def _print(cells: Sequence[CellCost], rates: Rates, each: int, deadline: float | None) -> None:
    fits, answers = sum(one.fit for one in cells), sum(one.answers for one in cells)
    tasks = len(cells[0].tasks)
    print(
        f"{len(cells)} cell{'s' * (len(cells) > 1)} of {tasks} task{'s' * (tasks > 1)}: "
        f"{fits / 1e6:.4g} M tokens to fit, {answers / 1e6:.4g} M to answer."
    )
    print(
        f"One worker ({each} GPU{'s' * (each > 1)}): {rates.fit:.0f} tokens/s to fit, {rates.answer:.0f} to answer, "
        f"{rates.start:.0f} s to start ({visible(rates.source)})."
    )
    print()
    rows = [("GPUs", "one run, tasks spread", "bound by", "one SLURM job a cell", "bound by")]
    gpus = each
    while gpus <= max(MOST_GPUS, each):
        one, other = spread_tasks(cells, rates, gpus, each), spread_cells(cells, rates, gpus, each)
        rows.append(
            (str(gpus), duration(one.seconds), visible(one.bound), duration(other.seconds), visible(other.bound))
        )
        gpus *= 2
    width = max(len(bound) for _, _, bound, _, _ in rows)
    for number, spread, bound, jobs, bound_of_jobs in rows:
        print(f"{number:>4}  {spread:>21}  {bound:{width}}  {jobs:>20}  {bound_of_jobs}")
    if deadline is not None:
        _print_cheapest(cells, rates, each, deadline)
    sys.stdout.flush()


def _print_cheapest(cells: Sequence[CellCost], rates: Rates, each: int, deadline: float) -> None:
    numbers = range(each, max(MOST_GPUS, each) + 1, each)
    best = {
        way: cheapest((estimate(cells, rates, gpus, each) for gpus in numbers), deadline)
        for way, estimate in {"one run": spread_tasks, "one SLURM job a cell": spread_cells}.items()
    }
    met = {way: one for way, one in best.items() if one}
    print()
    if not met:
        print(f"No number of GPUs up to {numbers[-1]} ends within {duration(deadline)}.")
        return
    way, one = min(met.items(), key=lambda found: (found[1].gpus, found[1].seconds))
    print(
        f"Within {duration(deadline)}: {one.gpus} GPU{'s' * (one.gpus > 1)} ({way}, {duration(one.seconds)}, "
        f"{one.gpus * one.seconds / 3600:.3g} GPU hours)."
    )
