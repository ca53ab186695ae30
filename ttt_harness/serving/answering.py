"""`Answering`: lm-eval's `vllm` class with this package's engine in the engine's place.

A driver and a worker both make one, from a model directory and the arguments of lm-eval's class and of vLLM:

    answering = Answering(model_dir, {"dtype": "float32", "max_model_len": 2048})
    answers = answering.answer("generate_until", requests, adapter=None)

It renders chats, tokenizes, checks and answers. It knows nothing of methods, groups, stores or fits, and making one
starts no engine: the first answer does.
"""

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.models import vllm_causallms
from lm_eval.models.utils import has_bos_prefix
from vllm.lora.request import LoRARequest

from ttt_harness import patches
from ttt_harness.adapters.user import UserAdapters
from ttt_harness.config import quoted
from ttt_harness.errors import ConfigError, DataError, ModelError, TTTError
from ttt_harness.serving.engine import reason_of, shared_engine
from ttt_harness.serving.generation import NO_CACHE, samples
from ttt_harness.serving.sampling import request_seed, sampling_params, vllm_arguments

_log = logging.getLogger(__name__)

# Of an ASCII character a tokenizer makes one token at most. Of the bytes of others at most so many each, whatever its
# normalization makes of them; and it may put some tokens before and after a text.
TOKENS_PER_BYTE = 16
ADDED_TOKENS = 16
# Enough of a text to tell a model with an adapter from one without.
PROBE_TOKENS = 32
# What results state of answers that are drawn.
SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Checked:
    """What results have to state of the requests of a task.

    truncated: how many prompts lose tokens to the context window.
    adapter: the directory of the user's own, if that is to answer.
    sampling: the arguments that answers are drawn with; None where they are greedy or only scored.
    """

    truncated: int = 0
    adapter: str | None = None
    sampling: dict[str, Any] | None = None


