"""What a study searches: `--search lr=1e-5:5e-4:log` as distributions of optuna."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastllm.command import make_settings
from fastllm.threads import available_cores
from fastllm.training.config import RunSettings, read_given
from fastllm.tuning.config import TuneConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Searched by default, unless fixed.
DEFAULT_SEARCH = {"lr": "1e-5:5e-4:log", "batch_size": "8,16,32"}
# Set by the study for every trial.
NOT_SEARCHABLE = ("out_dir", "resume", "config", "threads")


class Search(NamedTuple):
    """The values to try for one setting, as the user wrote them."""

    text: str
    values: list[str]  # the ends of a range, or all values of a list
    kind: Literal["range", "log", "list"]


class Plan(NamedTuple):
    """What all trials of a study share.

    Attributes:
        config: the settings of the study.
        fixed: settings of the command that the user gave, ready for TOML.
        space: the distribution of every setting that is searched.
        threads: threads per trial; 0 until a launcher has chosen.
    """

    config: TuneConfig
    fixed: dict[str, Any]
    space: "dict[str, BaseDistribution]"
    threads: int

    def trial_folder(self, number: int) -> Path:
        return self.config.out_dir / f"trial-{number:04d}"


def make_plan(config: TuneConfig, settings_class: type[RunSettings], flags: list[str]) -> Plan:
    """Decides what to search and what to fix; the command's own settings validate both.

    Args:
        settings_class: settings of the command.
        flags: those of the command, after `--`.

    Raises:
        ValueError: a setting is unknown, or both searched and fixed, or its range is invalid.
        ImportError: optuna is not installed.
    """
    fixed = read_given(settings_class, flags)
    for name in ("out_dir", "resume"):
        if name in fixed:
            raise ValueError(f"{name} cannot be fixed: every trial has a folder of its own")
    searches = _choose_searches(config, settings_class, fixed.keys())

    # Both ends of every range and every value of a list pass through the settings, which convert
    # and validate them.
    values: dict[str, list[Any]] = {name: [] for name in searches}
    for i in range(max(len(search.values) for search in searches.values())):
        row = {name: s.values[min(i, len(s.values) - 1)] for name, s in searches.items()}
        settings = make_settings(settings_class, {**fixed, **row})
        valid = settings.model_dump(mode="json")
        for name in searches:
            values[name].append(valid[name])
    space = {name: make_distribution(name, s, values[name]) for name, s in searches.items()}
    given = settings.model_fields_set - space.keys() - {"config"}
    share = 0 if config.launcher else max(1, available_cores() // config.jobs)
    return Plan(
        config,
        fixed={name: valid[name] for name in valid if name in given and valid[name] is not None},
        space=space,
        threads=valid["threads"] or share,
    )


def _choose_searches(
    config: TuneConfig, settings_class: type[RunSettings], fixed_names: Collection[str]
) -> dict[str, Search]:
    """The default searches that are not fixed, and those of `--search`.

    Raises:
        ValueError: a setting is unknown, or also fixed, or nothing is left to search.
    """
    texts = {name: text for name, text in DEFAULT_SEARCH.items() if name not in fixed_names}
    searchable = [name for name in settings_class.model_fields if name not in NOT_SEARCHABLE]
    for argument in config.search:
        name, _, text = argument.partition("=")
        name = name.replace("-", "_")
        if name not in searchable:
            raise ValueError(
                f"search: {config.command} has no setting '{name}' to search; choose from "
                + ", ".join(searchable)
            )
        if name in fixed_names:
            raise ValueError(f"{name} is both searched and fixed after --; remove one of the two")
        texts[name] = text
    if not texts:
        raise ValueError("all default searches are fixed; name a setting with --search")
    return {name: parse_search(name, text) for name, text in texts.items()}


def parse_search(name: str, text: str) -> Search:
    """Parses `LOW:HIGH`, `LOW:HIGH:log` or `A,B,C`.

    Raises:
        ValueError: the text has another form.
    """
    if "," in text:
        search = Search(text, text.split(","), "list")
    else:
        values = text.split(":")
        log = values[2:] == ["log"]
        search = Search(text, values[:2] if log else values, "log" if log else "range")
    if "" in search.values or (search.kind != "list" and len(search.values) != 2):
        raise ValueError(
            f"search: '{name}={text}' is neither a range ({name}=LOW:HIGH or "
            f"{name}=LOW:HIGH:log) nor a list ({name}=A,B,C)"
        )
    return search


def make_distribution(name: str, search: Search, values: list[Any]) -> "BaseDistribution":
    """The search as a distribution of optuna.

    Args:
        values: those of the search, validated by the settings; more may follow.

    Raises:
        ValueError: the range is empty, or its setting is not a number.
        ImportError: optuna is not installed.
    """
    try:
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )
    except ImportError as error:
        raise ImportError(f"tune needs optuna ({error}): pip install '.[tune]'") from None
    if search.kind == "list":
        return CategoricalDistribution(values[: len(search.values)])
    low, high = values[:2]
    log = search.kind == "log"
    if type(low) not in (int, float):
        raise ValueError(f"search: {name} is not a number; list its values ({name}=A,B,C)")
    if low >= high or (log and low <= 0):
        positive = "above 0 and " if log else ""
        raise ValueError(f"search: '{name}={search.text}' must begin {positive}below its end")
    if type(low) is int:
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)
