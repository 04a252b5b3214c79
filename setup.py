"""Builds the extension: kernels.cpp once per instruction set, bindings.cpp once.

Everything else about the package is in pyproject.toml. Without a working C++ compiler the package
still installs and runs on its plain-PyTorch reference.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
# For make sanitize: the value of GCC's -fsanitize. Such builds also detect reads of unwritten
# memory and integer overflow, although Python builds its extensions with -fwrapv.
SANITIZE: list[str] = []
if sanitizers := os.environ.get("FASTLLM_SANITIZE"):
    SANITIZE = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    FLAGS += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", "-DFASTLLM_POISON"]
# Square roots need not set errno. The warnings are false alarms in GCC's own headers.
KERNEL_FLAGS = [*FLAGS, "-fno-math-errno", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]

OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler lacks it

ISAS: dict[str, list[str]] = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX2 = ["-mavx2", "-mfma"]
    AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]
    AVX512 += ["-mprefer-vector-width=512"]
    AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16}

NO_EXTENSION = """
*********************************************************************************************
fastllm: the C++ extension was NOT built, so everything will run on the slow PyTorch reference.
Cause:   {error}
Remedy:  install a C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++;
         macOS: xcode-select --install) and install fastllm again. With --verbose, pip also shows
         what the compiler printed.
*********************************************************************************************
"""


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for objects in pool.map(partial(self.compile_kernels, ext), ISAS):
                    ext.extra_objects += objects
            super().build_extension(ext)
            # Python started in this folder imports its sources, whether installed or not.
            if not (self.inplace or SANITIZE):
                self.copy_file(self.get_ext_fullpath(ext.name), "fastllm")
        except Exception as error:  # the compiler driver may raise anything; the install goes on
            if SANITIZE:
                raise
            # An earlier build in this folder would be imported, but does not fit these sources.
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            print(NO_EXTENSION.format(error=error), file=sys.stderr)

    def compile_kernels(self, ext: Extension, isa: str) -> list[str]:
        """The object files of one instruction set."""
        return self.compiler.compile(
            ["csrc/kernels.cpp"],
            output_dir=f"{self.build_temp}/{isa}",
            macros=[("FASTLLM_ISA", isa)],
            extra_postargs=[*KERNEL_FLAGS, *OPENMP, *ISAS[isa]],
            depends=ext.depends,
        )


setup(
    ext_modules=[
        Extension(
            "fastllm._kernels",
            ["csrc/bindings.cpp"],
            optional=not SANITIZE,
            include_dirs=[pybind11.get_include()],
            define_macros=[("FASTLLM_X86_TABLES", "1")] if "avx2" in ISAS else [],
            extra_compile_args=FLAGS,
            extra_link_args=[*OPENMP, *SANITIZE],
            depends=sorted(str(path) for path in Path("csrc").iterdir()),
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
