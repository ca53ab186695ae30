"""Reads the file of a grid: YAML with the keys `methods`, `seeds` and `grid`, and the options of `lm_eval run`.

A value is a text, a number, true or false, or a list or mapping of these; keys are texts. What YAML can hold beyond
that is refused here, so that nothing after it has to ask: dates, keys that are numbers, keys that stand there twice,
integers that Python does not print, and aliases that stand for more than a file of this kind can mean.
"""

from pathlib import Path
from typing import Any

import yaml

from ttt_harness.config import nearest
from ttt_harness.errors import ConfigError

# A grid of every method with 1000 seeds and a hundred settings has fewer values; an alias counts as what it stands for.
MAX_VALUES = 10_000
MAX_DEPTH = 20
MAX_DIGITS = 40

_KINDS = {
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge", "value")
}


def read_grid_file(path: Path) -> dict[str, Any]:
    """The content of a grid file.

    Raises:
        ConfigError: the file cannot be read, or holds something else than keys with values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not YAML: {error.reason} (not UTF-8 text).") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _check(root, path)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {_where(error)}.") from None
    except RecursionError:
        raise ConfigError(f"--config {path} is nested too deeply: {MAX_DEPTH} levels are allowed.") from None
    except (ValueError, OverflowError) as error:  # a date or a number that only looks like one
        raise ConfigError(f"--config {path} holds a value that is none: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold keys with values, as in `methods: [icl, ttt]`.")
    return content


def refuse_unknown_keys(content: dict[str, Any], known: set[str]) -> None:
    """Raises ConfigError where the file has a key that is none of `known`."""
    for key in content:
        if key not in known:
            raise ConfigError(
                f"{key} in --config is neither methods, nor seeds, nor grid, nor an option of lm_eval."
                f"{nearest(key, known)}"
            )


def _check(root: yaml.Node, path: Path) -> None:
    """Check the nodes of a file before values are made of them. Aliases are nodes that stand in several places.

    Raises:
        ConfigError: it holds something that a grid file cannot.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: tuple[int, ...]) -> int:
        """The number of values that the node stands for."""
        if id(node) in above or len(above) > MAX_DEPTH:
            raise ConfigError(f"--config {path} is nested too deeply: {MAX_DEPTH} levels are allowed.")
        if id(node) not in sizes:
            within = (*above, id(node))
            _check_kind(node, path)
            if isinstance(node, yaml.MappingNode):
                _check_keys(node, path)
                children = [value for _, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            else:
                children = []
            sizes[id(node)] = 1 + sum(size(child, within) for child in children)
        if sizes[id(node)] > MAX_VALUES:
            raise ConfigError(f"--config {path} holds more than {MAX_VALUES} values; aliases count as often as used.")
        return sizes[id(node)]

    size(root, ())


def _check_keys(node: yaml.MappingNode, path: Path) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (
            "tag:yaml.org,2002:str",
            "tag:yaml.org,2002:merge",
            "tag:yaml.org,2002:value",
        ):
            shown = key.value if isinstance(key, yaml.ScalarNode) else key.id
            raise ConfigError(
                f"--config {path} must hold keys that are words, as in `methods: [icl, ttt]`: {shown[:40]!r} in line "
                f"{key.start_mark.line + 1} is none; put it between quotes if it is meant."
            )
        if key.value in seen and key.tag.endswith(":str"):
            raise ConfigError(
                f"--config {path} gives {key.value!r} twice, in line {key.start_mark.line + 1} again; keep one of them."
            )
        seen.add(key.value)


def _check_kind(node: yaml.Node, path: Path) -> None:
    shown = f"{node.value[:40]!r} " if isinstance(node, yaml.ScalarNode) else ""
    where = f"{shown}in line {node.start_mark.line + 1}"
    if node.tag not in _KINDS:
        raise ConfigError(
            f"--config {path} holds a value that is neither text, number, true nor false, nor a list or keys of such: "
            f"{where} ({node.tag.rpartition(':')[2]}); put it between quotes if it is a text."
        )
    if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
        raise ConfigError(f"--config {path} holds a number that is too long: {where} has {len(node.value)} digits.")


def _where(error: yaml.YAMLError) -> str:
    """What YAML's parser says, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem or error.context} in line {error.problem_mark.line + 1}"
    return str(error).splitlines()[0].rstrip(".")
