"""Tiny models in the hub's layout, made with random weights, and the tokenizer that they share."""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

CORPUS = [
    "Evaluate the result. Q: not ( True and False ) is\nA: True\n\n",
    "Q: I have two apples and a drum. How many?\nA: 3\n\nQ: [ < ( ) >\nA: ]\n\n",
]


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[[Path], None]:
    """Writes the tokenizer of the tiny models, of 320 tokens, to a folder."""

    def save(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        ).save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[[Path], None]) -> Callable[..., Path]:
    """Makes a random Llama of two layers; keyword arguments override its config."""

    def make(**overrides: object) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        folder = tmp_path_factory.mktemp("model")
        save_tokenizer(folder)
        settings = {
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            # wide enough that logits differ clearly between tokens
            "initializer_range": 0.1,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path]) -> Path:
    """A random Llama whose embeddings are not tied."""
    return make_model()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes a data set in the hub's layout where `datasets` takes it for the one on the hub: below the working folder.

    Its arguments are the data set's name, and for each subset the rows of each split.
    """
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name: str, subsets: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
        configs = []
        for subset, splits in subsets.items():
            for split, rows in splits.items():
                path = tmp_path / name / subset / f"{split}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                datasets.Dataset.from_list(list(rows)).to_parquet(path)
            files = [{"split": split, "path": f"{subset}/{split}-*"} for split in splits]
            configs.append({"config_name": subset, "data_files": files})
        (tmp_path / name / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")

    return write


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is started in this process fails the test."""
    import vllm

    from ttt_harness.serving import engine

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(vllm.LLM, "__init__", started)
    monkeypatch.setattr(engine.LLM, "__init__", started)
