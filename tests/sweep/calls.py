"""Calls of lm-eval that the tests of sweeps start from."""

from ttt_harness.sweep.grid import cells_of


def call(**options):
    return {"tasks": ["procedural_ttt"], "model_args": {"pretrained": "m"}, "metadata": {}, **options}


def cell_of(method, seed=42, **options):
    (cell,) = cells_of([method], [seed], call(**options))
    return cell
