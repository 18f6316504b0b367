"""What the package says about itself, and what importing it costs."""

import os
import subprocess
import sys

import torch
import vlp_ops


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_backend_info():
    info = vlp_ops.backend_info()
    assert info["torch"] == torch.__version__ and info["torch_cuda"] == torch.version.cuda
    for device in ("cpu", "cuda"):
        assert info[device]["native"] == (info[device]["reason"] is None)


def test_native_kernels_can_be_switched_off():
    code = "import vlp_ops; print(vlp_ops.backend_info()['cpu'])"
    assert "VLP_OPS_DISABLE_NATIVE is set" in python(code, VLP_OPS_DISABLE_NATIVE="1")
    assert "VLP_OPS_DISABLE_NATIVE" not in python(code, VLP_OPS_DISABLE_NATIVE="0")


def test_importing_adds_nothing_heavy_to_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import vlp_ops; "
        "print(*sorted({name.split('.')[0] + '.' + name.split('.')[1] if name.startswith('torch.') else "
        "name.split('.')[0]"
        " for name in set(sys.modules) - before}))"
    )
    added = set(python(code).split())
    assert not added & {
        "torch._dynamo",
        "torch._inductor",
        "torchvision",
        "transformers",
        "triton",
        "numpy",
        "sympy",
    }, added


def test_cuda_tensors_without_cuda_kernels_are_announced_once(monkeypatch):
    import warnings

    from vlp_ops import _library

    class OnCuda:
        is_cuda = True

    monkeypatch.setitem(_library._reasons, "cuda", "no nvcc was found")
    _library._warn_no_cuda.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _library.note_backend(OnCuda())
        _library.note_backend(OnCuda())
    assert [str(warning.message) for warning in seen] == [
        "vlp_ops was built without CUDA kernels (no nvcc was found); using the PyTorch implementation"
    ]
    _library._warn_no_cuda.cache_clear()


def test_every_operator_has_all_registrations():
    from vlp_ops._library import SCHEMAS

    for schema in SCHEMAS:
        name = f"vlp_ops::{schema.split('(')[0]}"
        keys = ["CompositeExplicitAutograd"]
        # Those that change their arguments are parts of others and are called inside of these only.
        if "!" not in schema:
            keys += ["Meta", "AutocastCPU", "AutocastCUDA"]
        for key in keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} has nothing for {key}"
