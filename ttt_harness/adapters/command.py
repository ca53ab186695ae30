"""What `ttt-harness adapters` prints and does: list, show, prune, verify, export."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ttt_harness.adapters.export import export
from ttt_harness.adapters.inventory import ORDERS, Entry, Use, by_key, entries, matching, since, with_uses
from ttt_harness.adapters.prune import choose, leftovers, parse_age, set_aside, sweep_up
from ttt_harness.adapters.size import parse_size, size_text
from ttt_harness.adapters.store import AdapterStore
from ttt_harness.errors import ConfigError, StoreError
from ttt_harness.terminal import cell, complain, console, shortened, visible

# Of a key, in tables: enough to tell a million adapters apart, and to give to `show`.
KEY_LENGTH = 12
COLUMNS = ("key", "task", "model", "method", "settings", "k", "seed", "size", "created", "used", "results", "problem")
# Of uses by key: what the command line has read from results files.
Uses = Mapping[str, Sequence[Use]]


def list_adapters(
    store: AdapterStore,
    *,
    sort: str = "used",
    model: str | None = None,
    task: str | None = None,
    method: str | None = None,
    uses: Uses | None = None,
    form: str = "table",
) -> int:
    """Print the adapters of a store. Returns the exit status.

    Args:
        sort: a name in `ORDERS`; model, task, method: see `matching`.
        uses: the results that name adapters; None where none were asked for.
        form: table, csv or json.

    Raises:
        StoreError: there is no store.
    """
    found = matching(with_uses(entries(store.root), uses or {}), model=model, task=task, method=method)
    found.sort(key=ORDERS[sort])
    if form == "json":
        print(json.dumps([as_dict(entry, results=uses is not None) for entry in found], indent=2))
    elif form == "csv":
        sys.stdout.write(_csv(found))
    else:
        _print_table(found, results=uses is not None)
        print(_total(found, store))
        if kept := set_aside(store.root):
            print(f"Set aside: {', '.join(visible(one.path.name) for one in kept)} (see prune --damaged).")
    return 0


def _total(found: Sequence[Entry], store: AdapterStore) -> str:
    size = size_text(sum(entry.size for entry in found))
    return f"{_count(found)}, {size}, in {visible(store.root)}; {size_text(store.free_bytes())} are free there."


def _count(found: Sequence[Any]) -> str:
    return f"{len(found)} adapter{'' if len(found) == 1 else 's'}"


def as_dict(entry: Entry, *, results: bool) -> dict[str, Any]:
    """An entry with JSON values; times are ISO 8601, sizes bytes."""
    said: dict[str, Any] = {
        "key": entry.key,
        "path": str(entry.path),
        "tasks": list(entry.tasks),
        "model": entry.model,
        "base_model": entry.base_model,
        "method": entry.method,
        "settings": dict(entry.settings),
        "k": entry.k,
        "seed": entry.seed,
        "size": entry.size,
        "created": _date(entry.created),
        "used": _date(entry.used),
        "problem": entry.problem,
    }
    if results:
        said["results"] = [
            {"file": use.results, "task": use.task, "scores": dict(use.scores), "served_check": use.served_check}
            for use in entry.uses
        ]
    return said


def _csv(found: Iterable[Entry]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in found:
        files = ";".join(dict.fromkeys(use.results for use in entry.uses))
        row = [entry.key, ";".join(entry.tasks), entry.model, entry.method, entry.changed_settings, entry.k, entry.seed]
        row += [entry.size, _date(entry.created), _date(entry.used), files, entry.problem]
        writer.writerow(["" if value is None else visible(value) for value in row])
    return text.getvalue()


def _date(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def _print_table(found: Sequence[Entry], *, results: bool) -> None:
    from rich import box
    from rich.table import Table

    if not found:
        return
    screen = console(otherwise=160)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("key", "task", "model", "method"):
        table.add_column(name, overflow="fold")
    table.add_column("settings", overflow="fold")
    for name in ("k", "seed", "size", "age", "last use"):
        table.add_column(name, justify="right", no_wrap=True)
    if results:
        table.add_column("results", overflow="fold")
    for entry in found:
        row = [shortened(entry.key, KEY_LENGTH) if len(entry.key) != 32 else entry.key[:KEY_LENGTH]]
        row += [entry.task, entry.model, entry.method, entry.problem or entry.changed_settings]
        row += ["" if entry.k is None else str(entry.k), "" if entry.seed is None else str(entry.seed)]
        row += [size_text(entry.size), since(entry.created), since(entry.used)]
        if results:
            row.append(", ".join(dict.fromkeys(_short(use.results) for use in entry.uses)))
        table.add_row(*map(cell, row))
    screen.print(table)


def _short(results: str) -> str:
    """A results file by its folder's place among those of a sweep: ttt/seed42/results_....json."""
    return "/".join(Path(results).parts[-3:])


