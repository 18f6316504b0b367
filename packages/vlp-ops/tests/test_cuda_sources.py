"""The CUDA sources where there is no GPU: compiled by nvcc without spills or warnings, their logic run on the
CPU.

The emulation (tests/emulation) compiles the same .cu files as C++ and runs every lane; the ordinary tests of
the operators then pass through them. It says nothing about speed or about races between warps.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vlp_ops import build

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent


def test_all_kernels_compile_without_spills_or_warnings():
    # Where there is a compiler, whatever is wrong with it fails the test.
    if (
        shutil.which("nvcc") is None
        and not os.environ.get("CUDA_HOME")
        and not Path("/usr/local/cuda").exists()
    ):
        pytest.skip("no nvcc on the path, no CUDA_HOME, no /usr/local/cuda")
    done = subprocess.run(
        [sys.executable, "-m", "vlp_ops.build", "--check-cuda"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without spills or warnings" in done.stdout


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    torch, folder = build.find_torch(), tmp_path_factory.mktemp("emulated")
    library = folder / "emulated.so"
    sources = sorted((build.PACKAGE / "csrc" / "cuda").glob("*.cu"))
    assert sources
    defines = ["-DVLP_EMULATE", f"-DTORCH_TARGET_VERSION={build.TARGET}"]
    includes = ["-I", TESTS / "emulation", "-isystem", torch.root / "include"]
    flags = ["-O1", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    link = ["-L", torch.root / "lib", "-ltorch_cpu"]
    build.run(["g++", *flags, *defines, *includes, "-x", "c++", *sources, "-x", "none", *link, "-o", library])
    return library


# The contrastive kernels take minutes in the emulation, more on a busy machine.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("module", ["deformable", "memory", "tokens", "contrastive", "kernels"])
def test_kernels_in_emulation(module, emulated, request):
    golden = request.config.getoption("--golden")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--show-capture=no",
        str(TESTS / f"test_{module}.py"),
    ]
    done = subprocess.run(
        [*command, *(["--golden", str(golden)] if golden else [])],
        env=os.environ | {"VLP_OPS_DISABLE_NATIVE": "1", "VLP_OPS_TEST_LIBRARY": str(emulated)},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_an_index_out_of_range_gives_nan(emulated):
    """No device assert in a release build: nothing is read outside, and nothing goes on in silence."""
    code = """
import os, torch, vlp_ops
torch.ops.load_library(os.environ["VLP_OPS_TEST_LIBRARY"])
operators = torch.ops.vlp_ops
table, shares = torch.ones(5, 8), torch.ones(2, 3)
for wrong in (-1, 5, 1 << 40):
    indices = torch.tensor([[0, 1, 2], [3, wrong, 4]])
    out = operators.embedding_bag(indices, table, shares)
    assert (out[0] == 3).all() and out[1].isnan().all()
    weight, share = operators.embedding_bag_backward(torch.ones(2, 8), indices, table, shares, [True, True])
    assert (weight == 1).all() and share[0].tolist() == [8, 8, 8]
    tokens = operators.take_tokens(torch.ones(2, 5, 8), indices)
    assert (tokens[0] == 1).all() and tokens[1, 1].isnan().all() and (tokens[1, ::2] == 1).all()
    slots = torch.tensor([[0, wrong * 5, 7]])
    grads = operators.product_key_topk_backward(torch.ones(1, 3), slots, 5, 5)
    assert [grad.sum().item() for grad in grads] == [2, 2]
"""
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLP_OPS_DISABLE_NATIVE": "1", "VLP_OPS_TEST_LIBRARY": str(emulated)},
        check=True,
    )
