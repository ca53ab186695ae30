"""What this package replaces in other libraries: the only list of it, and the check that each target is as expected.

The room that needs a replacement makes it:

    patches.apply("lm_eval: index of tasks", lambda build: build_with_ours)

A target that has moved, or takes other parameters than it did, is left as it is, and one warning says what is missing
because of that. Nothing here imports a library: a patch looks at a module that is loaded, or loads it when it is
applied.
"""

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ttt_harness.errors import TTTError

logger = logging.getLogger(__name__)

_MARK = "_replaced_by_ttt_harness"


@dataclass(frozen=True)
class Patch:
    """One thing of another library that is replaced.

    target: `module:attribute` or `module:Class.attribute`.
    expected: a function's parameters, the last `...` where others may follow; or the type of what is no function.
    why: what the replacement is for.
    link: the issue or the source upstream that says more.
    without: what a user misses where the target has moved.
    """

    target: str
    expected: tuple[Any, ...] | type
    why: str
    link: str
    without: str


_LM_EVAL = "https://github.com/EleutherAI/lm-evaluation-harness"
_VLLM = "https://github.com/vllm-project/vllm"

PATCHES: dict[str, Patch] = {
    "lm_eval: index of tasks": Patch(
        "lm_eval.tasks._index:TaskIndex.build",
        ("paths", "resolve_includes"),
        "lm-eval 0.4.13 discovers no tasks of other packages; ours are indexed after its own.",
        f"{_LM_EVAL}/pull/4015",
        "name the folder ttt_harness/task_configs with --include_path",
    ),
    "lm_eval: index of tasks, kept": Patch(
        "lm_eval.tasks._index:TaskIndex.build",
        ("paths", ...),
        "lm-eval builds its index of all tasks for each call; a sweep makes many calls.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/tasks/_index.py",
        "each cell of a sweep takes some 12 s longer",
    ),
    "lm_eval: includes of YAML files": Patch(
        "lm_eval.tasks._yaml_loader:load_yaml",
        ("path", "resolve_func", "recursive", "_seen"),
        "lm-eval looks for `include: lm_eval/tasks/...` beside the YAML only.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/tasks/_yaml_loader.py",
        "write the absolute path of the included YAML",
    ),
    "lm_eval: default of seeds": Patch(
        "lm_eval.defaults:DEFAULT_OTHER_SEED",
        int,
        "lm-eval's default for the seed of few-shot examples is told apart from the same number given by a user.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/defaults.py",
        "set the seed of the demonstrations with seed= in --model_args, not with fewshot_random_seed",
    ),
    "lm_eval: seeds of the command line": Patch(
        "lm_eval.config.evaluate_config:EvaluatorConfig.from_cli",
        ("namespace",),
        "As above, for --seed.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/config/evaluate_config.py",
        "set the seed of the demonstrations with seed= in --model_args, not with --seed",
    ),
    "lm_eval: metadata of tasks": Patch(
        "lm_eval.tasks._factory:TaskFactory._load_full_config",
        ("entry", "overrides"),
        "lm-eval merges the metadata of a YAML and of the command line; a k that both --num_fewshot and a user's k= "
        "give must be the same, while a YAML's k is a default.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/tasks/_factory.py",
        "--num_fewshot and --seed take the place of k= and seed= without a word",
    ),
    "lm_eval: selection of examples": Patch(
        "lm_eval.evaluator:evaluate",
        (
            "lm",
            "task_dict",
            "limit",
            "samples",
            "cache_requests",
            "rewrite_requests_cache",
            "bootstrap_iters",
            "write_out",
            "log_samples",
            "system_instruction",
            "apply_chat_template",
            "fewshot_as_multiturn",
            "verbosity",
            "confirm_run_unsafe_code",
        ),
        "A task is not told that --samples names other tasks only, nor the --limit that was given, and a model not the "
        "chat template that is named.",
        f"{_LM_EVAL}/issues/4084",
        "a mistyped task in --samples has all of its examples evaluated",
    ),
    "lm_eval: evaluation, left out": Patch(
        "lm_eval.evaluator:evaluate",
        ("lm", "task_dict", ...),
        "`ttt-harness fit` has lm-eval load the tasks, and fits where it would evaluate.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/evaluator.py",
        "ttt-harness fit cannot run: use lm-eval 0.4.13",
    ),
    "lm_eval: aggregation of groups": Patch(
        "lm_eval.api.group:Group.aggregate",
        ("task_metrics",),
        "lm-eval takes a function as a group's aggregation, and computes the mean.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/api/group.py",
        "the harmonic mean of bbeh_ttt is missing",
    ),
    "lm_eval: standard errors": Patch(
        "lm_eval.evaluator_utils:stderr_for_metric",
        ("metric", "bootstrap_iters"),
        "lm-eval chooses a standard error by the aggregation function, and ends with a traceback where it fails.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/api/metrics.py",
        "scores have no standard errors",
    ),
    "lm_eval: command": Patch(
        "lm_eval._cli.harness:HarnessCLI.execute",
        ("args",),
        "An error of ours ends lm-eval's command with its sentence, whichever model class runs the task.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/_cli/harness.py",
        "errors end lm_eval with a traceback",
    ),
    "lm_eval: reading of the command": Patch(
        "lm_eval._cli.harness:HarnessCLI.parse_args",
        (),
        "lm-eval ends with a traceback where an argument looks like JSON and is none.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/_cli/utils.py",
        "such an argument ends lm-eval with a traceback",
    ),
    "lm_eval: run": Patch(
        "lm_eval._cli.run:Run._execute",
        ("args",),
        "A run that could not score a task or write its results does all else, and then ends with status 1.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/_cli/run.py",
        "a task that cannot be scored ends the run before the others are scored",
    ),
    "lm_eval: saving of results": Patch(
        "lm_eval.loggers.evaluation_tracker:EvaluationTracker.save_results_aggregated",
        ("results", "samples"),
        "lm-eval warns of results that it cannot write, drops them, and ends with status 0.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/loggers/evaluation_tracker.py",
        "results that cannot be written are only warned of",
    ),
    "lm_eval: saving of samples": Patch(
        "lm_eval.loggers.evaluation_tracker:EvaluationTracker.save_results_samples",
        ("task_name", "samples"),
        "As above, for the samples of a task.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/loggers/evaluation_tracker.py",
        "samples that cannot be written are only warned of",
    ),
    "lm_eval: engine of its vllm class": Patch(
        "lm_eval.models.vllm_causallms:LLM",
        type,
        "lm-eval's class starts an engine when it is made; ours starts at the first request, and serves many runs.",
        f"{_LM_EVAL}/blob/v0.4.13/lm_eval/models/vllm_causallms.py",
        "ttt_vllm cannot run: use lm-eval 0.4.13",
    ),
    "tqdm: progress bars": Patch(
        "tqdm:tqdm.__init__",
        functools.partialmethod,
        "lm-eval has no option that leaves out its bars, one for each task of each cell.",
        "https://github.com/tqdm/tqdm/blob/v4.67.1/tqdm/std.py",
        "bars stand between the lines of the display",
    ),
    "vllm: LoRA on a CPU": Patch(
        "vllm.platforms.cpu:CpuPlatform.get_punica_wrapper",
        (),
        "vLLM's fallback gathers one weight matrix per token: 80 prompts take 331 s in place of 8 s.",
        f"{_VLLM}/blob/v0.32.0/vllm/lora/ops/torch_ops/lora_ops.py",
        "answers with an adapter take up to 40 times as long on this CPU",
    ),
    "vllm: pinned memory of adapters": Patch(
        "vllm.lora.lora_model:PIN_MEMORY",
        bool,
        "Each adapter is used for one task; pinning the 300 MB of an 8B model's takes 5 to 10 s, its copy 0.1 s.",
        f"{_VLLM}/blob/v0.32.0/vllm/lora/lora_model.py",
        "each adapter takes some seconds longer to load",
    ),
    "vllm: pinned memory of packed adapters": Patch(
        "vllm.lora.model_manager:PIN_MEMORY",
        bool,
        "As above, for the matrices that vLLM packs together.",
        f"{_VLLM}/blob/v0.32.0/vllm/lora/model_manager.py",
        "each adapter takes some seconds longer to load",
    ),
}


