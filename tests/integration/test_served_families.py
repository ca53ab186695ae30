"""vLLM serves the very model that was trained, for every family; marked integration, for a real engine starts."""

import pytest
import torch

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from ttt_harness.adapters.store import AdapterStore
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import ConfigError
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import ModelShape
from ttt_harness.training.trainer import Trainer

pytestmark = pytest.mark.integration

LORA = {"rank": 8, "alpha": 16, "dropout": 0.05}
TOKENS = 70  # beyond the windows, which are of 16 tokens


def prompt_logprobs(engine, tokens, adapter):
    """The log-probability of each token after the first, as vLLM computes it, shape [tokens - 1]."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = engine.generate([{"prompt_token_ids": list(tokens)}], params, lora_request=adapter)
    return torch.tensor(
        [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]
    )


def trained_logprobs(trainer, tokens):
    """The same, of the trained model."""
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(torch.tensor([tokens]))[0]
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_trained_logits_are_those_of_vllm(name, save_tokenizer, tmp_path):
    from ttt_harness.serving.environment import prepare_environment

    prepare_environment()
    from ttt_harness.serving.engine import default_engine_args, shared_engine

    model_dir = tmp_path / "model"
    model_dir.mkdir()
    save_tokenizer(model_dir)
    write_checkpoint(model_dir, CHECKPOINTS[name])
    shape = ModelShape.from_config(read_config(model_dir), where=str(model_dir))
    trainer = Trainer(model_dir, shape, **LORA, dtype=torch.float32, device="cpu")
    rng = torch.Generator().manual_seed(1)
    sequences = [
        TrainingSequence(
            tuple(torch.randint(2, 320, (TOKENS,), generator=rng).tolist()), (False,) + (True,) * (TOKENS - 1)
        )
        for _ in range(4)
    ]
    fit = {"batch_size": 2, "epochs": 3, "lr": 2e-2, "warmup_ratio": 0.0}
    store = AdapterStore(tmp_path / "adapters")
    args = default_engine_args() | {"dtype": "float32", "max_model_len": 256}
    args |= {"enable_lora": True, "max_lora_rank": shape.adapter_rank(LORA["rank"])}
    engine = shared_engine(model=str(model_dir), **args)
    tokens = sequences[0].tokens
    plain = prompt_logprobs(engine, tokens, None)
    seen = []
    for seed in (1, 2):
        result = trainer.fit(sequences, **fit, seed=seed)
        stored = store.save(f"adapter{seed}", result.peft_state_dict(), base_model=str(model_dir), **LORA, record={})
        adapter = engine.adapter(stored.key, stored.path)
        served = prompt_logprobs(engine, tokens, adapter)
        torch.testing.assert_close(served, trained_logprobs(trainer, tokens), rtol=1e-3, atol=2e-3)
        assert (served - plain).abs().max() > 0.1
        assert engine.changes_output(adapter, tokens[:32])
        seen.append(served)
    assert (seen[0] - seen[1]).abs().max() > 1e-2  # each adapter under its own name
    without_effect = trainer.fit(sequences, **{**fit, "epochs": 0}, seed=1)
    torch.testing.assert_close(plain, trained_logprobs(trainer, tokens), rtol=1e-3, atol=2e-3)
    stored = store.save("none", without_effect.peft_state_dict(), base_model=str(model_dir), **LORA, record={})
    assert not engine.changes_output(engine.adapter("none", stored.path), tokens[:32])
    engine.close()


def test_vllm_reserves_the_rank_under_which_adapters_are_written(save_tokenizer, tmp_path):
    from ttt_harness.harness.model import TTTVLLM

    for name in ("phi3", "mistral"):
        (tmp_path / name).mkdir()
        save_tokenizer(tmp_path / name)
        write_checkpoint(tmp_path / name, CHECKPOINTS[name])
    phi3 = {"pretrained": str(tmp_path / "phi3"), "dtype": "float32", "max_model_len": 256}
    assert TTTVLLM(**phi3, lora_rank=64).model.engine_args["max_lora_rank"] == 128
    assert TTTVLLM(**phi3 | {"pretrained": str(tmp_path / "mistral")}).model.engine_args["max_lora_rank"] == 64
    with pytest.raises(ConfigError, match="vLLM takes one of 128, 256, 320, 512 for lora_rank=64"):
        TTTVLLM(**phi3, lora_rank=64, max_lora_rank=64)
    with pytest.raises(ConfigError, match="lora_rank=300 is not allowed for Phi3ForCausalLM"):
        TTTVLLM(**phi3, lora_rank=300)
