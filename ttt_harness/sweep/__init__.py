"""A grid of methods and seeds, evaluated in one process with one engine start and one base-model load.

    grid.py      the methods and what they change in a call of lm_eval; seeds; the cells of a grid
    cells.py     a cell's folder: what is done, what it was done with, and how it gets there in one step
    display.py   one progress display for the whole
    runner.py    checks everything, then runs cell after cell through lm-eval's own command
    slurm.py     the same cells as the jobs of a SLURM array, and what has become of them

The command `ttt-harness sweep` calls `runner.sweep`.
"""
