"""The vLLM engine: its defaults on this machine, its start, and requests with an adapter.

lm-eval's `VLLM` class waits for an engine as soon as it is made. `Engine` stands in the engine's place there and starts
at the first request, or in the background, so that what is wrong with a run is said before a model is loaded.
"""

import atexit
import contextlib
import copy
import multiprocessing
import os
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models import ModelRegistry, supports_lora
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from ttt_harness.config import quoted
from ttt_harness.errors import ModelError

# How long a process that ends waits, at most, for vLLM to have processes that can be ended.
STOP_SECONDS = 60
# Bytes for keys and values on a CPU; vLLM would take nine tenths of the memory.
CPU_KV_CACHE = 4 * 2**30


def has_native_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16 (AVX512-BF16, AMX); without, that is 7 times slower than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def default_engine_args() -> dict[str, Any]:
    """What the engine is started with where the user says nothing."""
    args: dict[str, Any] = {"enable_prefix_caching": True, "use_tqdm_on_load": False}
    if current_platform.is_cpu():
        args |= {
            "dtype": "bfloat16" if has_native_bf16() else "float32",
            "enforce_eager": True,  # compiling costs more than a run
            # The prefix cache keeps whole blocks only; with vLLM's 128 tokens much of a prompt is computed again.
            "block_size": 32,
        }
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:  # which counts for more than the argument
            args["kv_cache_memory_bytes"] = CPU_KV_CACHE
        # The engine in this process: two processes less to start, which on two cores is 50 s less to wait. On a GPU
        # it has a process of its own, where it can start and answer while this one fits.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    else:
        # vLLM would record 51 batch sizes, each for whole steps and for pieces of them, with adapters and without: 200
        # CUDA graphs before it answers. A batch is filled up to the next size there is, prompts are longer than any of
        # them, and nearly all requests have an adapter.
        args["cudagraph_capture_sizes"] = [2**n for n in range(9)]
        graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_specialize_lora": False}
        # Compiling (mode 3) takes a minute the first time and some seconds later, and answers are not faster.
        args["compilation_config"] = {"mode": 0, **graphs}
        # The largest of these; vLLM's 1024 take 20 s to warm up, for no faster answers to the 250 questions of a task.
        args["max_num_seqs"] = 256
    return args


def check_sees_images(architectures: Any, *, where: str) -> None:
    """Check that vLLM can import its class of a model that sees images.

    Many such classes need torchvision. Where that is missing vLLM tells so in its log alone.

    Args:
        architectures: as `config.json` has them.
        where: the model, for messages.

    Raises:
        ModelError: a module is missing.
    """
    if find_spec("torchvision") is not None:
        return
    for architecture in architectures if isinstance(architectures, list) else ():
        module = getattr(ModelRegistry.models.get(str(architecture)), "module_name", None)
        try:
            if module is not None:
                import_module(module)
        except ImportError as error:
            raise ModelError(
                f"{where} is a model of images and text ({architecture}), and vLLM cannot import its class here "
                f"({error}); install torchvision for this build of torch, or use a model of text alone."
            ) from error


