"""How tokens are drawn if the user does not say: by the wish of a model's files, or by ours."""

from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import BaseModel

from fastllm.ops.sampling import Sampling
from fastllm.tokenization import Tokenizer
from fastllm.tokenization.pretrained import read_json_object


def read_sampling(folder: Path) -> dict[str, float]:
    """The fields of a `Sampling` that generation_config.json sets.

    As in transformers, most of them count only with do_sample.

    Raises:
        ValueError: the file is damaged, or a value is out of range.
    """
    file = folder / "generation_config.json"
    settings = read_json_object(file)
    names = Sampling._fields if settings.get("do_sample") else ("repetition_penalty",)
    found = {name: settings[name] for name in names if settings.get(name) is not None}
    for name, value in found.items():
        if type(value) not in (int, float):
            raise ValueError(f"{file}: {name} must be a number, not {value!r}")
    try:
        Sampling(**found).check()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return found


def choose_sampling(settings: BaseModel, defaults: Mapping[str, float]) -> Sampling:
    """A `Sampling` of the fields of these names that were set, else of `defaults`, else as they
    are by default."""
    own = {name: getattr(settings, name) for name in Sampling._fields}
    wanted = {name: own[name] for name in settings.model_fields_set & own.keys()}
    return Sampling(**{**own, **defaults, **wanted})


def describe_defaults(
    tokenizer: Tokenizer, sampling: Mapping[str, float], given: Collection[str] = ()
) -> str:
    """What a model's own files decide, in one line; empty if nothing.

    Args:
        sampling: fields of a `Sampling` that they set.
        given: those that the user has set.
    """
    values = [f"{name} {value:g}" for name, value in sampling.items() if name not in given]
    ends = [tokenizer.decode([id]) for id in sorted(tokenizer.end_tokens)]
    parts = [f"generation_config.json sets {', '.join(values)}"] if values else []
    parts += [f"texts end at {' or '.join(ends)}"] if ends else []
    return "; ".join(parts)
