"""A grid of methods, hyperparameters and seeds, evaluated in one process with one engine start and one base model.

    axes.py           hyperparameters with several values, and the points that they make
    grid.py           the cells of a grid: method, point and seed, and the call of lm_eval that each makes
    grid_file.py      the same from a YAML file
    lm_eval_call.py   options of lm_eval: parsed, checked, run
    cells.py          a cell's folder, and how it gets there in one step
    found.py          what is in it: what is done, what it was done with, what cannot be read
    notes.py          notes beside the cells: the last grid, and why a cell failed
    display.py        one progress display for the whole
    runner.py         checks everything, then runs cell after cell through lm-eval's own command
    slurm.py          the same cells as the jobs of a SLURM array
    queue.py          what SLURM knows of these jobs
    status.py         what has become of the cells
    command.py        `ttt-harness sweep`
    loading.py        the model and the tasks of a call, without evaluating: for `fit` and `tune`
    fit.py            `ttt-harness fit`

README.md beside these files is the guide.
"""
