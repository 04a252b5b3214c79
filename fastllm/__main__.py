"""The command `fastllm`: the commands of this package by their names."""

import sys
from difflib import get_close_matches
from importlib import import_module

from fastllm.version import __version__

COMMANDS = {
    "train": "Train a small language model on a text.",
    "generate": "Continue a prompt with a trained model.",
    "serve": "Offer a trained model by OpenAI's API and as a page.",
    "evaluate": "Measure how well a trained model predicts a text.",
    "finetune": "Fine-tune a model of transformers on a text or a dataset.",
    "tune": "Search for the settings with the lowest validation loss.",
    "compare": "Draw the curves of several runs in one picture, with a table.",
    "export": "Write a trained model for transformers, ONNX or llama.cpp.",
    "bench": "Time training steps against stock PyTorch.",
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the first argument names; by default those of the process."""
    name, *others = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        from fastllm.command import command

        command(lambda _: print(help_text()))([])  # `| head` needs no traceback
    elif name == "--version":
        print(f"fastllm {__version__}")
    elif name in COMMANDS:
        import_module(f"fastllm.{name}").main(others)
    else:
        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"error: there is no command {name}; {hint}", file=sys.stderr)
        raise SystemExit(2)


def help_text() -> str:
    lines = [
        "Small language models trained, fine-tuned and run fast on the machine at hand.",
        "",
        "Examples",
        "  fastllm train book.txt",
        '  fastllm generate --checkpoint runs/book --prompt "Once upon a time"',
        "  fastllm serve --checkpoint runs/book",
        "",
        "Commands",
        *(f"  {name:10}{line}" for name, line in COMMANDS.items()),
        "",
        "fastllm COMMAND --help explains the flags of a command.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
