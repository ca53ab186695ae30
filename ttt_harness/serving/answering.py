"""`Answering`: lm-eval's `vllm` class with this package's engine in the engine's place.

A driver and a worker both make one, from a model directory and the arguments of lm-eval's class and of vLLM:

    answering = Answering(model_dir, {"dtype": "float32", "max_model_len": 2048})
    answers = answering.answer("generate_until", requests, adapter=None)

It renders chats, tokenizes and answers. It knows nothing of methods, groups, stores or fits, and making one starts no
engine: the first answer does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.models import vllm_causallms
from lm_eval.models.utils import has_bos_prefix
from vllm.lora.request import LoRARequest

from ttt_harness.errors import ConfigError, ModelError
from ttt_harness.serving.engine import shared_engine


class Answering(vllm_causallms.VLLM):
    """lm-eval's `vllm` class with an engine that starts at the first request, and an adapter for each call.

    Args:
        model_dir: a model directory in the hub's layout.
        engine: the arguments of lm-eval's `vllm` class besides `pretrained`, and those of vLLM's engine.
    """

    def __init__(self, model_dir: Path, engine: Mapping[str, Any]) -> None:
        self.model_dir = model_dir
        # lm-eval's constructor starts an engine and waits for it; ours comes in its place, and nobody waits.
        llm, vllm_causallms.LLM = vllm_causallms.LLM, shared_engine
        try:
            super().__init__(pretrained=str(model_dir), **engine)
        finally:
            vllm_causallms.LLM = llm

    def answer(self, kind: str, requests: Sequence[Instance], adapter: LoRARequest | None) -> list[Any]:
        """Answer `requests` with `adapter` (None: the base model), by lm-eval's method of the name `kind`.

        Returns:
            The answers in the requests' order: texts for `generate_until`, (log-likelihood, is greedy) for
            `loglikelihood`, log-likelihoods for `loglikelihood_rolling`.
        """
        self.lora_request = adapter
        # Not self's: `TTTVLLM` overrides these three with whole runs.
        method = getattr(super(), kind)
        return method(list(requests), disable_tqdm=True)

    # Chats

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in lm-eval's class, but a system turn that the template cannot take is refused and not left out.

        Raises:
            ConfigError: there is no template, or it takes no system turn.
        """
        return self.render_chat(chat_history, add_generation_prompt, continue_final_message=not add_generation_prompt)

    def render_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, continue_final_message: bool = False
    ) -> str:
        """The text that the model's chat template makes of `messages`, for prompts and for training texts alike.

        Args:
            messages: turns with `role` and `content`.
            add_generation_prompt: end with the beginning of a reply.
            continue_final_message: leave the last turn open.

        Raises:
            ConfigError: there is no template, or it takes no system turn.
            ModelError: the template fails.
        """
        if not (self.hf_chat_template or self.tokenizer.chat_template):
            raise ConfigError(
                f"the tokenizer of {self.model_dir} has no chat template; leave out --apply_chat_template."
            )
        system = [message["content"] for message in messages if message["role"] == "system"]
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    chat_template=self.hf_chat_template,
                    enable_thinking=self.enable_thinking,
                    **self.chat_template_args,
                )
            )
        except jinja2.TemplateError as error:
            if not system:
                raise ModelError(f"the chat template of {self.model_dir} fails: {error.message}.") from None
            text = ""
        # Some templates refuse a system turn, others say nothing and leave it out.
        if not all(content.strip() in text for content in system):
            raise ConfigError(
                f"the chat template of {self.model_dir} cannot take a system turn, which the task's description or "
                "--system_instruction makes; leave out --system_instruction and set the YAML's description to an "
                "empty text, or leave out --apply_chat_template."
            )
        return text

    # Tokens

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize a training text exactly as lm-eval's class tokenizes a prompt.

        Returns:
            Token ids and, for each, (first character, one past the last); special tokens included.
        """
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        bos = None if self.prefix_token_id is None else self.tokenizer.decode(self.prefix_token_id)
        if has_bos_prefix(text, bos):  # from a chat template
            special = {"add_special_tokens": False}
        encoding = self.tokenizer(text, return_offsets_mapping=True, **special)
        return encoding.input_ids, encoding.offset_mapping

    def check_tokenizer(self, text: str, tokens: Sequence[int]) -> None:
        """Check that training texts get offsets and the tokens that prompts get, with a prompt's text and tokens.

        Raises:
            ModelError: they do not.
        """
        if not self.tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer of {self.model_dir} tells no offsets, which fitting needs; "
                "convert it to a fast one (tokenizer.json), or use method=icl."
            )
        if self.encode(text)[0] != list(tokens):
            raise ModelError(f"the tokenizer of {self.model_dir} gives training texts other tokens than prompts.")

    # What lm-eval and results ask for

    def set_cache_hook(self, cache_hook: Any) -> None:
        """lm-eval calls this for `--use_cache`, which is refused.

        Its cache knows a request by its prompt alone, so a second setting would get the first one's answers.

        Raises:
            ConfigError: there is a cache.
        """
        if cache_hook.dbdict is not None:
            raise ConfigError(
                "--use_cache is not allowed with ttt_vllm: lm-eval's cache knows an answer by its prompt, not by the "
                "adapter that gave it; leave it out (fitted adapters are kept and reused without it)."
            )
        super().set_cache_hook(cache_hook)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, fitted and served alike."""
        return self.model.llm_engine.model_config.dtype

    @property
    def dtype_name(self) -> str:
        """`dtype` as the command line writes it."""
        return str(self.dtype).removeprefix("torch.")