def show(store: AdapterStore, key: str, *, uses: Uses | None = None, form: str = "text") -> int:
    """Print all that determines an adapter, its losses, whether it is intact, and what results say of it.

    Returns:
        The exit status: 1 where it is damaged.

    Raises:
        StoreError: there is none of this key.
    """
    (entry,) = with_uses([by_key(entries(store.root), key, store.root)], uses or {})
    record: Mapping[str, Any] = {}
    try:
        record, problem = store.read(entry.key).record, ""
    except StoreError as error:
        problem = str(error)
    said = as_dict(entry, results=uses is not None) | {"problem": problem, "record": dict(record)}
    if form == "json":
        print(json.dumps(said, indent=2))
    else:
        for line in _shown(entry, record, problem, results=uses is not None):
            print(visible(line))
    return 1 if problem else 0


def _shown(entry: Entry, record: Mapping[str, Any], problem: str, *, results: bool) -> list[str]:
    losses = record.get("losses", [])
    facts: dict[str, Any] = {
        "key": entry.key,
        "path": entry.path,
        "intact": problem or "yes",
        "fitted for": ", ".join(entry.tasks),
        "model": entry.model,
        "base model": entry.base_model,
        **{f"  {name}": value for name, value in entry.settings.items()},
        **{f"  {name}": value for name, value in record.get("determinants", {}).items()},
        "dtype": record.get("dtype"),
        "training sequences": record.get("train_sequences"),
        "training tokens": record.get("train_tokens"),
        "fit took": f"{record['fit_seconds']} s" if "fit_seconds" in record else None,
        "losses": " ".join(f"{loss:.4f}" for loss in losses) or None,
        "size": size_text(entry.size),
        "fitted": f"{_date(entry.created)} ({since(entry.created)} ago)",
        "last used": f"{_date(entry.used)} ({since(entry.used)} ago)",
    }
    width = max(map(len, facts))
    lines = [f"{name:{width}}  {value}" for name, value in facts.items() if value is not None]
    for use in entry.uses:
        scores = ", ".join(f"{metric} {value:.4f}" for metric, value in use.scores.items())
        lines.append(f"{'named by':{width}}  {use.results}: {use.task}{f' ({scores})' if scores else ''}")
    lines += [f"{'served check':{width}}  {use.results}: {_check_text(use)}" for use in entry.uses if use.served_check]
    if results and not entry.uses:
        lines.append(f"{'named by':{width}}  none of these results")
    elif entry.uses and not any(use.served_check for use in entry.uses):
        lines.append(f"{'served check':{width}}  none in these results (a worker checks its first adapter)")
    return lines


def _check_text(use: Use) -> str:
    """The verdict of a served check, and how far served and trained log-probabilities were apart.

    A results file may be anybody's, and lack any of this.
    """
    check = use.served_check or {}
    named = {"mean_difference": "mean difference", "largest_difference": "largest", "tolerance": "allowed for the mean"}
    numbers = {words: check.get(name) for name, words in named.items()}
    figures = [f"{words} {value:.3g}" for words, value in numbers.items() if isinstance(value, int | float)]
    told = f" (log-probabilities, nats: {', '.join(figures)}; tokens: {check.get('tokens')})" if figures else ""
    return f"{check.get('verdict')}{told}"


