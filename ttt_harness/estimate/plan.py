"""How long a grid takes on 1 to 64 GPUs: its work in tokens, measured rates, and the schedule of the run.

The work is counted on the tasks themselves, with the model's tokenizer. Tokens of a fit are those of its training
sequences, times its epochs; tokens of answers are those that a question has of its own and those of its answer (as long
as the task's own answers are, which a model that goes on writing exceeds), and the demonstrations once for each worker
that answers, since the prefix cache keeps them. An adapter that several methods share is fitted once.

Two ways to use many GPUs are compared: one run whose tasks are spread over workers (`data_parallel_size`), cell after
cell, and one job of SLURM for each cell. What is left out: loading the tasks, scoring, and a queue's waiting time.
"""

import heapq
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ttt_harness.cluster.schedule import Piece, Schedule, Task, simulate
from ttt_harness.config import TTTConfig
from ttt_harness.errors import ConfigError, ReportError
from ttt_harness.methods import SETTINGS
from ttt_harness.report.results import find_runs
from ttt_harness.sweep.display import duration
from ttt_harness.sweep.grid import Cell

MOST_GPUS = 64
# Workers that are busy for less than this part of the time are held up by something else than the work.
BUSY = 0.9


@dataclass(frozen=True)
class Rates:
    """What one worker does.

    fit, answer: tokens per second; start: seconds until it is ready; source: where the figures are from.
    """

    fit: float
    answer: float
    start: float
    source: str


@dataclass(frozen=True)
class Tokens:
    """The tokens of one task, with one draw of its demonstrations.

    description: before the demonstrations; demonstrations: all of them with the description; pairs: each of them alone
    with the description, summed; question, answer: of each on average, of its own.
    """

    name: str
    description: int
    demonstrations: int
    pairs: int
    question: float
    answer: float
    questions: int


@dataclass(frozen=True)
class CellWork:
    """What one cell asks for: its tasks, and the name under which other cells find their adapters.

    prefix: tokens that each worker reads before a task's first question; shared_fit: tokens of one fit for all tasks.
    """

    cell: Cell
    tasks: tuple[Task, ...]
    prefix: tuple[float, ...]
    shared_fit: float
    adapters: str


