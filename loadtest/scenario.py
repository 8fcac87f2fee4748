"""A run written down: YAML whose keys are the settings' names, so that everybody can repeat it.

    about: Independent users at a steady rate
    url: http://127.0.0.1:8000
    model: storyteller
    rate: 4
    duration: 2m
    slo: {ttft_s: 0.5, itl_s: 0.2}

Where to send (`url`, `model`) is best given on the command line, which goes before the file. Files it names
are looked for beside it first, then in the working folder.
"""

from pathlib import Path
from typing import Any

import yaml

from loadtest.errors import InputError

FILES = ("prompts", "trace", "tokenizer", "ca")
# Of these only one can hold: giving one on the command line takes back the scenario's others.
ALTERNATIVES = (("concurrency", "rate", "trace"), ("num_requests", "duration"))


def read_scenario(path: Path) -> dict[str, Any]:
    """The settings of a scenario; InputError where it is no mapping. Its keys are checked with the other settings."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"scenario {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"scenario {path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"scenario {path}: wants keys and values, such as `rate: 4`")
    values.pop("about", None)
    for name in FILES:
        if name in values:
            beside = path.parent / str(values[name])
            values[name] = beside if beside.exists() else Path(str(values[name]))
    return values


def override(scenario: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The scenario with what was given on the command line put over it."""
    kept = dict(scenario)
    for names in ALTERNATIVES:
        if any(name in given for name in names):
            for name in names:
                kept.pop(name, None)
    if "num_requests" in given and "duration" in scenario:
        kept.pop("warmup", None)  # it was a time, and a run by number warms up by number
    if "trace" not in given | kept and kept.get("arrivals") == "trace":
        kept.pop("arrivals")
    return kept | given
