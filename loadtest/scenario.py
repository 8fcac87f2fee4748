"""A run written down: YAML whose keys are the settings' names, so that everybody can repeat it.

    about: Independent users at a steady rate
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


def read_scenario(path: Path) -> dict[str, Any]:
    """The settings of a scenario; InputError where it is no mapping. Its keys are checked with the other
    settings.
    """
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
