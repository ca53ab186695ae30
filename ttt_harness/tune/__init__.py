"""`ttt-harness tune`: finds settings that suit a model from demonstrations alone.

    candidates.py   the settings to try: in-context learning, and the points of a grid
    loading.py      loads the tasks of a call with their demonstrations, without evaluated rows
    folds.py        splits the demonstrations into folds, and draws the orders of the others
    held_out.py     asks a held-out demonstration, and judges the answer from one forward pass
    prepare.py      a task's folds, with questions and training sequences
    fitting.py      fits on a fold, and answers the questions that it holds out
    log.py          the finished fits on disk, so that a stopped search can be resumed
    search.py       decides which fits are done: all settings on the first fold, fewer on each further fold
    display.py      prints the settings, the predicted gains and the arguments of a run
    command.py      from a command line to `tuned.json`

The result is a `ttt_harness.tuned.Tuned`. README.md beside these files is the guide.
"""
