"""A trainer and an engine that only take time, and note when they were at work."""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from ttt_harness.adapters.store import AdapterStore
from ttt_harness.run.fit_settings import FitSettings
from ttt_harness.run.fitter import Fitter
from ttt_harness.run.schedule import Stages
from ttt_harness.run.worker import Worker

SETTINGS = FitSettings("float32", "cpu", 1, 1.0, 0.0, 1, 1, 1e-3, 0.1, 42)


@dataclass
class Log:
    """What was done, and from when to when."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)

    def take(self, what, seconds):
        begin = time.perf_counter()
        time.sleep(seconds)
        self.spans.append((what, begin, time.perf_counter()))

    def overlap(self):
        """The seconds in which a fit and answers were at work together."""
        fits = [span for span in self.spans if span[0].startswith("fit")]
        answers = [span for span in self.spans if span[0].startswith("answer")]
        return sum(max(0.0, min(f[2], a[2]) - max(f[1], a[1])) for f in fits for a in answers)


class FakeTrainer:
    """Fits a matrix that holds the length of the first sequence."""

    def __init__(self, log, seconds=0.05):
        self.log, self.seconds = log, seconds

    def fit(self, sequences, *, on_step=None, **_):
        self.log.take("fit", self.seconds)
        on_step(1, 1, 0.5)
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        weights = {f"{name}.lora_A.weight": torch.ones(1, 2), f"{name}.lora_B.weight": torch.ones(2, 1)}
        tokens = sum(len(sequence.tokens) for sequence in sequences)
        return SimpleNamespace(
            tune_state_dict={}, losses=[0.5], tokens=tokens, seconds=self.seconds, peft_state_dict=lambda: weights
        )

    def log_probabilities(self, sequence, _):
        wanted = sum(sequence.loss_mask)
        return SimpleNamespace(adapter=(-1.0,) * wanted, base=(-2.0,) * wanted)


class FakeEngine:
    """Names an adapter by its key."""

    ready = True
    applies_adapters = True

    def __init__(self, log):
        self.log = log

    def start(self):
        pass

    def make_room(self):
        self.log.spans.append(("sleep", 0, 0))

    def adapter(self, name, path):
        assert (path / "adapter_model.safetensors").is_file()
        return name

    def changes_output(self, *_):
        return True

    def log_probabilities(self, tokens, adapter):
        return [-1.0 if adapter and self.applies_adapters else -2.0] * (len(tokens) - 1)


class FakeAnswering:
    """Answers with the request and the adapter."""

    def __init__(self, log, seconds=0.05):
        self.log, self.seconds, self.model = log, seconds, FakeEngine(log)

    def answer(self, kind, requests, adapter):
        self.log.take(f"answer {adapter}", self.seconds)
        return [f"{kind} {request.args[0]} {adapter}" for request in requests]


def fake_worker(folder, log, stages=Stages.SEQUENTIAL, *, fit_seconds=0.05, answer_seconds=0.05, **options):
    """A worker with a store in `folder`."""
    store = AdapterStore(folder)
    trainer = FakeTrainer(log, fit_seconds)
    fitter = Fitter(store, lambda: trainer, base_model=folder)
    return Worker(FakeAnswering(log, answer_seconds), store, fitter, stages=stages, **options)
