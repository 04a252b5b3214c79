"""The search language, and the plan that comes of it."""

from pathlib import Path

import optuna
import pytest

from fastllm.command import parse_settings
from fastllm.tune import settings_of
from fastllm.tuning.config import TuneConfig
from fastllm.tuning.search import Plan, make_plan


def plan_of(search: str, flags: str = "") -> Plan:
    config = parse_settings(TuneConfig, search.split())
    return make_plan(config, settings_of(config.command), flags.split())


@pytest.mark.parametrize(
    ("search", "flags", "message"),
    [
        ("--search lrr=1:2", "", "train has no setting 'lrr' to search; choose from batch_size, "),
        ("--search out_dir=a,b", "", "train has no setting 'out_dir' to search"),
        ("--search lr=1e-3", "", "'lr=1e-3' is neither a range (lr=LOW:HIGH or lr=LOW:HIGH:log)"),
        ("--search lr", "", "'lr=' is neither a range"),
        ("--search lr=1:2:lin", "", "'lr=1:2:lin' is neither a range"),
        ("--search lr=1,,2", "", "'lr=1,,2' is neither a range"),
        ("--search lr=2:1", "", "'lr=2:1' must begin below its end"),
        ("--search dropout=0:0.5:log", "", "must begin above 0 and below its end"),
        ("--search lr=0:1", "", "--lr must be greater than 0 (got '0')"),
        ("--search lr=a:b", "", "--lr must be a number"),
        ("--search batch_size=1.5:4", "", "--batch_size must be a whole number"),
        ("--search batch_size=8,x,4", "", "--batch_size must be a whole number"),
        ("--search norm_first=0:1", "", "norm_first is not a number; list its values"),
        ("--search activation=gelu,tanh", "", "--activation must be 'gelu', "),
        ("--search num_heads=2,3", "", "--hidden_size (64) must be divisible by --num_heads (3)"),
        ("--search lr=1:2", "--lr 1", "lr is both searched and fixed after --"),
        ("--search norm_first=0,1", "--post-norm", "norm_first is both searched and fixed"),
        ("", "--lr 1 --batch_size 8", "all default searches are fixed; name a setting"),
        ("", "--out-dir here", "out_dir cannot be fixed"),
        ("", "--config no.toml", "cannot read the config file no.toml"),
        ("--trials 0", "", "--trials must be greater than or equal to 1"),
    ],
)
def test_invalid_searches(search: str, flags: str, message: str) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        plan_of(search, flags)
    assert message in str(caught.value)


def test_search_space(tmp_path: Path) -> None:
    assert list(plan_of("").space) == ["lr", "batch_size"]
    (tmp_path / "run.toml").write_text('lr = 0.5\nactivation = "relu"\n')
    plan = plan_of(
        "--search dropout=0:1e-1 --search num-layers=1:8:log --search norm_first=true,false",
        f"--config {tmp_path}/run.toml --file-path a.txt --no-dedup_lines --threads=3",
    )
    distributions = optuna.distributions
    assert plan.space == {
        "batch_size": distributions.CategoricalDistribution([8, 16, 32]),
        "dropout": distributions.FloatDistribution(0, 0.1),
        "num_layers": distributions.IntDistribution(1, 8, log=True),
        "norm_first": distributions.CategoricalDistribution([True, False]),
    }
    fixed = {"lr": 0.5, "activation": "relu", "file_path": ["a.txt"], "dedup_lines": False}
    assert plan.fixed == {**fixed, "threads": 3}
    assert plan.threads == 3
