"""More than one GPU: who does what, on Ray's workers, and how long it will take.

schedule.py       longest task first, and the questions of the last ones shared; used by the run and by the plan alike
pool.py           the driver's side of a run on several workers
worker.py         a worker: a base model and an engine of its own
plan.py           the work of a grid in tokens, and its time on 1 to 64 GPUs
ray_in_slurm.sh   one Ray cluster on all nodes of a SLURM job
"""
