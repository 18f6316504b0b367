"""Builds the wheel: pure Python, with compiled kernels added where a compiler and torch's headers are at hand
(see vlp_ops/build.py).

torch is deliberately no build requirement: an installer would download a second one only to compile.
"""

import importlib
import shutil
import sys
import types
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SOURCE = HERE / "src" / "vlp_ops"


def load_build():
    # Past the package itself, which imports torch: a build may not have it.
    package = types.ModuleType("vlp_ops")
    package.__path__ = [str(SOURCE)]
    sys.modules[package.__name__] = package
    return importlib.import_module("vlp_ops.build")


class BuildWithKernels(build_py):
    def run(self):
        target = SOURCE if self.editable_mode else Path(self.build_lib, "vlp_ops")
        if not self.editable_mode:
            # What an earlier build left there, renamed modules and libraries for another torch, is no part of
            # this wheel.
            shutil.rmtree(target, ignore_errors=True)
        super().run()
        build = load_build()
        try:
            for message in build.build_for_install(target):
                print(message, file=sys.stderr)
        except build.BuildError as error:
            raise SystemExit(f"vlp-ops: {error}") from error


class Wheel(bdist_wheel):
    def get_tag(self):
        # The libraries hold no Python symbol: one wheel serves every Python 3 of its platform.
        tag = super().get_tag()
        if not list(Path(self.bdist_dir, "vlp_ops").glob("_C_*.so")):
            return tag
        self.root_is_pure = False
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": Wheel})
