"""The core of a run: what is fitted and asked, in which order, and within which memory.

model_arguments.py   the model arguments, checked once: `ModelArguments`
preflight.py         checks requests, fits and disk space before anything is loaded
groups.py            requests -> groups, one for each task, with training sequences and the adapter's key
fit_settings.py      the settings that determine an adapter
schedule.py          decides what a worker does next
executor.py          hands the pieces of the schedule to free workers
orders.py            what a worker is asked to do, and what it returns
worker.py            a trainer and an engine on one device
fitter.py            takes adapters from the store, or fits and stores them
served_check.py      compares the served adapter with the trained one
memory.py            how trainer and engine share a GPU
local.py             the worker of this process
evaluation.py        one call of lm-eval: groups in, answers and records out
progress.py          the progress display
"""
