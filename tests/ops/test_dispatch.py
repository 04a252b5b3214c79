import os
import subprocess
import sys

import pytest
import torch

import fastllm
from fastllm.ops import dispatch, extension
from fastllm.ops.dispatch import Implementation, choose, choose_here
from fastllm.ops.dropout import dropout
from tests.conftest import needs_extension

TABLE = [
    Implementation("cpu", lambda x: "cpu", why_not=lambda x: "it is Monday" if x == 1 else None),
    Implementation("ref", lambda x: "ref"),
]


def test_automatic_choice_falls_through_to_the_reference() -> None:
    assert choose("op", TABLE, 0).name == "cpu"
    assert choose("op", TABLE, 1).name == "ref"


def test_a_machine_that_lacks_something_is_asked_before_the_arguments() -> None:
    elsewhere = TABLE[0]._replace(why_not_here=lambda: "there is no abacus")
    assert choose_here("op", TABLE).name == "cpu"
    assert choose_here("op", [elsewhere, TABLE[1]]).name == "ref"
    assert choose("op", [elsewhere, TABLE[1]], 0).name == "ref"
    with (
        fastllm.use("cpu"),
        pytest.raises(dispatch.ImplementationError, match=r"cpu: there is no abacus; ref: can"),
    ):
        choose("op", [elsewhere, TABLE[1]], 1)


def test_asked_for_by_name_runs_or_raises_with_every_reason() -> None:
    with fastllm.use("ref"):
        assert choose("op", TABLE, 0).name == "ref"
    with (
        fastllm.use("cpu"),
        pytest.raises(RuntimeError, match="'cpu' was requested and cannot run 'op'.*Monday"),
    ):
        choose("op", TABLE, 1)


def test_use_nests_and_restores() -> None:
    with fastllm.use("ref"):
        with fastllm.use("cpu"):
            assert dispatch.requested() == "cpu"
        assert dispatch.requested() == "ref"
    assert dispatch.requested() == "auto"


def test_variable_is_overridden_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLM_IMPL", "ref")
    assert choose("op", TABLE, 0).name == "ref"
    with fastllm.use("auto"):
        assert choose("op", TABLE, 0).name == "cpu"


@pytest.mark.parametrize("name", ["fast", "CPU", ""])
def test_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="choose from auto, ref, cpu, triton"):
        fastllm.use(name)


def test_triton_says_why_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    with fastllm.use("auto"):
        assert "the Triton kernels are for CUDA" in str(dispatch.why_not_triton(x))
    monkeypatch.setattr(dispatch, "TRITON_INTERPRETED", True)
    for tensors, reason in (
        ([x.double()], "torch.float64; the kernels take fp32, bf16 and fp16"),
        ([x, x.half()], "tensors are torch.float32 and torch.float16"),
        ([x.to("meta")], "a tensor is on meta"),
        ([x.as_subclass(Odd)], "a tensor is a Odd, whose memory"),
    ):
        with fastllm.use("triton"):
            assert reason in str(dispatch.why_not_triton(*tensors))


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("find_spec", lambda name: None, "Triton is not installed: pip install triton"),
        ("TRITON_INTERPRETED", False, "this machine has no CUDA GPU"),
    ],
)
def test_triton_says_what_the_machine_lacks(
    setting: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting == "TRITON_INTERPRETED" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    monkeypatch.setattr(dispatch, setting, value)
    dispatch.why_not_triton_here.cache_clear()
    try:
        assert str(dispatch.why_not_triton_here()).startswith(reason)
        with (
            fastllm.use("triton"),
            pytest.raises(dispatch.ImplementationError, match="'triton' was requested"),
        ):
            dropout(torch.ones(3), 0.5, 1)
    finally:
        dispatch.why_not_triton_here.cache_clear()


def test_unknown_name_in_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLM_IMPL", "fast")
    with pytest.raises(ValueError, match="FASTLLM_IMPL.*'fast'"):
        dispatch.requested()


@needs_extension
def test_default_is_not_the_reference_where_there_are_kernels() -> None:
    chosen = fastllm.implementations()
    assert chosen["adam"]["cpu"] == "chosen"
    assert chosen["dropout"]["cpu"] == "chosen"
    assert chosen["adam"]["ref"] == "available"


class Odd(torch.Tensor):
    pass


def test_why_not_cpu_names_what_is_wrong() -> None:
    assert dispatch.why_not_cpu(torch.ones(2)) is None
    assert "float64" in str(dispatch.why_not_cpu(torch.ones(2).double()))
    assert "meta" in str(dispatch.why_not_cpu(torch.ones(2, device="meta")))
    assert "Odd" in str(dispatch.why_not_cpu(torch.ones(2).as_subclass(Odd)))


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


# Simulates an installation without a compiler: the extension cannot be imported.
WITHOUT_EXTENSION = "import sys; sys.modules['fastllm._kernels'] = None\n"


@pytest.mark.subprocess
def test_without_extension_everything_runs_and_says_so_once() -> None:
    result = run_python(
        WITHOUT_EXTENSION
        + """
import torch, fastllm
from fastllm.optim import Adam
model = fastllm.DecoderModel(10, 8, 1, 2, 16)
optimizer = Adam(model.parameters(), max_grad_norm=1.0)
ids = torch.randint(0, 10, (2, 16))
for _ in range(2):
    model.loss(ids, ids).backward()
    optimizer.step()
print(fastllm.implementations()['adam'])
try:
    with fastllm.use('cpu'):
        optimizer.step()
except RuntimeError as error:
    print(error)
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("runs on the slow PyTorch reference") == 1
    assert "install a C++ compiler" in result.stderr
    assert "'ref': 'chosen'" in result.stdout
    assert "'cpu' was requested and cannot run 'adam'" in result.stdout


@pytest.mark.subprocess
@needs_extension
@pytest.mark.parametrize("isa", extension.kernels.isas() if extension.kernels else [])
def test_variable_caps_the_instruction_set(isa: str) -> None:
    result = run_python(
        "from fastllm.ops.extension import kernels; print(kernels.isa())", FASTLLM_CPU_ISA=isa
    )
    assert result.stdout.strip() == isa


@pytest.mark.subprocess
@needs_extension
def test_unknown_instruction_set_is_refused_with_the_known_ones() -> None:
    result = run_python("import fastllm; fastllm.use", FASTLLM_CPU_ISA="sse9")
    assert "there is no instruction set 'sse9'; choose from base, avx2" in result.stderr


def test_a_cap_above_the_cpu_is_what_the_cpu_can_do() -> None:
    assert extension.best_isa("avx512_bf16", ["base", "avx2"]) == "avx2"
    assert extension.best_isa("avx2", ["base", "avx2", "avx512"]) == "avx2"
    assert extension.best_isa("avx512", ["base"]) == "base"


@pytest.mark.subprocess
def test_import_is_light() -> None:
    result = run_python(
        "import sys, fastllm; fastllm.use; print([m for m in sys.modules if m in "
        "('matplotlib', 'tokenizers', 'transformers', 'triton', 'pydantic')])"
    )
    assert result.stdout.strip() == "[]", result.stderr
