"""How the house is built: which file may import which, and what no file may name.

CONTRIBUTING.md describes the rooms. Imports inside functions count, because they run too; imports
under `TYPE_CHECKING` do not.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "fastllm"

# From the bottom to the top; a file imports from its own room and from lower ones.
ROOMS = {
    "helpers": "files version flags command threads",
    "operations": "ops",
    "modules": "core optim device",
    "tokenization": "tokenization",
    "models": "models",
    "data": "data",
    "generation": "generation",
    "training": "training",
    "libraries": "tuning serving benchmarking",
    "integrations": "integrations",
    "fine-tuning": "finetuning",  # a library on top of what integrates transformers
    "commands": "train evaluate generate finetune tune compare serve export bench __main__",
    "package": "public __init__",  # what `import fastllm` offers: nothing in the package imports it
}
LEVELS = {
    entry: (level, room)
    for level, (room, entries) in enumerate(ROOMS.items())
    for entry in entries.split()
}
PRIVATE_TORCH = "fastllm/ops/torch_private.py"
# Of modules and tensors, whatever a variable is called.
PRIVATE_OF_MODULES = {"_modules", "_parameters", "_buffers", "_forward_hooks", "_version"}


class Import(NamedTuple):
    importer: str  # a path from the repository's root
    line: int
    imported: str


def files() -> list[str]:
    return sorted(str(path.relative_to(REPOSITORY)) for path in PACKAGE.rglob("*.py"))


def file_of(module: str) -> str | None:
    """The file that `import module` runs, or None if it is not one of the package's files."""
    path = REPOSITORY.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if module.split(".")[0] == "fastllm" and candidate.is_file():
            return str(candidate.relative_to(REPOSITORY))
    return None


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node` but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.If) and child in node.body and "TYPE_CHECKING" in names(node.test):
            continue
        yield child
        yield from running(child)


def names(node: ast.AST) -> set[str]:
    """`TYPE_CHECKING` and `typing.TYPE_CHECKING` alike."""
    return {n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node)
            if isinstance(n, ast.Name | ast.Attribute)}  # fmt: skip


def imports_of(path: str, source: str) -> list[Import]:
    """`from package import module` counts as an import of the module, if there is one."""
    found = []
    for node in running(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the absolute name of the module"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                modules.append(submodule if file_of(submodule) else str(node.module))
        found += [Import(path, node.lineno, imported)
                  for imported in map(file_of, modules) if imported]  # fmt: skip
    return found


def all_imports() -> list[Import]:
    return [each for path in files() for each in imports_of(path, (REPOSITORY / path).read_text())]


def level_of(path: str) -> tuple[int, str]:
    entry = Path(path).relative_to("fastllm").parts[0].removesuffix(".py")
    assert entry in LEVELS, f"{path} is in no room: name {entry!r} in ROOMS of {__file__}"
    return LEVELS[entry]


def upward(imports: list[Import]) -> list[str]:
    return [
        f"{path}:{line}: {level_of(path)[1]} may not import {imported} of {level_of(imported)[1]}, "
        "which is higher: move what is needed into a lower room, or let the caller pass it in"
        for path, line, imported in imports
        if level_of(imported)[0] > level_of(path)[0]
    ]


def circle(imports: list[Import]) -> list[str]:
    """The imports of one circle, or nothing."""
    graph: dict[str, set[str]] = {}
    lines = {}
    for path, line, imported in imports:
        if path != imported:
            graph.setdefault(path, set()).add(imported)
            lines[path, imported] = line
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1][::-1]  # each file imports the next
        return [f"{a}:{lines[a, b]}: imports {b}" for a, b in pairwise(cycle)]
    return []


def private_names(path: str, source: str) -> list[str]:
    """Names of PyTorch with a leading underscore, reached through any name imported from it."""
    nodes = list(ast.walk(ast.parse(source)))
    used = [(node.lineno, ast.unparse(node)) for node in nodes if isinstance(node, ast.Attribute)]
    roots = {"torch"}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                name = module + alias.name
                if name.split(".")[0] == "torch":
                    used.append((node.lineno, name))
                    roots.add(alias.asname or alias.name.split(".")[0])
    found = {}
    for line, name in sorted(used, key=lambda each: len(each[1])):  # the whole chain comes last
        is_private = name.split(".")[0] in roots and re.search(r"\._(?!_)", name)
        if is_private or name.split(".")[-1] in PRIVATE_OF_MODULES:
            found[line] = name
    return [
        f"{path}:{line}: {name} is private to PyTorch: wrap it in {PRIVATE_TORCH}"
        for line, name in sorted(found.items())
    ]


def test_no_file_imports_from_a_higher_room() -> None:
    wrong = upward(all_imports())
    assert not wrong, "\n".join(["", *wrong])


def test_no_imports_go_in_a_circle() -> None:
    wrong = circle(all_imports())
    assert not wrong, "\n".join(["these imports go in a circle; break one of them:", *wrong])


def test_private_names_of_pytorch_are_used_in_one_file() -> None:
    wrong = [
        each
        for path in files()
        if path != PRIVATE_TORCH
        for each in private_names(path, (REPOSITORY / path).read_text())
    ]
    assert not wrong, "\n".join(["", *wrong])


def test_what_these_tests_find() -> None:
    source = """
from typing import TYPE_CHECKING
import torch, torch.distributed as dist
from fastllm.ops import attention
if TYPE_CHECKING:
    from fastllm import train
else:
    from fastllm import serve
def f():
    import fastllm.bench
    torch._C.x()
    f._modules
    return dist._y(), f._z, torch.__version__
"""
    path = "fastllm/data/text.py"
    found = imports_of(path, source)
    assert found == [
        Import(path, 4, "fastllm/ops/attention.py"),
        Import(path, 8, "fastllm/serve.py"),
        Import(path, 10, "fastllm/bench.py"),
    ]
    assert [each.split(":")[1] for each in upward(found)] == ["8", "10"]
    assert circle(found) == []
    assert sorted(circle([*found, Import("fastllm/serve.py", 7, path)])) == [
        "fastllm/data/text.py:8: imports fastllm/serve.py",
        "fastllm/serve.py:7: imports fastllm/data/text.py",
    ]
    private = [each.split()[1] for each in private_names(path, source)]
    assert private == ["torch._C.x", "f._modules", "dist._y"]


def test_no_registry_and_no_folder_of_one_machine_is_named() -> None:
    """Registries are the user's choice, and a path that exists on one machine helps nobody."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git repository")
    pattern = re.compile(r"pypi\.org|pythonhosted\.|/(?:root|work|home)/[a-z]")
    for name in filter(None, tracked.stdout.split("\0")):
        path = REPOSITORY / name
        text = path.read_text(encoding="utf-8", errors="ignore") if path.is_file() else ""
        for number, line in enumerate(text.splitlines(), 1):
            assert not pattern.search(line), f"{name}:{number}: {line.strip()[:100]}"
