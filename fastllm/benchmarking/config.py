"""Settings of the bench command."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from fastllm.benchmarking.shapes import CONFIGS, Letter, MeasuredPrecision, Rival
from fastllm.flags import CommandSettings, Device, Threads

COMPARE: tuple[Rival, ...] = ("eager", "tuned", "compile")


def _letters(value: list[str]) -> list[str]:
    return list("".join(value).upper())


class BenchConfig(CommandSettings):
    """Time whole training steps of fastllm and of stock PyTorch, in turns."""

    aliases: ClassVar = {"config": "shape"}
    examples: ClassVar = """
fastllm bench
fastllm bench --shape A,C --compare tuned
fastllm bench --model HuggingFaceTB/SmolLM2-135M
"""

    shape: Annotated[list[Letter], BeforeValidator(_letters)] = Field(list(CONFIGS), min_length=1)
    """Which of the shapes A to E to measure: A,B or AB."""
    model: str | None = None
    """Instead of the shapes, a model in Hugging Face's format, a folder or a name on its hub:
    its steps on 4 sequences of 256 tokens, or as many as it takes, against transformers at the
    same precision."""
    precision: MeasuredPrecision = "fp32"
    """Precision of fastllm's matrix products. The rivals use fp32, except autocast."""
    compare: list[Rival] = Field(list(COMPARE))
    """Stock PyTorch to compare with: eager (explicit softmax, default Adam), tuned (fused attention
    and fused Adam), chunked (tuned with linear_cross_entropy), autocast (tuned in bf16), compile
    (tuned under torch.compile, which warms up for half a minute). With --precision bf16
    on a CPU, the default adds autocast."""
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 15
    """Time for each configuration, after warming up; at least three rounds are made."""
    device: Device = "cpu"
    """cuda also measures every operation, against stock PyTorch on the same GPU."""
    memory: bool = False
    """Measure peak memory instead of time (Linux only)."""
    json_: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of a table."""
    threads: Threads = 0
    """CPU threads; 0 for OMP_NUM_THREADS, or the physical cores that this process may use."""
    impl: Literal["auto", "ref", "cpu", "triton"] = "auto"
    """Implementation of fastllm's operations; auto takes the fastest one that works here."""

    @model_validator(mode="after")
    def _check_together(self) -> "BenchConfig":
        if self.device == "cuda" and self.memory:
            raise ValueError("memory is measured on a CPU; leave --device out")
        if self.model is not None and (self.memory or {"shape", "compare"} & self.model_fields_set):
            raise ValueError("--model is measured without --shape, --compare and --memory")
        return self

    def show(self, line: str) -> None:
        """Prints a line of a table, unless JSON is asked for."""
        if not self.json_:
            print(line, flush=True)
