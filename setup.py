"""Builds pydeqsolve._native with CMake; CMakeLists.txt holds its sources, flags and options.

Environment: PYDEQSOLVE_NATIVE=0 installs without the native module, PYDEQSOLVE_CUDA=AUTO|ON|OFF chooses the CUDA
kernels, CMAKE_ARGS adds arguments for CMake.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext


class FreshBuild(build):
    """Forgets what an earlier build left in build/lib: a module that was removed since would be installed again."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures and builds in build/native, which is kept: only what changed is compiled again.

    Of what is compiled only bindings.cpp knows the Python: another one compiles that file, and links.
    """

    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).resolve().parent
        build = source / "build" / "native"
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parents[1]
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise SystemExit(failure("cmake and ninja are needed"))
        self.forget_configuration(build)
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_directory(),
            "PYDEQSOLVE_CUDA": os.environ.get("PYDEQSOLVE_CUDA") or "AUTO",
        }
        arguments = [f"-D{name}={value}" for name, value in options.items()]
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            subprocess.run([cmake, "-S", str(source), "-B", str(build), "-G", "Ninja", *arguments], check=True)
            subprocess.run([cmake, "--build", str(build)], check=True)
            subprocess.run([cmake, "--install", str(build), "--prefix", str(prefix)], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit(failure("CMake says why above; it needs a C++17 compiler")) from None

    @staticmethod
    def forget_configuration(build: Path) -> None:
        # Paths of an earlier build environment, or an nvcc no longer there, would be taken from the cache.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for compilers in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(compilers)


def pybind11_directory() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


def failure(reason: str) -> str:
    return f"pydeqsolve: no native module: {reason}. PYDEQSOLVE_NATIVE=0 installs without it."


native = os.environ.get("PYDEQSOLVE_NATIVE", "1") != "0"
setup(
    ext_modules=[Extension("pydeqsolve._native", sources=[])] if native else [],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
