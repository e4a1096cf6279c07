#!/usr/bin/env bash
# jax 0.10.2 on a CPU: a matrix that is a part of a stacked array is copied before it is multiplied with.
#
# Expected: layers of one shape are often stacked in one array, [layers, in, out], and run by lax.scan. A layer of the
#           stack is a contiguous piece of memory, so a product could read it where it is. At the latest when the stack
#           is indexed with a constant, stack[i] should be a view.
# Happens:  XLA's CPU compiler writes each layer into a buffer and multiplies with the copy. lax.scan keeps room for one
#           layer; indexing with constants keeps room for all of them, as much memory as the weights. Separate arrays are
#           multiplied as they are. One step of decoding reads all weights once, so a copy (read, write, read again) is
#           most of its time: with the shapes of a model of 135 M parameters in float32, two cores, one row, it took
#           84 ms by lax.scan, 182 ms with stack[i] and 48 ms with a list of arrays.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat > "$folder/stack.py" <<'PY'
import jax
import jax.numpy as jnp

LAYERS, WIDTH = 8, 512
stack, row = jnp.ones((LAYERS, WIDTH, WIDTH)), jnp.ones((1, WIDTH))


def scanned(x, stack):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]


def indexed(x, stack):
    for i in range(LAYERS):
        x = x @ stack[i]
    return x


def listed(x, layers):
    for w in layers:
        x = x @ w
    return x


for name, fn, weights in (("lax.scan", scanned, stack), ("stack[i]", indexed, stack), ("a list", listed, list(stack))):
    temporary = jax.jit(fn).lower(row, weights).compile().memory_analysis().temp_size_in_bytes
    print(f"{name} {temporary // (4 * WIDTH * WIDTH)}", end="; ")
print(f"matrices of temporary memory, of {LAYERS} in the weights")
PY
seen="$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/stack.py")"
echo "$seen"
expected="lax.scan 1; stack[i] 8; a list 0; matrices of temporary memory, of 8 in the weights"
[ "$seen" = "$expected" ] || { echo "changed; it was: $expected" >&2; exit 1; }
