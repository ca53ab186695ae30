"""More than one GPU: who does what (schedule.py), and how long it will take (plan.py).

schedule.py  longest task first, and the questions of the last ones shared; used by the run and by the plan alike
plan.py      the work of a grid in tokens, and its time on 1 to 64 GPUs
"""
