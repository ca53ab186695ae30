"""How long a grid takes: its tokens, measured rates, and the time on 1 to 64 GPUs.

tokens.py   the tokens of tasks, counted with the model's tokenizer
cost.py     the tokens that each cell of a grid fits and answers
rates.py    what one worker does in a second
plan.py     the time on 1 to 64 GPUs: `ttt-harness plan`
"""