def apply(name: str, make: Callable[[Any], Any]) -> bool:
    """Put `make(original)` in the place of the target of `PATCHES[name]`. Safe to repeat.

    Returns:
        Whether the replacement is there; where it is not, a warning has said why and what is missing.
    """
    patch = PATCHES[name]
    try:
        owner, attribute, original = find(name)
    except LookupError as error:
        logger.warning("ttt_harness leaves %s as it is, which has changed (%s): %s.", name, error, patch.without)
        return False
    function = getattr(original, "__func__", original)  # within a staticmethod or a classmethod
    if _is_applied(name, owner, attribute):
        return True
    replacement = make(function)
    if callable(function):
        functools.update_wrapper(replacement, function)
        setattr(replacement, _MARK, name)
    if isinstance(original, (staticmethod, classmethod)):
        replacement = type(original)(replacement)
    setattr(owner, attribute, replacement)
    return True


@contextmanager
def applied(name: str, replacement: Any, *, needed: bool = True) -> Iterator[None]:
    """Put `replacement` in the place of the target of `PATCHES[name]` within the block.

    Args:
        needed: whether the block cannot do without; else a warning says what is missing.

    Raises:
        TTTError: the target has changed, and is needed.
    """
    patch = PATCHES[name]
    try:
        owner, attribute, original = find(name)
    except LookupError as error:
        if needed:
            raise TTTError(f"{name} has changed ({error}), so that {patch.without}.") from None
        logger.warning("ttt_harness leaves %s as it is, which has changed (%s): %s.", name, error, patch.without)
        yield
        return
    setattr(owner, attribute, replacement)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


def _is_applied(name: str, owner: Any, attribute: str) -> bool:
    return getattr(getattr(owner, attribute), _MARK, None) == name


def find(name: str) -> tuple[Any, str, Any]:
    """The object that holds the target of `PATCHES[name]`, the target's name in it, and the target.

    Raises:
        LookupError: it is not there, or not what was expected; the message says which.
    """
    patch = PATCHES[name]
    module, _, path = patch.target.partition(":")
    *holders, attribute = path.split(".")
    try:
        owner = functools.reduce(getattr, holders, importlib.import_module(module))
        original = inspect.getattr_static(owner, attribute)
    except (ImportError, AttributeError):
        raise LookupError(f"there is no {patch.target}") from None
    if isinstance(patch.expected, type):
        if not isinstance(original, patch.expected):
            raise LookupError(f"{path} is no {patch.expected.__name__}")
    elif not callable(function := getattr(original, "__func__", original)):
        raise LookupError(f"{path} is no function")
    else:
        bound = ("self", "cls")
        found = tuple(name for name in inspect.signature(function).parameters if name not in bound)
        first, more = patch.expected, patch.expected[-1:] == (...,)
        if more:
            first = first[:-1]
        if found[: len(first) if more else None] != first:
            wanted = ", ".join([*first, *(["..."] if more else [])])
            raise LookupError(f"{path} takes ({', '.join(found)}) and not ({wanted})")
    return owner, attribute, original
