"""The Triton twins agree with their references: in triton's interpreter, which needs no GPU, and on a GPU."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}  # the interpreter truncates bfloat16 where a GPU rounds: twice the error

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


def names() -> list[str]:
    """The cases, read from the source: an import would load triton in this process, in its compiling mode."""
    tree = ast.parse((HERE / "triton_cases.py").read_text())
    table = next(node for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "CASES")
    return [name.id for name in table.value.generators[0].iter.elts]


SIXTEEN_BITS = {"mixed_step", "writes", "code_writes", "norms", "convolution"}
"""Cases that the default run interprets in bfloat16 too, one of each kind; the slow tests interpret all."""


@cache
def interpreted(*cases: str) -> dict[str, float]:
    """The error of these cases, from a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-W", "ignore", HERE / "triton_cases.py", *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this triton takes no loop bounds from this numpy (triton 3.6, numpy 2.4)")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


QUICK = [f"{case} {format}" for case in names() for format in LIMITS if format == "float32" or case in SIXTEEN_BITS]
SLOW = [f"{case} bfloat16" for case in names() if case not in SIXTEEN_BITS]


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_twin_in_the_interpreter_agrees_with_its_reference(case):
    errors = interpreted(*(QUICK if case in QUICK else SLOW))
    assert errors[case] <= LIMITS[case.split()[1]]


@pytest.mark.gpu
@pytest.mark.parametrize("format", LIMITS)
@pytest.mark.parametrize("case", names())
def test_a_twin_on_a_gpu_agrees_with_its_reference(case, format):
    import triton_cases

    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    assert triton_cases.run(case, format, "cuda") <= LIMITS[format]


def test_a_cpu_imports_no_triton():
    used = "from nanokv.kernels.ops import AUTO; AUTO.silu_mul(torch.ones(1, 2))"
    program = f"import sys, torch; {used}; print([*sys.modules])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=HERE.parent)
    assert "nanokv.kernels.cuda" not in ast.literal_eval(shown.stdout)