def count_tokens(cell: Cell, encode: Callable[[str], Sequence[Any]]) -> list[Tokens]:
    """Load the cell's tasks and count their tokens.

    Raises:
        TTTError: a task is unknown, has no data, or is no TTT task.
    """
    from ttt_harness.harness.task import TTTTask, support_set_of
    from ttt_harness.sweep.runner import load_tasks

    limit = cell.call.get("limit")
    found = []
    for name, task in load_tasks(cell).items():
        if not isinstance(task, TTTTask):
            support_set_of(_Named(name))  # says what to do
        support = task.support_set(cell.call.get("system_instruction"))
        texts = [d.question + d.answer + d.ending for d in support.demonstrations]
        docs = list(task.eval_docs)
        if limit is not None:
            docs = docs[: int(limit) if limit >= 1 else -(-len(docs) * limit // 1)]
        asked = [len(encode(task.doc_to_text(doc))) for doc in docs]
        answered = [len(encode(f" {task.doc_to_target(doc)}\n\n")) for doc in docs]
        found.append(
            Tokens(
                name=name,
                description=len(encode(support.description)),
                demonstrations=len(encode(support.description + "".join(texts))),
                pairs=sum(len(encode(support.description + text)) for text in texts),
                question=sum(asked) / len(docs),
                answer=sum(answered) / len(docs),
                questions=len(docs),
            )
        )
    return found


@dataclass(frozen=True)
class _Named:
    task_name: str


def work_of(cell: Cell, tokens: Sequence[Tokens]) -> CellWork:
    """What the cell's method makes of its tasks' tokens."""
    args = cell.call["model_args"]
    if SETTINGS[cell.method].model != "ttt_vllm":  # random guesses
        return CellWork(cell, tuple(Task(one.name, 0, 0, one.questions) for one in tokens), (0,) * len(tokens), 0, "")
    config = TTTConfig.from_mapping(args)
    votes = {**(cell.call.get("metadata") or {}), **args}.get("vote_permutations", 1)
    alone = config.method.endswith("e2e") or cell.call.get("num_fewshot") == 0
    fits = [0.0] * len(tokens)
    if SETTINGS[cell.method].fits:
        pairs, epochs = config.method.endswith("e2e"), config.epochs or 0
        fits = [
            float(epochs * (one.pairs if pairs else config.num_permutations * one.demonstrations)) for one in tokens
        ]
    shared = config.method.startswith("shared_")
    tasks = tuple(
        Task(one.name, 0 if shared else fit, votes * one.questions * (one.question + one.answer), one.questions)
        for one, fit in zip(tokens, fits, strict=True)
    )
    prefix = tuple(votes * float(one.description if alone else one.demonstrations) for one in tokens)
    adapters = json.dumps(asdict(config), sort_keys=True) if any(fits) else ""
    return CellWork(cell, tasks, prefix, sum(fits) if shared else 0.0, adapters)


def fitted_once(cells: Iterable[CellWork]) -> list[CellWork]:
    """The cells in order, those without a fit whose adapters an earlier one leaves in the store."""
    found, there = [], set()
    for one in cells:
        if one.adapters in there:
            tasks = tuple(Task(task.name, 0, task.answer, task.questions) for task in one.tasks)
            one = CellWork(one.cell, tasks, one.prefix, 0, one.adapters)
        there.add(one.adapters)
        found.append(one)
    return found


@dataclass(frozen=True)
class Estimate:
    """The time of a grid on some GPUs, in seconds, and what keeps it from being shorter."""

    gpus: int
    seconds: float
    bound: str


def spread_tasks(cells: Sequence[CellWork], rates: Rates, gpus: int, gpus_per_worker: int = 1) -> Estimate:
    """One run, the tasks of each cell over all workers, cell after cell."""
    workers = gpus // gpus_per_worker
    total, longest = rates.start, ("", 0.0)
    for one in cells:
        schedule = Schedule(one.tasks, workers, fit_cost=rates.answer / rates.fit)
        done = simulate(schedule, workers, _seconds(one, rates))
        shared = one.shared_fit / rates.fit  # by one worker, while the others wait
        total += shared + max((piece.end for piece in done), default=0.0)
        fits = [(one.tasks[piece.piece.task].name, piece.end - piece.begin) for piece in done if piece.piece.fits]
        longest = max([longest, *fits, (one.cell.method, shared)], key=lambda named: named[1])
    return Estimate(gpus, total, _bound(cells, rates, workers, workers, total, f"the longest fit, {longest[0]}"))


def spread_cells(cells: Sequence[CellWork], rates: Rates, gpus: int, gpus_per_worker: int = 1) -> Estimate:
    """One job for each cell, in the order of the grid, on as many workers as there are."""
    workers = gpus // gpus_per_worker
    free = [0.0] * workers
    longest = (0.0, "")
    for one in cells:
        seconds = rates.start + sum(_fit_and_answer(one, rates))
        longest = max(longest, (seconds, one.cell.name))
        heapq.heappush(free, heapq.heappop(free) + seconds)
    total = max(free)
    return Estimate(gpus, total, _bound(cells, rates, workers, len(cells), total, f"the longest cell, {longest[1]}"))


def _fit_and_answer(one: CellWork, rates: Rates) -> tuple[float, float]:
    """The seconds of a cell's fits and of its answers on one worker."""
    fit = one.shared_fit + sum(task.fit for task in one.tasks)
    answer = sum(prefix + task.answer for task, prefix in zip(one.tasks, one.prefix, strict=True))
    return fit / rates.fit, answer / rates.answer


def _bound(cells: Sequence[CellWork], rates: Rates, workers: int, starts: int, total: float, otherwise: str) -> str:
    """The largest part of the work where the workers are busy all the time, else what some of them wait for."""
    fit, answer = (sum(part) for part in zip(*(_fit_and_answer(one, rates) for one in cells), strict=True))
    parts = {"the fits": fit, "the answers": answer, "the starts": starts * rates.start}
    if sum(parts.values()) < BUSY * workers * total:
        return otherwise
    return max(parts, key=lambda name: parts[name])


def _seconds(one: CellWork, rates: Rates) -> Callable[[Piece], float]:
    def seconds(piece: Piece) -> float:
        task = one.tasks[piece.task]
        if piece.fits:
            return task.fit / rates.fit
        share = (piece.stop - piece.start) / task.questions
        return (one.prefix[piece.task] + share * task.answer) / rates.answer

    return seconds


def cheapest(estimates: Iterable[Estimate], deadline: float) -> Estimate | None:
    """The estimate with the fewest GPUs that ends within `deadline` seconds; None where none does."""
    return min((one for one in estimates if one.seconds <= deadline), key=lambda one: one.gpus, default=None)


# Rates


def measured_rates(path: Path, tokens: Mapping[str, Tokens], start: float | None) -> Rates:
    """The rates of a run: a result of `lm_eval --model ttt_vllm`, or of the benchmark.

    Args:
        path: a results file, or a folder with some, of which the newest with a fit counts.
        tokens: of the tasks by name; the run's tasks have to be among them.
        start: seconds of a worker's start, in place of 0 where the run does not tell them.

    Raises:
        ConfigError: there is no such run, or it has none of the tasks.
    """
    records, seconds = _records(path)
    fits = [one for one in records.values() if one.get("fit_seconds") and not one.get("reused")]
    answers = {name: one for name, one in records.items() if name in tokens and one.get("generate_seconds")}
    if not fits:
        raise ConfigError(f"{path} holds no run with a fit that could be timed; give --fit_rate and --answer_rate.")
    if not answers:
        raise ConfigError(f"{path} holds none of these tasks, whose answers could be timed; give --answer_rate.")
    asked = 0.0
    for name, one in answers.items():
        own = tokens[name]
        asked += own.demonstrations + one["requests"] * (own.question + own.answer)
    return Rates(
        fit=sum(one["train_tokens"] for one in fits) / sum(one["fit_seconds"] for one in fits),
        answer=asked / sum(one["generate_seconds"] for one in answers.values()),
        start=start if start is not None else seconds,
        source=str(path),
    )


def _records(path: Path) -> tuple[Mapping[str, Mapping[str, Any]], float]:
    """What a run tells of each of its tasks, and the seconds of its start as far as it tells them."""
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}.") from None
        runs = content.get("runs") if isinstance(content, dict) else None
        if isinstance(runs, list):
            for run in reversed(runs):
                if own := run.get("stages", {}).get("ours"):
                    rest = own["seconds"] - own["fit_seconds"] - own["generate_seconds"]
                    return own["tasks"], max(0.0, rest)
            raise ConfigError(f"{path} holds no run of this project; give --fit_rate and --answer_rate.")
    try:
        found = find_runs(path)
    except ReportError as error:
        raise ConfigError(f"--measured: {error}.") from None
    for one in reversed(found):
        records = (one.config.get("ttt") or {}).get("tasks") or {}
        if any(record.get("fit_seconds") and not record.get("reused") for record in records.values()):
            return records, 0.0
    return {}, 0.0


def newest_benchmark(folder: Path) -> Path | None:
    """The newest results of the benchmark in `folder`."""
    files = [file for file in folder.glob("*.json") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


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


# The command


def plan(
    *,
    methods: str | None,
    seeds: str | None,
    options: Sequence[str],
    measured: Path | None,
    fit_rate: float | None,
    answer_rate: float | None,
    start_seconds: float | None,
    deadline: str | None,
) -> int:
    """Print how long the grid takes on 1, 2, 4, ... GPUs. Returns the exit status.

    Args:
        methods, seeds: as of `ttt-harness sweep`.
        options: all others, which are those of `lm_eval run`; --output_path is not needed.
        measured: a run to take the rates from; by default the newest in benchmarks/results.
        fit_rate, answer_rate, start_seconds: of one worker, in the place of measured ones.
        deadline: find the fewest GPUs that meet it.

    Raises:
        TTTError: the grid or the options are not allowed, or there are no rates.
    """
    from ttt_harness.sweep.grid import cells_of, parse_methods, parse_seeds
    from ttt_harness.sweep.runner import lm_eval_call, one_task_index

    limit = seconds_of(deadline) if deadline else None
    for name, value in (("fit_rate", fit_rate), ("answer_rate", answer_rate)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value} is not allowed: it is a number of tokens per second above 0.")
    call = lm_eval_call({"output_path": "plan"}, options)
    cells = cells_of(parse_methods(methods), parse_seeds(seeds), call)
    each = _gpus_per_worker(call["model_args"])
    source = measured
    if fit_rate is None or answer_rate is None:
        source = measured or newest_benchmark(Path("benchmarks/results"))
        if source is None:
            raise ConfigError(
                "there are no measured rates: give a run with --measured DIR, or --fit_rate and --answer_rate (tokens "
                "per second of one worker)."
            )
    encode = _encoder(call["model_args"])
    counted: dict[int, list[Tokens]] = {}
    with one_task_index():
        for cell in cells:
            if cell.seed not in counted:
                counted[cell.seed] = count_tokens(cell, encode)
    if fit_rate is not None and answer_rate is not None:
        rates = Rates(fit_rate, answer_rate, start_seconds or 0.0, "as given")
    else:
        assert source is not None
        tokens = {one.name: one for one in counted[cells[0].seed]}
        found = measured_rates(source, tokens, start_seconds)
        rates = Rates(fit_rate or found.fit, answer_rate or found.answer, found.start, found.source)
    work = fitted_once(work_of(cell, counted[cell.seed]) for cell in cells)
    _print(work, rates, each, limit)
    return 0


def _encoder(model_args: Mapping[str, Any]) -> Callable[[str], Sequence[Any]]:
    from transformers import AutoTokenizer

    from ttt_harness.harness.model_arguments import local_model

    if not model_args.get("pretrained"):
        raise ConfigError("pretrained is missing: name the model whose tokens are counted with --model_args.")
    folder = local_model(str(model_args["pretrained"]), model_args.get("revision"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def _gpus_per_worker(model_args: Mapping[str, Any]) -> int:
    return int(model_args.get("tensor_parallel_size", 1))


def _print(cells: Sequence[CellWork], rates: Rates, each: int, deadline: float | None) -> None:
    fits = sum(one.shared_fit + sum(task.fit for task in one.tasks) for one in cells)
    answers = sum(task.answer + prefix for one in cells for task, prefix in zip(one.tasks, one.prefix, strict=True))
    print(
        f"{len(cells)} cell{'s' * (len(cells) > 1)} of {len(cells[0].tasks)} tasks: {fits / 1e6:.4g} M tokens to fit, "
        f"{answers / 1e6:.4g} M to answer."
    )
    print(
        f"One worker ({each} GPU{'s' * (each > 1)}): {rates.fit:.0f} tokens/s to fit, {rates.answer:.0f} to answer, "
        f"{rates.start:.0f} s to start ({rates.source})."
    )
    print()
    print(f"{'GPUs':>4}  {'one run, tasks spread':>21}  {'bound by':34}  {'one SLURM job a cell':>20}  bound by")
    gpus = each
    while gpus <= max(MOST_GPUS, each):
        one, other = spread_tasks(cells, rates, gpus, each), spread_cells(cells, rates, gpus, each)
        print(f"{gpus:4}  {duration(one.seconds):>21}  {one.bound:34}  {duration(other.seconds):>20}  {other.bound}")
        gpus *= 2
    if deadline is not None:
        _print_cheapest(cells, rates, each, deadline)
    sys.stdout.flush()


def _print_cheapest(cells: Sequence[CellWork], rates: Rates, each: int, deadline: float) -> None:
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
