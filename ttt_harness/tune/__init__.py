"""Which settings suit a model, found from demonstrations alone: `ttt-harness tune`.

    candidates.py   the settings to try: in-context learning, and the points of a grid
    loading.py      lm-eval's own options -> its tasks, without anything that they evaluate
    folds.py        the demonstrations, each held out once
    held_out.py     a held-out demonstration as a question, and whether a model answers it rightly
    prepare.py      a task's folds, with questions and training sequences
    fitting.py      one fit on a fold, and the answers to what it holds out
    log.py          what is done, so that a search that was stopped goes on
    search.py       which fits are done: all settings on the first fold, fewer and fewer on the others
    display.py      the table, the gains of each task, and what to do with them
    command.py      `ttt-harness tune`

What is found is a `ttt_harness.tuned.Tuned`. README.md beside them is the guide.
"""