class Engine:
    """A vLLM `LLM` that is started by its first request, or before it in the background.

    Args:
        engine_args: what `LLM` takes.
    """

    def __init__(self, **engine_args: Any) -> None:
        self.engine_args = engine_args
        self._adapters: dict[str, LoRARequest] = {}
        self._llm: LLM | None = None
        self._starting: Future[LLM] | None = None
        self._asleep = False
        self._config: VllmConfig | None = None

    @property
    def config(self) -> VllmConfig:
        """The configuration that the engine starts with; does not start it.

        Raises:
            ModelError: vLLM refuses the model or its arguments.
        """
        if self._config is None:
            before = dict(os.environ)
            try:
                arguments = EngineArgs(**copy.deepcopy(self.engine_args))  # which vLLM may change
                self._config = arguments.create_engine_config(usage_context=UsageContext.LLM_CLASS)
                get_model_loader(self._config.load_config)  # refuses formats, otherwise at the start only
            except Exception as error:
                raise ModelError(f"vLLM refuses these model arguments: {reason_of(error)}.") from error
            finally:
                # vLLM sets what its own processes need; the workers of a cluster, say, would inherit it.
                for name in os.environ.keys() - before.keys():
                    del os.environ[name]
                os.environ.update(before)
        return self._config

    def check(self) -> None:
        """Check what vLLM would find out at its start only: LoRA for this architecture, and room for one request.

        Raises:
            ModelError: the engine would not start.
        """
        self._check_lora()
        self._check_kv_cache()

    def _check_lora(self) -> None:
        if self.config.lora_config is None:
            return
        model = self.config.model_config
        kind, architecture = ModelRegistry.resolve_model_cls(model.architectures, model)
        if not supports_lora(kind):
            raise ModelError(
                f"vLLM serves {architecture} without LoRA adapters; use a model of another architecture, or method=icl "
                "without lora_local_path and enable_lora."
            )

    def _check_kv_cache(self) -> None:
        model, cache, parallel = self.config.model_config, self.config.cache_config, self.config.parallel_config
        room, dtype = cache.kv_cache_memory_bytes, model.dtype
        assert isinstance(dtype, torch.dtype), "vLLM has resolved its name"
        whole_contexts = model.get_sliding_window() is None and not (
            model.use_mla
            or model.is_hybrid
            or model.is_attention_free
            or getattr(model.hf_text_config, "attention_chunk_size", None)
        )
        if room is None or not whole_contexts or cache.cache_dtype != "auto" or not cache.block_size:
            return
        heads = model.get_num_kv_heads(parallel) * model.get_head_size()
        per_token = 2 * model.get_num_layers(parallel) * heads * dtype.itemsize
        blocks = -(-model.max_model_len // cache.block_size)
        if blocks * cache.block_size * per_token > room:
            most = room // (cache.block_size * per_token) * cache.block_size
            raise ModelError(
                f"the keys and values of a context of {model.max_model_len} tokens need "
                f"{blocks * cache.block_size * per_token / 2**30:.1f} GiB, and vLLM has {room / 2**30:.1f} GiB for "
                f"them; set max_model_len to at most {most}, or a larger kv_cache_memory_bytes."
            )

    @property
    def llm_engine(self) -> Any:
        """What lm-eval reads `model_config` from; does not start the engine."""
        return SimpleNamespace(model_config=self.config.model_config)

    @property
    def running(self) -> bool:
        """Whether the engine is started, or being started."""
        return self._llm is not None or self._starting is not None

    @property
    def ready(self) -> bool:
        """Whether a request would be answered without waiting for the start."""
        return self._llm is not None or (self._starting is not None and self._starting.done())

    def start_soon(self) -> None:
        """Start the engine in the background; whoever needs it first waits for it, a process that ends does not."""
        if self.running:
            return
        starting: Future[LLM] = Future()
        self._starting = starting

        def start() -> None:
            try:
                starting.set_result(self._start())
            except BaseException as error:
                starting.set_exception(error)

        atexit.register(_stop_starting, starting, multiprocessing.active_children())
        threading.Thread(target=start, name="engine-start", daemon=True).start()

    def start(self) -> LLM:
        """Start the engine if it is not running, wake it if it sleeps, and return it.

        Raises:
            ModelError: vLLM cannot start it.
        """
        llm = self._started() or self._start()
        self._llm = llm
        if self._asleep:
            with self._discarded_on_error("wake up"):
                llm.wake_up()
            self._asleep = False
        return llm

    def _started(self) -> LLM | None:
        """The running engine, after a wait for one that is being started; None where there is none."""
        if self._starting is not None:
            starting, self._starting = self._starting, None
            self._llm = starting.result()
            atexit.unregister(_stop_starting)
        return self._llm

    def _start(self) -> LLM:
        try:
            llm = LLM(**self.engine_args)
        except Exception as error:
            # In this process it leaves what the next start would trip over: process groups, a part of the memory.
            cleanup_dist_env_and_memory()
            raise ModelError(f"vLLM could not start: {reason_of(error)}.") from error
        # vLLM ends its processes in a finalizer. Where that comes after multiprocessing's own exit function, which
        # waits for these processes, Python would never end; which comes first depends on what was imported when.
        atexit.register(_end, llm)
        return llm

    def make_room(self) -> None:
        """Give the GPU's memory to others until the next request: the weights move to the host's memory."""
        if self.running and not self._asleep:
            # Level 2, which drops the weights, crashes at wake-up with LoRA.
            llm = self.start()
            with self._discarded_on_error("give its memory to the fits"):
                llm.sleep(level=1)
            self._asleep = True

    def generate(
        self,
        prompts: Sequence[Any],
        sampling_params: Sequence[SamplingParams] | SamplingParams,
        use_tqdm: bool = False,  # noqa: ARG002 - lm-eval passes it; the run has one progress display of its own
        lora_request: LoRARequest | list[LoRARequest] | None = None,
    ) -> list[RequestOutput]:
        """Answer `prompts` in order, all with the same adapter, each with its own, or with none.

        Raises:
            ModelError: vLLM cannot start, or cannot answer. The next request then starts a new engine.
        """
        llm = self.start()
        with self._discarded_on_error("answer"):
            return llm.generate(prompts, sampling_params, use_tqdm=False, lora_request=lora_request)

    @contextlib.contextmanager
    def _discarded_on_error(self, what: str) -> Iterator[None]:
        """Stop an engine that raises while it is to do `what`: it would go on with the failed request for ever.

        Raises:
            ModelError: what vLLM raised, in one sentence.
        """
        try:
            yield
        except BaseException as error:  # Ctrl-C too leaves requests behind
            if not isinstance(error, Exception):
                self.close(timeout=0)
                raise
            self.close()
            raise ModelError(f"vLLM could not {what}: {reason_of(error)}.") from error

    def changes_output(self, adapter: LoRARequest, prompt: Sequence[int]) -> bool:
        """Whether `adapter` changes the likeliest next tokens, or their log-probabilities, after `prompt`."""
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, detokenize=False)
        seen = []
        for request in (None, adapter):
            output = self.generate([{"prompt_token_ids": list(prompt)}], params, lora_request=request)
            logprobs = output[0].outputs[0].logprobs
            assert logprobs, "vLLM returns the log-probabilities that it was asked for"
            seen.append({token: entry.logprob for token, entry in (logprobs[0] or {}).items()})
        return seen[0] != seen[1]

    def log_probabilities(self, tokens: Sequence[int], adapter: LoRARequest | None) -> list[float]:
        """Natural log-probabilities of `tokens` after the first, each given those before it: shape [tokens - 1].

        Raises:
            ModelError: see `generate`.
        """
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self.generate([{"prompt_token_ids": list(tokens)}], params, lora_request=adapter)
        assert output.prompt_logprobs is not None
        found = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        return [of_token[token].logprob for token, of_token in found if of_token is not None]

    def adapter(self, name: str, path: Path) -> LoRARequest:
        """The adapter in the PEFT directory `path`, under a name and a number of its own: vLLM's caches go by them."""
        if name not in self._adapters:
            number = len(self._adapters) + 1
            self._adapters[name] = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path))
        return self._adapters[name]

    def close(self, timeout: float | None = None) -> None:
        """Stop the engine and free its memory; a later request starts it again.

        Args:
            timeout: seconds that its processes have to end by themselves; None for vLLM's own choice.
        """
        try:
            llm = self._started()
        except ModelError:  # one that did not start has nothing to stop
            return
        if llm is None:
            return
        llm.llm_engine.engine_core.shutdown(timeout=timeout)
        atexit.unregister(_end)
        self._llm = None
        self._asleep = False
        cleanup_dist_env_and_memory()


