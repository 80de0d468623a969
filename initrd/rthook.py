"""Runs in the bundle before the agent: `ctypes.util.find_library` without the programs it asks on Linux.

It calls ldconfig, gcc or ld, of which a guest image has none; pyudev looks for libudev with it, which the bundle carries.
"""

import ctypes.util
import glob
import os
import sys


def _find_library(name: str) -> str | None:
    found = sorted(glob.glob(os.path.join(sys._MEIPASS, f"lib{name}.so*")))  # type: ignore[attr-defined]  # the bundle's folder
    return found[0] if found else None


ctypes.util.find_library = _find_library
