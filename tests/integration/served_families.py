"""Fits and serves each family's tiny checkpoint, engine in this process: `python -m tests.integration.served_families`.

The argument is a folder with one checkpoint for each name of `CHECKPOINTS`; beside each, `NAME.json` is written.
"""

# ruff: noqa: E402 - vLLM and torch read the environment when they are imported
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from ttt_harness.serving.environment import prepare_environment

prepare_environment()

import torch

from tests.checkpoints import CHECKPOINTS
from ttt_harness.adapters.store import AdapterStore
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.run.served_check import compare_served
from ttt_harness.serving.engine import Engine, default_engine_args
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import ModelShape
from ttt_harness.training.trainer import LogProbabilities, Trainer

LORA: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.05}
FIT: dict[str, Any] = {"batch_size": 2, "epochs": 3, "lr": 2e-2, "warmup_ratio": 0.0}
TOKENS = 70  # beyond the windows, which are of 16 tokens
CONTEXT = 256


def sequences() -> list[TrainingSequence]:
    rng = torch.Generator().manual_seed(1)
    mask = (False,) + (True,) * (TOKENS - 1)
    return [TrainingSequence(tuple(torch.randint(2, 320, (TOKENS,), generator=rng).tolist()), mask) for _ in range(4)]


def prompt_logprobs(engine: Engine, tokens: tuple[int, ...], adapter: Any) -> tuple[float, ...]:
    """The log-probability of each token after the first, as vLLM computes it."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = engine.generate([{"prompt_token_ids": list(tokens)}], params, lora_request=adapter)
    assert output.prompt_logprobs is not None
    pairs = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
    return tuple(entry[token].logprob for token, entry in pairs if entry is not None)


def compare(model_dir: Path, store: AdapterStore) -> dict[str, Any]:
    """Fit three adapters, one of them without effect, and compare what trainer and engine make of them."""
    shape = ModelShape.from_config(read_config(model_dir), where=str(model_dir))
    trainer = Trainer(model_dir, shape, **LORA, dtype=torch.float32, device="cpu", context=CONTEXT)
    seen = sequences()
    fits = [trainer.fit(seen, **FIT, seed=seed) for seed in (1, 2)]
    fits.append(trainer.fit(seen, **{**FIT, "epochs": 0}, seed=1))
    trained = [trainer.log_probabilities(seen[0], fit.tune_state_dict) for fit in fits]
    args = default_engine_args() | {"dtype": "float32", "max_model_len": CONTEXT}
    args |= {"enable_lora": True, "max_lora_rank": shape.adapter_rank(LORA["rank"])}
    engine = Engine(model=str(model_dir), **args)
    tokens = seen[0].tokens
    base = prompt_logprobs(engine, tokens, None)
    checks, served, changes = [], [], []
    for number, fit in enumerate(fits):
        weights = fit.peft_state_dict()
        stored = store.save(f"{model_dir.name}{number}", weights, base_model=str(model_dir), **LORA, record={})
        adapter = engine.adapter(stored.key, stored.path)
        served.append(prompt_logprobs(engine, tokens, adapter))
        changes.append(engine.changes_output(adapter, tokens[:32]))
        check = compare_served(trained[number], LogProbabilities(served[-1], base), dtype="float32")
        checks.append(check.as_record() | {"changes_output": changes[-1]})
    engine.close()
    return {
        "adapters": checks[:2],
        "between_adapters": max(abs(one - other) for one, other in zip(*served[:2], strict=True)),
        "without_effect_changes_output": changes[2],
    }


def main(folder: Path) -> None:
    for name in CHECKPOINTS:
        if not (folder / name).is_dir():
            continue
        try:
            record = compare(folder / name, AdapterStore(folder / "adapters"))
        except Exception:
            record = {"error": traceback.format_exc()}
        (folder / f"{name}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
