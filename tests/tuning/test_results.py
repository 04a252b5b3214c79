"""Files that a study writes."""

import sys

from fastllm.tuning.results import to_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_toml() -> None:
    settings = {"path": 'a "b"\\c\t\u00e9\U0001f600', "lr": 1e-05, "n": 8, "yes": True, "l": ["a"]}
    assert tomllib.loads(to_toml(settings)) == settings