class Answering(vllm_causallms.VLLM):
    """lm-eval's `vllm` class with an engine that starts at the first request, and an adapter for each call.

    Args:
        model_dir: a model directory in the hub's layout.
        engine: the arguments of lm-eval's `vllm` class besides `pretrained`, and those of vLLM's engine.
        adapters: the user's own, which answer where `answer` is given none.

    Raises:
        ModelError: vLLM refuses the model or an argument, serves this architecture without LoRA, or has no room for a
            whole context.
    """

    def __init__(self, model_dir: Path, engine: Mapping[str, Any], adapters: UserAdapters | None = None) -> None:
        self.model_dir = model_dir
        self.adapters = adapters
        # lm-eval's constructor starts an engine and waits for it; ours comes in its place, and nobody waits.
        try:
            with patches.applied("lm_eval: engine of its vllm class", shared_engine):
                super().__init__(pretrained=str(model_dir), **engine)
        except TTTError:
            raise
        except Exception as error:  # transformers' and lm-eval's, of many kinds
            # lm-eval reads the configuration and then the tokenizer.
            if "_config" not in vars(self) or "tokenizer" in vars(self):
                raise ModelError(f"{model_dir} cannot be used as a model: {reason_of(error)}.") from error
            raise ModelError(
                f"the tokenizer of {engine.get('tokenizer') or model_dir} cannot be read: {reason_of(error)}; copy its "
                "files again (tokenizer.json and tokenizer_config.json), or name another with tokenizer=."
            ) from error
        self.model.check()
        vocabulary = self.model.config.model_config.get_vocab_size()
        if self.custom_prefix_token_id is not None and self.custom_prefix_token_id >= vocabulary:
            raise ConfigError(
                f"prefix_token_id={self.custom_prefix_token_id} is not allowed: the model knows {vocabulary} tokens, "
                "from 0 on."
            )
        self._probed: set[str] = set()

    def answer(self, kind: str, requests: Sequence[Instance], adapter: LoRARequest | None) -> list[Any]:
        """Answer `requests` with `adapter`, by lm-eval's method of the name `kind`.

        None stands for the user's own adapter or, where there is none, the base model.

        Returns:
            The answers in the requests' order: texts for `generate_until`, (log-likelihood, is greedy) for
            `loglikelihood`, log-likelihoods for `loglikelihood_rolling`.
        """
        self.lora_request = self._own_adapter(requests) if adapter is None else adapter
        return getattr(self, kind)(list(requests), disable_tqdm=True)

    def _own_adapter(self, requests: Sequence[Instance]) -> LoRARequest | None:
        """How the engine is asked to answer with the user's own adapter; warns where that changes nothing."""
        if self.adapters is None or not requests:
            return None
        adapter = self.adapters.of(str(requests[0].task_name))
        request = self.model.adapter(adapter.name, adapter.path)
        if adapter.name not in self._probed:
            self._probed.add(adapter.name)
            prompt = self.tok_encode("".join(arg for arg in requests[0].args if isinstance(arg, str)))
            if not self.model.changes_output(request, prompt[:PROBE_TOKENS]):
                _log.warning("The adapter in %s does not change the model's output.", adapter.path)
        return request

    @staticmethod
    def modify_gen_kwargs(
        gen_kwargs: dict[str, Any], eos: Any = None, default_max_gen_toks: int = 256
    ) -> tuple[dict[str, Any], list[str], int]:
        """As lm-eval's, which calls it for each request, but greedy unless sampling is asked for."""
        return vllm_arguments(gen_kwargs, eos, default_max_gen_toks)

    # Before anything is loaded

    def seeded(self, kind: str, requests: Sequence[Instance], *, seed: int) -> list[Instance]:
        """The requests, each of those that sample with a seed of its own, made from `seed`, its task and its prompt.

        To be called with all requests of a run: equal prompts (`repeats` in a YAML) get different seeds. A seed among
        the generation arguments is left as it is.

        Raises:
            ConfigError: `do_sample` or `temperature` has a value that is not allowed.
        """
        if kind != "generate_until":
            return list(requests)
        seen: Counter[tuple[str, str]] = Counter()
        made = []
        for given in requests:
            request = given
            prompt, arguments = request.args
            task = str(request.task_name)
            if arguments.get("seed") is None and samples(arguments, task):
                own = request_seed(seed, task, prompt, seen[task, prompt])
                seen[task, prompt] += 1
                request = copy.copy(request)
                request.arguments = (prompt, {**arguments, "seed": own})
            made.append(request)
        return made

    def check(self, kind: str, requests: Sequence[Instance], *, fitted: bool, truncate: bool = False) -> Checked:
        """Find out what would go wrong with `requests`, all of one task, before anything is loaded.

        Args:
            kind: the method of lm-eval's that will answer them.
            requests: of the task.
            fitted: whether an adapter is fitted for them.
            truncate: whether prompts that are too long may lose tokens, on the side `truncation_side`.

        Raises:
            ConfigError: generation arguments that vLLM refuses.
            DataError: a prompt has no token or half a character, or exceeds the context window with its answer.
            ModelError: the tokenizer cannot be fitted with.
        """
        task = str(requests[0].task_name)
        own = None if fitted or self.adapters is None else str(self.adapters.of(task).path)
        # To score a text, vLLM generates a token after it; where nothing stands before it, lm-eval puts one there.
        sampling, budgets = None, [2 if request.args[0] == "" else 1 for request in requests]
        if kind == "generate_until":
            sampling, budgets = self._check_generation(task, requests)
        else:
            self._check_scoring(kind, task, requests)
        if kind == "loglikelihood_rolling":
            return Checked(adapter=own)  # whole texts are cut into windows
        texts = ["".join(arg for arg in request.args if isinstance(arg, str)) for request in requests]
        if fitted:
            longest = max(texts, key=len)
            self.check_tokenizer(longest, self.tok_encode(longest))
        if max(budgets) >= self.max_length:
            raise DataError(
                f"{task}: an answer may have {max(budgets)} tokens (max_gen_toks), but the context window holds "
                f"{self.max_length}, with the prompt; set a smaller max_gen_toks, or a longer window (max_model_len)."
            )
        lengths = self._lengths(task, texts, budgets)
        over = [length + budget > self.max_length for length, budget in zip(lengths, budgets, strict=True)]
        if any(over) and not truncate:
            raise self._too_long(kind, task, lengths, budgets)
        if kind == "loglikelihood":
            self._check_answers_fit(task, [request for request, cut in zip(requests, over, strict=True) if cut])
        return Checked(truncated=sum(over), adapter=own, sampling=sampling)

    def _check_scoring(self, kind: str, task: str, requests: Sequence[Instance]) -> None:
        """Check that given texts can be scored: lm-eval puts a token before those that nothing stands before."""
        if kind == "loglikelihood" and self.enable_thinking:
            raise ConfigError(
                f"{task} scores given answers, which enable_thinking=true does not allow; leave it out for this task."
            )
        alone = kind == "loglikelihood_rolling" or any(request.args[0] == "" for request in requests)
        if alone and self.prefix_token_id is None:
            raise ModelError(
                f"the tokenizer of {self.model_dir} names no token that begins or ends a text, which {task} needs; "
                "name one with prefix_token_id."
            )

    def _check_answers_fit(self, task: str, cut: Sequence[Instance]) -> None:
        """Check that of each text that is cut something is left before the answer that is scored."""
        for request in cut:
            context, answer = request.args
            tokens = self._encode_pair(context, answer)[1] if context else self.tok_encode(answer)
            if len(tokens) + 1 >= self.max_length:
                raise DataError(
                    f"{task}: an answer has {len(tokens)} tokens, but the context window holds {self.max_length}; use "
                    "a model (or max_model_len) with a longer window."
                )

    def _check_generation(self, task: str, requests: Sequence[Instance]) -> tuple[dict[str, Any] | None, list[int]]:
        """Check each distinct set of generation arguments.

        Returns:
            Those that answers are drawn with, if they are, without the requests' own seeds; the budget of each request.
        """
        if self.eot_token_id is None:
            raise ModelError(
                f"the tokenizer of {self.model_dir} names no token that ends a text (eos_token), which answers need."
            )
        checked: list[tuple[dict[str, Any], int]] = []
        budgets, sampling = [], None
        for request in requests:
            arguments = {name: value for name, value in request.args[1].items() if name != "seed"}
            known = next((budget for other, budget in checked if other == arguments), None)
            if known is None:
                params = sampling_params(
                    request.args[1],
                    where=task,
                    eos=self.tokenizer.decode(self.eot_token_id) or self.tokenizer.eos_token,
                    default_budget=self.max_gen_toks,
                    vllm_config=self.model.config,
                    tokenizer=self.tokenizer,
                )
                known = params.max_tokens or 1
                checked.append((arguments, known))
                if samples(arguments, task):
                    sampling = {name: getattr(params, name) for name in SAMPLING}
            budgets.append(known)
        return sampling, budgets

    def _lengths(self, task: str, texts: Sequence[str], budgets: Sequence[int]) -> list[int]:
        """The tokens of each text; 0 where it is plain that the text and its answer fit the window."""
        window = self.max_length
        try:
            most = [_most_tokens(text) for text in texts]
        except UnicodeEncodeError as error:
            raise DataError(f"{task}: {quoted(error.object)} has half a character ({error.reason}).") from None
        measured = {
            text
            for text, tokens_at_most, budget in zip(texts, most, budgets, strict=True)
            if tokens_at_most + budget > window
        }
        measured |= {min(texts, key=len), max(texts, key=len)}  # may have no token, and one that the model lacks
        vocabulary = self.model.config.model_config.get_vocab_size()
        if len(self.tokenizer) > vocabulary:
            measured |= set(texts)  # each may have a token that the model lacks
        tokens = dict(zip(measured, self.tok_encode(list(measured)), strict=True))
        for text, ids in tokens.items():
            if not ids and text and len(self.tokenizer) <= len(self.tokenizer.all_special_tokens):
                raise ModelError(
                    f"the tokenizer of {self.model_dir} knows no tokens; copy its files again (tokenizer.json and "
                    "tokenizer_config.json), or name another with tokenizer=."
                )
            if not ids:
                raise DataError(f"{task}: the prompt {text!r} has no token; check the task's doc_to_text.")
            if max(ids) >= vocabulary:
                raise ModelError(
                    f"the tokenizer of {self.model_dir} has tokens that the model does not know: {max(ids)}, of "
                    f"{vocabulary}; copy the model again, with the tokenizer that belongs to it."
                )
        return [len(tokens.get(text, ())) for text in texts]

    def _too_long(self, kind: str, task: str, lengths: Sequence[int], budgets: Sequence[int]) -> DataError:
        """What to say of the longest of prompts that do not fit the window with their answers."""
        length, budget = max(zip(lengths, budgets, strict=True), key=sum)
        if kind == "generate_until":
            said = f"a prompt has {length} tokens, and its answer may have {budget} (max_gen_toks)"
            smaller = "a smaller k or max_gen_toks"
        else:
            said = f"a prompt and its answer have {length} tokens, and vLLM needs one more to score them"
            smaller = "a smaller k"
        return DataError(
            f"{task}: {said}, but the context window holds {self.max_length}; use {smaller}, a model (or "
            "max_model_len) with a longer window, or truncate=true, which cuts prompts off (on the side "
            "truncation_side)."
        )

    # Chats

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Select the template for all that is rendered from here on; lm-eval calls this for `--apply_chat_template`.

        Args:
            chat_template: its name; true for the model's default one, false for none.

        Returns:
            The template's text.

        Raises:
            ConfigError: the model has no template of that name, or none that is its default.
        """
        if chat_template is False or chat_template is None:
            return None
        there = self.tokenizer.chat_template
        named = there if isinstance(there, dict) else {} if there is None else {"default": there}
        if isinstance(chat_template, str):
            if chat_template not in named:
                raise ConfigError(self._no_template(f"named {quoted(chat_template)}", named))
            self.hf_chat_template = named[chat_template]
        elif self.hf_chat_template is None:
            if "default" not in named:
                raise ConfigError(self._no_template("that is its default", named))
            self.hf_chat_template = named["default"]
        return str(self.hf_chat_template)

    def _no_template(self, which: str, named: Mapping[str, str]) -> str:
        if not named:
            return f"the tokenizer of {self.model_dir} has no chat template; leave out --apply_chat_template."
        return (
            f"the tokenizer of {self.model_dir} has no chat template {which}; use --apply_chat_template with one of "
            f"{', '.join(sorted(named))}."
        )

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
        if self.hf_chat_template is None:
            self.chat_template(True)
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
            raise ConfigError(NO_CACHE)
        super().set_cache_hook(cache_hook)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, fitted and served alike."""
        return self.model.llm_engine.model_config.dtype

    @property
    def dtype_name(self) -> str:
        """`dtype` as the command line writes it."""
        return str(self.dtype).removeprefix("torch.")


def _most_tokens(text: str) -> int:
    """More tokens than any tokenizer makes of `text`.

    Raises:
        UnicodeEncodeError: it holds half a character.
    """
    size = len(text.encode())
    ascii_size = size if text.isascii() else len(text.encode("ascii", "ignore"))
    return ascii_size + TOKENS_PER_BYTE * (size - ascii_size) + ADDED_TOKENS
