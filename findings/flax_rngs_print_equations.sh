#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2: drawing a key from nnx.Rngs while JAX traces prints equations, and throws the text away.
#
# Expected: rngs.params() folds a count into a key and adds one to the count; it traces a handful of operations.
# Happens:  the count is an nnx.Variable, and setting a Variable asks the new value and the old one for `.sharding`. A
#           tracer has none, so JAX raises an AttributeError, which flax catches; before that, JAX has pretty-printed up
#           to five equations that the tracer comes from, nested ones in full, for a message that nobody reads. Ten keys
#           drawn under jit print 86 equations. Where draws follow traced loops or other jits, as in initializers of
#           parameters, every equation inside is printed anew. A Python integer as the count gives the same keys and
#           prints none. In a Transformer of five layers the printing was half of the time that tracing the initializer
#           took (0.11 s of CPU; 0.05 s without).
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
cat > "$folder/count.py" <<'PY'
import sys

import jax
import numpy as np
from flax import nnx


class Keys:
    """The same keys, counted by a Python integer."""

    def __init__(self, key):
        self.key, self.count = key, 0

    def params(self):
        key = jax.random.fold_in(self.key, np.uint32(self.count))
        self.count += 1
        return key


def printed(make):
    """How many equations are printed while ten normal arrays are traced, and the arrays."""
    calls = 0

    def watch(frame, event, _):
        nonlocal calls
        calls += event == "call" and frame.f_code.co_name == "_pp_eqn"

    def init(key):
        stream = make(key)
        return [jax.random.normal(stream.params(), (4,)) for _ in range(10)]

    sys.setprofile(watch)
    try:
        traced = jax.jit(init).trace(jax.random.key(0))
    finally:
        sys.setprofile(None)
    return calls, traced.lower().compile()(jax.random.key(0))


by_rngs, one = printed(lambda key: nnx.Rngs(params=key))
by_hand, other = printed(Keys)
same = all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(one, other))
print(f"nnx.Rngs prints {by_rngs} equations, a Python count {by_hand}; the same arrays: {same}")
PY
seen="$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/count.py")"
echo "$seen"
expected="nnx.Rngs prints 86 equations, a Python count 0; the same arrays: True"
[ "$seen" = "$expected" ] || { echo "changed; it was: $expected" >&2; exit 1; }
