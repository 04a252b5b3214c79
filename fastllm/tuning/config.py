"""Settings of the tune command."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fastllm.flags import CommandSettings
from fastllm.training.config import Count, NonNegative, PositiveCount


class TuneConfig(CommandSettings):
    """Search for settings with the lowest validation loss; flags after -- go to every trial."""

    examples: ClassVar = """
fastllm tune -- book.txt
fastllm tune --search lr=1e-4:1e-2:log --trials 16 -- book.txt
"""

    command: Literal["train", "finetune"] = "train"
    """The command whose settings are searched."""
    search: list[str] = Field(default_factory=list)
    """NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C for any setting of the command; repeat it to
    search several. lr=1e-5:5e-4:log and batch_size=8,16,32 are searched unless you fix them."""
    trials: PositiveCount = 8
    """Total number of trials, including those from earlier starts of the same study."""
    jobs: Annotated[int, Field(ge=1, le=4096)] = 1
    """Number of trials that run at the same time; they share the cores."""
    launcher: Literal["ray"] | None = None
    """ray runs the trials on the cluster at RAY_ADDRESS, or on this machine if that is not set. All
    machines must share the folders of the study and of the texts."""
    timeout: NonNegative = 0
    """Stop after this many seconds and report the best trial so far; 0 for no limit."""
    out_dir: Path = Path("runs/tune")
    """Folder of the study; a study that is already there continues."""
    seed: Count = 0
    """Makes the search reproducible as long as trials run one at a time."""
