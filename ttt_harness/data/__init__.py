"""Data sets and training sequences. Nothing in here imports a training or serving engine.

support.py         a task's demonstrations as texts
chat.py            training texts through a chat template
sequences.py       support set -> training sequences: permutations, token ids, loss mask
masks.py           which tokens carry the loss
example_files.py   benchmarks with a JSON file for each task
bbh.py, bbeh.py    BIG-Bench-Hard and BIG-Bench Extra Hard
procedural.py      eight BBH tasks with generated examples
"""