def _end(llm: LLM) -> None:
    """End the engine's processes at once, without the 5 s that vLLM gives them: all answers are there."""
    llm.llm_engine.engine_core.shutdown(timeout=0)


def _stop_starting(starting: Future[LLM], others: Sequence[Any]) -> None:
    """End the start of an engine, with its processes as soon as there are any: all children but `others`.

    Python would wait for one that comes later for ever.
    """
    if starting.done():
        return  # it has put `_end` among what is done at the end
    end = time.monotonic() + STOP_SECONDS
    while not starting.done() and time.monotonic() < end:
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()
        time.sleep(0.02)
    if starting.done() and starting.exception() is None:
        _end(starting.result())


_engine: Engine | None = None


def shared_engine(**engine_args: Any) -> Engine:
    """This process's engine; the one there is, if it has these arguments, else a new one in its place.

    A sweep makes a model object for each of its cells, and all of them use one engine.
    """
    global _engine
    if _engine is None or _engine.engine_args != engine_args:
        if _engine is not None:
            _engine.close()
        _engine = Engine(**engine_args)
    return _engine


def reason_of(error: Exception) -> str:
    """The first sentence of an exception of vLLM's, whose messages run over many lines."""
    errors = getattr(error, "errors", None)
    if callable(errors):  # pydantic
        text = "; ".join(_pydantic_reason(item) for item in errors())
    else:
        text = str(error).strip().partition("\n\n")[0]
    shortened = textwrap.shorten(" ".join(text.split()), 300, placeholder=" [...]")
    return (shortened or type(error).__name__).rstrip(".")


def _pydantic_reason(item: Mapping[str, Any]) -> str:
    """One finding of pydantic's with the argument that it is about, which may be a part of another."""
    name = ".".join(str(part) for part in item.get("loc", ()))
    said = str(item.get("msg", item)).removeprefix("Value error, ").rstrip(".")
    return f"{name}={quoted(item.get('input'))}: {said}" if name else said
