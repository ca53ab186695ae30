"""Several GPUs: the workers of a run as Ray processes, on this machine or others. README.md is the guide.

session.py        the Ray cluster of a run
pool.py           the driver's side of a run on several workers
worker.py         a worker in a process of Ray's, and the board that it reports to
ray_in_slurm.sh   one Ray cluster on all nodes of a SLURM job
"""
