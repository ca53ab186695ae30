"""Tiny models in the hub's layout, made with random weights, and the tokenizer that they share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

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
