"""Tests that are left out unless JAXLM_SLOW_TESTS is set: what others prove for one kind of model, of mesh or of
representation, they prove for the rest, and some take half a minute each.

A line is a file, and a regular expression that is sought in the names of its tests.
"""

from __future__ import annotations

import re

SLOW: dict[str, str] = {}


def is_slow(nodeid: str) -> bool:
    """Of a test by its name, ``tests/nn/test_layerwise.py::test_...``."""
    file, _, name = nodeid.partition(".py::")
    pattern = SLOW.get(file.removeprefix("tests/"))
    return pattern is not None and re.search(pattern, name) is not None
