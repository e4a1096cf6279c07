"""Trainings of a module that differ in when they validate, save and stop share what they compile."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm.training import loop
from jaxlm.training.setup import Setup


def _program_of(setup: Setup) -> str:
    """What the compiled functions of a training depend on, as text; the other fields have the same value in all."""
    config = setup.config
    train = dataclasses.replace(config.train, log_every=1, eval_every=1, checkpoint_every=1, keep_latest=1, keep_best=1,
                                average=0, patience=0, on_nan="abort")
    return repr((dataclasses.replace(config, train=train), setup.mesh))


@pytest.fixture(scope="module")
def shared_programs():
    """From here on to the end of the module, trainings take the step, the validation and the first state of an earlier
    one of the same program."""
    programs, sums, states = {}, {}, {}
    setups: list[Setup] = []
    make_program, fresh_state = loop.make_program, loop.fresh_state

    class Trainer(loop.Trainer):
        def __init__(self, setup, *args):
            setups.append(setup)
            super().__init__(setup, *args)

    class Validator(loop.Validator):
        def __init__(self, setup, *args):
            super().__init__(setup, *args)
            self._sums = sums.setdefault(_program_of(setup), self._sums)

    def program(*args):
        name = _program_of(setups[-1])
        if name not in programs:
            programs[name] = make_program(*args)
        return programs[name]

    def state(setup, program):
        name = _program_of(setup)
        if name not in states:
            first = fresh_state(setup, program)
            constants = dict(frozen=first.frozen, reference=first.reference)
            states[name] = jax.tree.map(np.array, first.saved), constants
        saved, constants = states[name]
        return dataclasses.replace(jax.device_put(saved, program.layout.saved), **constants)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("Trainer", Trainer), ("Validator", Validator), ("make_program", program),
                            ("fresh_state", state)):
            patch.setattr(loop, name, value)
        yield
