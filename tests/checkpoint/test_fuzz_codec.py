import pytest

from tests.checkpoint.fuzz_codec import TARGETS, fuzz


@pytest.mark.parametrize("target", TARGETS)
def test_damage_is_refused_or_harmless(target):
    assert fuzz(target, 40, seed=0) > 13
