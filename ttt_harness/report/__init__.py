"""What a person looks at after a run: comparisons and a page, made from lm-eval's result files and nothing else.

    results.py      reads `results_<date>.json` and the `samples_<task>_<date>.jsonl` beside it
    statistics.py   paired tests and intervals, on plain arrays
    compare.py      one run against others: differences per task and group, and what makes them not comparable
    published.py    the published figures, and which of them stands beside a run
    summary.py      the methods and seeds of a sweep, each mean beside its published figure
    figures.py, questions.py  what the page shows of the runs, and of the questions
    tables.py       a comparison as a terminal table, Markdown, CSV, JSON, LaTeX
    page.py         the report: one HTML file (page.html.j2, page.css, page.js)
    cli.py          the command `ttt-harness`

Works for the results of any lm-eval model. What `ttt_vllm` adds (`config.ttt`: settings, losses, times) is shown where
it is there.
"""
