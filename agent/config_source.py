"""Where the bytes of a configuration come from, before anybody knows whether they may decide.

Owns the bound on their size. Does not parse (`config.py`). Standard library only, because the supervisor imports it.
"""

import sys
from pathlib import Path

from agent.errors import ConfigError, ConfigProblem

MAX_CONFIG_BYTES = 1 << 20


def read_bounded(file: str) -> bytes:
    """The bytes of a configuration file, `-` for standard input.

    Raises:
        ConfigError: not readable, or above 1 MiB.
    """
    try:
        if file == "-":
            data = sys.stdin.buffer.read(MAX_CONFIG_BYTES + 1)
        else:
            with Path(file).open("rb") as stream:
                data = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(ConfigProblem.NOT_FOUND) from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(ConfigProblem.TOO_LARGE)
    return data
