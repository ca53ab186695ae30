"""The questions of a report with all answers, column by column, small enough for one file.

What all prompts of a task begin with (the instruction and the demonstrations) is stored once per task, method and seed,
and equal texts are stored once altogether: 6,000 questions with 5 methods' answers come to about 3 MB.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ttt_harness.report.compare import KeptSamples, choose_metric, common_start
from ttt_harness.report.page.figures import Method
from ttt_harness.report.results import Metric
from ttt_harness.report.samples import NO_SCORE, Sample


@dataclass
class Strings:
    """Texts by number: equal texts (prompts, answers, demonstrations) are stored once in the page."""

    texts: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> int:
        """The number of a text."""
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def question_columns(
    methods: Sequence[Method], seeds: Sequence[Any], tasks: Sequence[str], metric: str | None, kept: KeptSamples
) -> dict[str, Any]:
    """All questions with all answers, column by column; texts by their number in `strings`.

    What all prompts of a task begin with (instruction and demonstrations) is stored once per task, method and seed.
    """
    strings = Strings()
    columns: dict[str, list[Any]] = {key: [] for key in ("task", "seed", "id", "text", "target")}
    per_method: list[dict[str, list[Any]]] = [{"answer": [], "raw": [], "score": []} for _ in methods]
    prefixes: dict[str, list[int]] = {}
    texts_of: list[dict[int, int]] = [{} for _ in methods]
    for s, seed in enumerate(seeds):
        for t, task in enumerate(tasks):
            places: dict[tuple[str, int], int] = {}
            for m, method in enumerate(methods):
                run = method.runs.get(seed)
                if run is None or task not in run.results:
                    continue
                against = methods[0].runs.get(seed, run)
                other = against if task in against.results else run
                chosen = choose_metric(other, run, task, metric) or choose_metric(run, run, task)
                if chosen is None and run.predicted_only(task):
                    chosen = Metric(NO_SCORE, run.filters(task)[0])
                if chosen is None or not run.has_samples(task):
                    continue
                samples = run.samples(task, chosen.filter)
                kept.keep(run, task, chosen.filter, samples)
                start = shared_start([sample.prompt for sample in samples])
                prefixes.setdefault(f"{s},{t}", [-1] * len(methods))[m] = strings.add(start)
                seen: dict[str, int] = defaultdict(int)
                for sample in sorted(samples, key=lambda x: x.doc_id):
                    key = (sample.doc_hash, seen[sample.doc_hash])
                    seen[sample.doc_hash] += 1
                    text = strings.add(sample.prompt[len(start) :])
                    if key not in places:
                        places[key] = len(columns["id"])
                        row = (t, s, sample.doc_id, text, strings.add(sample.target))
                        for name, value in zip(columns, row, strict=True):
                            columns[name].append(value)
                        for column in per_method:
                            for values in column.values():
                                values.append(None)
                    at = places[key]
                    if columns["text"][at] != text:
                        texts_of[m][at] = text
                    _put_answer(per_method[m], at, sample, chosen, strings)
    return {
        "strings": strings.texts,
        "prefixes": prefixes,
        "questions": {**columns, "methods": per_method, "texts": texts_of},
    }


def _put_answer(column: dict[str, list[Any]], at: int, sample: Sample, metric: Metric, strings: Strings) -> None:
    column["answer"][at] = strings.add(sample.answer)
    value = sample.values.get(metric.name)
    if value is not None and value == value:  # NaN is not JSON
        column["score"][at] = round(value, 6)
    raw = "\n".join(sample.responses)
    if raw.strip() != sample.answer.strip():
        column["raw"][at] = strings.add(raw)


def shared_start(prompts: Sequence[str]) -> str:
    """What all prompts begin with, up to the end of a paragraph: the instruction and the demonstrations."""
    start = common_start(prompts)
    if len(set(prompts)) == 1:  # a single question: its last paragraph is the question
        start = start.rstrip("\n")
    for end in ("\n\n", "\n"):
        if end in start:
            return start[: start.rindex(end) + len(end)]
    return ""
