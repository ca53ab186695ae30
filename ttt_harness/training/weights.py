"""The files that hold a model's weights, and whether they can be those of its `config.json`; reads headers only."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ttt_harness.errors import ModelError
from ttt_harness.training.model_config import as_transformers_config, one_line
from ttt_harness.training.shape import FAST

# As safetensors names them. A matrix of another kind is quantized.
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
# Where config.json leaves these out, transformers and vLLM take the numbers of one model of the family.
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip


def weight_files(model_dir: Path) -> list[Path]:
    """The files that hold the weights: those that the index names, where there is one.

    Beside them some repositories on the hub keep the same weights in another layout (`consolidated.safetensors`).

    Raises:
        ModelError: the index is damaged, or names a file that is not there.
    """
    index = model_dir / "model.safetensors.index.json"
    if not index.exists():
        single = model_dir / "model.safetensors"
        return [single] if single.exists() else sorted(model_dir.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is not an index of safetensors files; copy the model again.") from None
    for name in sorted(names):
        if not (model_dir / name).is_file():
            raise ModelError(f"{model_dir} lacks {name}, which {index.name} lists; copy the model again.")
    return [model_dir / name for name in sorted(names)]


def check_weights(model_dir: Path, config: Mapping[str, Any]) -> None:
    """Compare the shapes of the stored tensors with those of the model that `config` describes, by their names.

    A tensor that only one of the two has is left to the loading, which knows the renames of each architecture.

    Raises:
        ModelError: a file is damaged, or a tensor has another shape, or is quantized.
    """
    expected = _expected_shapes(model_dir, config)
    for name, dtype, shape in _stored(model_dir):
        if len(shape) > 1 and dtype not in _PLAIN_DTYPES:
            raise ModelError(
                f"{model_dir} has quantized weights ({name} is stored as {dtype}), which can be served but not fitted; "
                "use the model that it was made from, or method=icl."
            )
        if shape != expected.get(name, shape):
            text = config.get("text_config") or config
            unstated = ", ".join(key for key in _SIZES if text.get(key) is None)
            raise ModelError(
                f"{model_dir} has a config.json that is not of its weights: {name} has the shape {list(shape)}, and by "
                f"the config it would have {list(expected[name])}"
                f"{f' (it does not state {unstated})' if unstated else ''}; copy the model again."
            )


def _stored(model_dir: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each stored tensor."""
    for path in weight_files(model_dir):
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                found = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()]
        except Exception as error:  # safetensors raises several kinds
            raise ModelError(
                f"{path} is not a readable safetensors file ({one_line(error)}); copy the model again."
            ) from None
        yield from found


def _expected_shapes(model_dir: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    from ttt_harness.training.general import model_without_storage  # imports torch and the model's code

    family = FAST.get(config["architectures"][0])
    full = as_transformers_config(config, where=str(model_dir), model_type=family.model_type if family else None)
    try:
        model = model_without_storage(full)
    except Exception as error:  # of a model's own code: sizes that do not fit together
        raise ModelError(
            f"{model_dir} has a config.json of which transformers can make no model ({one_line(error)}); correct it."
        ) from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
