"""What a person looks at after a run: comparisons and a page, made from lm-eval's result files and nothing else.

    files.py        finds the files that lm-eval wrote, and reads JSON that anybody may have written
    results.py      a run: `results_<date>.json`, and samples.py the single questions beside it
    seeds.py        the runs of one method with several seeds, as one
    compare.py      one run compared with others: differences per task and group, and what makes them not comparable
    published.py    the published figures with their spread, and which of them stands beside a run
    summary.py      methods, settings and seeds, each mean beside its published figure
    axes.py         the settings that a sweep has varied, and whether the best one leads
    tables.py, summary_tables.py  comparisons and summaries as tables, Markdown, CSV, JSON, LaTeX
    page/           the report: one HTML file

Works for the results of any lm-eval model. What `ttt_vllm` adds (`config.ttt`: settings, losses, times) is shown where
it is there.
"""
