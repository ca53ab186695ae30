"""What an adapter takes on disk, known before it is fitted, and sizes as people write them."""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ttt_harness.config import SIZE
from ttt_harness.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from ttt_harness.training.shape import ModelShape

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Names, shapes and places of the tensors of a layer in the table of a weights file.
TABLE_BYTES_OF_LAYER = 2**11
# The config, and the record with a loss for each step.
SMALL_FILES = 2**15
_DTYPES = {2: "BF16", 4: "F32"}  # by their lengths: float16 is "F16", but not fitted


def adapter_bytes(shape: "ModelShape", rank: int, dtype: "torch.dtype") -> int:
    """What an adapter that is fitted with `rank` takes in a store: its weights file to the byte, and the small files.

    The names and shapes are those that the family's own conversion gives to the adapter of a model without storage. Of
    a model that is fitted the general way the table of names is estimated.
    """
    if shape.way == "general":
        weights = shape.adapter_parameters(rank) * dtype.itemsize
        return weights + shape.num_layers * TABLE_BYTES_OF_LAYER + SMALL_FILES
    import torch

    from ttt_harness.training.families import FAMILIES
    from ttt_harness.training.tune import get_adapter_params, set_default_dtype

    family = FAMILIES[shape.architecture]
    with set_default_dtype(dtype), torch.device("meta"):
        model = family.build(shape, max_seq_len=1, rank=rank, alpha=1.0, dropout=0.0)
        written = family.to_peft(dict(get_adapter_params(model)), shape)
    return _safetensors_bytes({name: tuple(tensor.shape) for name, tensor in written.items()}, dtype) + SMALL_FILES


def _safetensors_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: "torch.dtype") -> int:
    """The size of a safetensors file: eight bytes, a table of the tensors as JSON, filled up to eight, and the values.

    See https://huggingface.co/docs/safetensors#format
    """
    table, end = {}, 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _DTYPES[dtype.itemsize], "shape": shape, "data_offsets": [start, end]}
    header = len(json.dumps(table, separators=(",", ":")))
    return 8 + math.ceil(header / 8) * 8 + end


def parse_size(text: str, *, of: str) -> int:
    """Read "50GB", "1.5 TiB" or a number of bytes.

    Args:
        of: what it is a value of, for the message.

    Raises:
        ConfigError: it is no size.
    """
    found = SIZE.fullmatch(str(text))
    unit = found[2].upper() if found else ""
    factor = _UNITS.get(unit if unit.endswith("B") else f"{unit}B")
    if found is None or factor is None:
        raise ConfigError(f"{of}={str(text)[:40]} is no size; write for example 50GB, 1.5TB or 800MiB.")
    return int(float(found[1]) * factor)


def size_text(count: float) -> str:
    """A number of bytes for people, in powers of 1000: "315 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 1000 else f"{count:.0f} TB"
