"""Comparisons, summaries and an HTML page, made from lm-eval's result files and from `tuned.json`.

    files.py        finds the files that lm-eval wrote, and reads JSON that anybody may have written
    results.py      a run: `results_<date>.json`, and samples.py the single questions beside it
    seeds.py        the runs of one method with several seeds, as one
    compare.py      one run compared with others: differences for each task and group, and why runs cannot be compared
    published.py    the published figures with their spread, and which of them stands beside a run
    summary.py      methods, settings and seeds, each mean beside its published figure
    axes.py         the settings that a sweep has varied, and whether the best one leads
    tables.py, summary_tables.py  comparisons and summaries as tables, Markdown, CSV, JSON, LaTeX
    page/           the report: one HTML file

Works for the results of any lm-eval model. Also shows what `ttt_vllm` adds to them (`config.ttt`: settings, losses,
times). README.md beside these files is the guide.
"""