def prune(
    store: AdapterStore,
    *,
    model: str | None = None,
    task: str | None = None,
    older: str | None = None,
    keep: str | None = None,
    uses: Uses | None = None,
    damaged: bool = False,
    yes: bool = False,
) -> int:
    """Remove adapters, after saying which and asking. Returns the exit status: 1 where the answer is no.

    Args:
        model, task, older, keep: those of a model and a task, not used for so long, and no more than that takes to
            have the store at this size.
        uses: leave those that these results name.
        damaged: those alone that `verify` would complain of, and what the store has set aside.
        yes: do not ask.

    Raises:
        ConfigError: nothing says which, or a value is not allowed, or nobody can be asked.
        StoreError: there is no store.
    """
    if not damaged and (model, task, older, keep, uses) == (None,) * 5:
        raise ConfigError(
            "prune has to know what may go: give --older, --keep, --model, --task, --unused-by or --damaged."
        )
    age = None if older is None else parse_age(older, of="--older")
    size = None if keep is None else parse_size(keep, of="--keep")
    found = entries(store.root)
    among = [entry for entry in matching(found, model=model, task=task) if not (uses and entry.key in uses)]
    if damaged:
        among = [entry for entry in among if _problem(store, entry)]
    free = [entry for entry in among if not store.is_busy(entry.key)]
    chosen = choose(found, among=free, older=age, keep=size)
    left = leftovers(store.root) + (set_aside(store.root) if damaged else [])
    if len(free) < len(among):
        print(f"In use by other processes, and kept: {_count(among[len(free) :])}.")
    if not chosen and not left:
        print("Nothing is to go.")
        return 0
    _print_table(chosen, results=False)
    for one in left:
        print(f"{visible(one.path.name)}: {one.what}, {size_text(one.size)}")
    total = size_text(sum(entry.size for entry in chosen) + sum(one.size for one in left))
    if not yes and not _confirmed(f"Remove {_count(chosen)} ({total}) from {visible(store.root)}?"):
        print("Nothing was removed.")
        return 1
    removed = 0
    for entry in chosen:
        if store.remove(entry.key):
            removed += 1
        else:
            print(f"{entry.key[:KEY_LENGTH]} is in use by now, and kept.")
    sweep_up(left)
    print(f"Removed {removed} of {_count(chosen)}.")
    return 0


def _confirmed(question: str) -> bool:
    print(f"{question} [y/N] ", end="", flush=True)
    answer = sys.stdin.readline()
    if not answer:
        print()
        raise ConfigError("nobody answers, since stdin is closed or empty; say --yes to remove these.")
    return answer.strip().lower() in ("y", "yes")


def verify(store: AdapterStore, keys: Sequence[str] = (), *, form: str = "text") -> int:
    """Check that adapters are as they were written, and finite. Returns the exit status: 1 where one is not.

    Args:
        keys: which; all by default.

    Raises:
        StoreError: there is no such adapter.
    """
    found = entries(store.root)
    if keys:
        found = [by_key(found, key, store.root) for key in keys]
    problems = {entry.key: _problem(store, entry) for entry in found}
    wrong = {key: problem for key, problem in problems.items() if problem}
    if form == "json":
        print(json.dumps([{"key": key, "problem": problem} for key, problem in problems.items()], indent=2))
    else:
        for problem in wrong.values():
            print(visible(problem))
        print(f"{_count(found)}: {len(found) - len(wrong)} intact, {len(wrong)} damaged.")
    return 1 if wrong else 0


def _problem(store: AdapterStore, entry: Entry) -> str:
    """What is wrong with an adapter's files or values; empty where nothing is."""
    from ttt_harness.adapters.peft import first_not_finite, read_adapter

    try:
        name = first_not_finite(read_adapter(store.read(entry.key).path))
    except StoreError as error:
        return str(error)
    return f"the adapter {entry.path} holds values that are not finite ({name})." if name else ""


def export_adapter(
    store: AdapterStore, key: str, folder: Path, *, base_model: str | None = None, uses: Uses | None = None
) -> int:
    """Write an adapter as a PEFT directory with a model card, and print where. Returns the exit status.

    Raises:
        StoreError: there is none of this key, it is damaged, or the folder cannot be written.
    """
    (entry,) = with_uses([by_key(entries(store.root), key, store.root)], uses or {})
    with store.using(entry.key):
        base = export(store.read(entry.key), entry, folder, base_model=base_model)
    print(visible(folder))
    if Path(base).is_absolute():
        complain(f"note: the base model is the path {base}; give its name with --base_model before you publish this.")
    return 0
