import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fastllm.integrations import ipex

MATCHING = ".".join(torch.__version__.split(".")[:2]) + ".7+cpu"
INSTEAD = "fastllm.integrations.huggingface.accelerate"
# The top of the real __init__.py with another torch: os.exit does not exist.
DIES = "import os\nprint('ERROR! Please switch to the matching version')\nos.exit(127)\n"

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution of that version, with that code, where Python finds it first."""
    monkeypatch.setitem(sys.modules, ipex.PACKAGE, sys)  # restored after the test
    del sys.modules[ipex.PACKAGE]

    def put(version: str, code: str) -> None:
        for folder, name, text in (
            (ipex.PACKAGE, "__init__.py", code),
            (f"{ipex.PACKAGE}-{version}.dist-info", "METADATA", metadata(version)),
        ):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / name).write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    return put


def metadata(version: str) -> str:
    return f"Metadata-Version: 2.1\nName: {ipex.PACKAGE}\nVersion: {version}\n"


def refusal() -> ImportError:
    with pytest.raises(ImportError) as caught:
        ipex.optimize(nn.Linear(2, 2).eval())
    assert INSTEAD in str(caught.value) and "archived in March 2026" in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_an_absent_extension_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # where distributions are searched
    reason = "Intel's extension for PyTorch is not installed"
    assert str(ipex.why_not()).startswith(reason)
    message = str(refusal())
    assert message.startswith(reason) and torch.__version__ in message
    assert "You do not need it" in message


@pytest.mark.parametrize("version", ["2.1.0+cpu", "2.111.0", "1.13.100"])
def test_an_extension_for_another_torch_is_not_imported(
    install: Install, capfd: pytest.CaptureFixture[str], version: str
) -> None:
    install(version, DIES)
    message = str(refusal())
    assert f"PyTorch {version} works only with torch {version.rpartition('.')[0]}" in message
    assert f"torch is {torch.__version__}" in message
    assert message.startswith(str(ipex.why_not()))
    assert ipex.PACKAGE not in sys.modules
    assert capfd.readouterr().out == ""


def test_optimize_forwards_its_arguments(install: Install) -> None:
    install(MATCHING, "def optimize(*given, **named):\n    return given, named\n")
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    assert ipex.why_not() is None
    assert ipex.optimize(model, optimizer, torch.bfloat16) == (
        (model,),
        {"optimizer": optimizer, "dtype": torch.bfloat16},
    )
    assert ipex.optimize(model) == ((model,), {"optimizer": None, "dtype": None})


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (DIES, AttributeError, "no attribute 'exit'"),
        ("Union[MoeModelOutputWithPast]", NameError, "'Union' is not defined"),
        ("import ctypes; ctypes.CDLL('libnone-such.so')", OSError, "libnone-such.so"),
        ("import none_such", ImportError, "No module named 'none_such'"),
        ("import sys; sys.exit('needs AVX2')", SystemExit, "SystemExit: needs AVX2"),
    ],
    ids=["AttributeError", "NameError", "OSError", "ImportError", "SystemExit"],
)
def test_a_failing_import_is_explained(
    install: Install, code: str, kind: type[BaseException], words: str
) -> None:
    install(MATCHING, code)
    assert ipex.why_not() is None
    error = refusal()
    assert words in str(error) and isinstance(error.__cause__, kind)
    assert f"PyTorch {MATCHING} is for torch {torch.__version__}" in str(error)


def test_errors_of_the_extension_itself_propagate(install: Install) -> None:
    install(MATCHING, "def optimize(model, **rest):\n    raise AttributeError('its own')\n")
    with pytest.raises(AttributeError, match="its own"):
        ipex.optimize(nn.Linear(2, 2))
