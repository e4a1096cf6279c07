"""A mark for tests that take too long to run always."""

from __future__ import annotations

import os

import pytest

slow = pytest.mark.skipif(
    not os.environ.get("JAXLM_SLOW_TESTS"), reason="takes half a minute or more: set JAXLM_SLOW_TESTS=1 to run it"
)
