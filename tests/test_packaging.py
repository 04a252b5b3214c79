import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from fastllm import __version__
from tests.conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What a build needs, in a folder of its own."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("csrc", "fastllm"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    return tmp_path


def build(sources: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", "objects", *flags],
        cwd=sources,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.compile
def test_objects_export_only_their_table(sources: Path) -> None:
    """A template or inline function that the linker shares could run on a CPU that cannot.

    Weak data (V), which exceptions need, holds no instructions.
    """
    if not shutil.which("nm") or not shutil.which("g++"):
        pytest.skip("nm and g++ are needed to build and to look at the objects")
    result = build(sources, "--build-lib", "lib")
    assert list((sources / "lib/fastllm").glob("_kernels*.so")), result.stderr
    objects = list((sources / "objects").rglob("kernels.o"))
    assert len(objects) >= 1
    for file in objects:
        isa = file.relative_to(sources / "objects").parts[0]
        symbols = subprocess.run(
            ["nm", "--defined-only", "--extern-only", "--demangle", str(file)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        kinds_and_names = [line.split(maxsplit=2)[1:] for line in symbols.splitlines()]
        names = [name for kind, name in kinds_and_names if kind != "V"]
        assert names == [f"fastllm::kernels_{isa}"]


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "flags", [["--build-lib", "lib"], ["--inplace"]], ids=["wheel", "editable"]
)
def test_without_a_compiler_the_build_succeeds_with_one_warning(
    sources: Path, flags: list[str]
) -> None:
    """And no extension of an earlier build stays, which would not fit the new sources."""
    (sources / "fastllm" / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    result = build(sources, *flags, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the C++ extension was NOT built") == 1
    assert "install a C++ compiler" in result.stderr
    assert not list(sources.rglob("_kernels*.so"))


def test_one_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__


@pytest.mark.subprocess
def test_the_page_is_in_wheel_and_sdist(sources: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "build_py", "--build-lib", "lib", "sdist"],
        cwd=sources, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (sdist,) = (sources / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        archived = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("index.html", "style.css", "script.js"):
        file = Path("fastllm/serving/page") / name
        assert (sources / "lib" / file).read_bytes() == (REPOSITORY / file).read_bytes()
        assert str(file) in archived


def test_no_command_fetches_another_package_of_this_name() -> None:
    """`pip install` of the bare name with an extra would; `'.[hf]'` takes this package."""
    files = [REPOSITORY / "Makefile", *REPOSITORY.glob("*.md")]
    for folder in ("fastllm", "tests", "benchmarks", "docs"):
        files += [*(REPOSITORY / folder).rglob("*.py"), *(REPOSITORY / folder).rglob("*.md")]
    for path in files:
        found = re.search(r"pip3? install [^\n]*\bfastllm\[", path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found[0]}"


@pytest.mark.subprocess
def test_the_package_imports_pytorch_when_something_is_asked_for() -> None:
    code = (
        "import sys, fastllm\n"
        "assert 'torch' not in sys.modules\n"
        "assert {*fastllm.__all__} <= {*dir(fastllm)}\n"
        "assert fastllm.core.mlp.MLP is fastllm.MLP\n"
        "from fastllm import *\n"
        "DecoderModel, __version__\n"
        "fastllm.nothing\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert last == "AttributeError: module 'fastllm' has no attribute 'nothing'"


def test_fastllm_is_a_command() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"fastllm": "fastllm.__main__:main"}
