"""Counting in compiled HLO: loops, fusions, collectives and their axes, against what the programs are known to do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.planning.hlo import parse_hlo, replica_groups
from jaxlm.planning.hlo_costs import count_costs

AXES = ("data", "fsdp", "tensor")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


def counted(fn, *shapes, mesh=None):
    compiled = jax.jit(fn).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    return count_costs(parse_hlo(compiled.as_text()), dict(mesh.shape) if mesh else {"data": 1})


def test_products_in_nested_loops_count_as_often_as_they_run():
    def body(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    def fn(x, ws):
        return jax.lax.scan(lambda x, w: (body(x, w), None), x, ws)[0]

    assert counted(fn, (48, 32), (3, 32, 32)).total_flops == 3 * 5 * 2 * 48 * 32 * 32


def test_batched_products():
    flops = counted(lambda x, y: jnp.einsum("bik,bkj->bij", x, y), (3, 8, 64), (3, 64, 16)).total_flops
    assert flops == 2 * 3 * 8 * 64 * 16


def test_integers_are_counted_apart():
    def fn(x, y):
        return jax.lax.dot_general(x, y, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)

    shape = jax.ShapeDtypeStruct((64, 64), jnp.int8)
    costs = count_costs(parse_hlo(jax.jit(fn).lower(shape, shape).compile().as_text()), {"data": 1})
    assert costs.total_flops == 2 * 64**3


def test_a_gradient_has_three_products():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w) @ w)

    # x @ w, its @ w; backwards the cotangents of both products, and of w twice
    grad = counted(jax.grad(loss), (32, 32), (16, 32)).total_flops
    assert grad in (4 * 2 * 16 * 32 * 32, 5 * 2 * 16 * 32 * 32)  # the value itself may be left out


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("tensor",), ("data", "tensor"), AXES], ids="+".join)
def test_messages_are_those_of_their_axes(mesh, axes):
    n, rows, columns = 2 ** len(axes), 8, 16
    size = 4 * rows * columns  # of a device's part

    def fn(x):
        def local(x):
            x = jax.lax.psum(x, axes)
            x = jax.lax.all_gather(jnp.sin(x), axes, tiled=True)
            return jax.lax.psum_scatter(jnp.cos(x), axes, tiled=True)

        spec = PartitionSpec(AXES)
        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)

    costs = counted(fn, (8 * rows, columns), mesh=mesh)
    assert {each.axes for each in costs.collectives} == {axes}
    assert costs.sent("all-gather")[axes] == (n - 1) * size
    # a sum of one part; and a scattered sum of n parts, which XLA on CPU may do as a sum of all of them
    assert costs.sent("all-reduce", "reduce-scatter")[axes] in (
        2 * (n - 1) / n * size + (n - 1) * size, 2 * (n - 1) / n * size + 2 * (n - 1) * size
    )


def test_permutations_and_exchanges(mesh):
    def fn(x):
        def local(x):
            x = jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
            return jax.lax.all_to_all(x, "data", 0, 0, tiled=True)

        spec = PartitionSpec(AXES)
        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    costs = counted(fn, (64, 16), mesh=mesh)
    assert costs.sent("collective-permute") == {("tensor",): 4 * 8 * 16}
    assert costs.sent("all-to-all") == {("data",): 4 * 8 * 16 / 2}


def test_a_shift_around_a_ring_is_as_far_as_most_of_its_pairs():
    """Not as far as the one that closes it, here the first."""
    def fn(x):
        def local(x):
            return jax.lax.ppermute(x, "data", [(3, 0), (0, 1), (1, 2), (2, 3)])

        return jax.shard_map(local, mesh=line, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))(x)

    line = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    (message,) = counted(fn, (64, 16), mesh=line).collectives
    assert message.group in ((0, 1), (1, 2), (2, 3))


def test_messages_in_a_loop_count_as_often_as_it_goes_round(mesh):
    rows = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def fn(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None), x, ws)[0]

    shapes = jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=whole), jax.ShapeDtypeStruct(
        (7, 16, 16), jnp.float32, sharding=rows
    )
    costs = count_costs(parse_hlo(jax.jit(fn).lower(*shapes).compile().as_text()), dict(mesh.shape))
    assert costs.sent("all-gather") == {("fsdp",): 7 * 4 * 16 * 16 / 2}
    assert costs.total_flops == 7 * 2 * 4 * 16 * 16


def test_traffic_of_a_product_is_its_operands_and_result():
    assert counted(lambda x, w: x @ w, (128, 256), (256, 512)).traffic == 4 * (128 * 256 + 256 * 512 + 128 * 512)


def test_traffic_of_a_slice_is_not_that_of_the_whole():
    """A loop over stacked weights reads each once, whatever fusions it slices them in."""
    def fn(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x * w + 1), None), x, ws)[0]

    traffic = counted(fn, (1024,), (64, 1024)).traffic
    once = 4 * 64 * 1024
    assert once <= traffic < 8 * once  # read once, and the carry in and out of each round


GROUPS = {
    "replica_groups={{0,1},{2,3}}, x=1": [[0, 1], [2, 3]],
    "replica_groups=[2,4]<=[8]": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=[4,2]<=[2,2,2]T(1,2,0)": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "replica_groups=mesh['a'=8] {'a':(2)2}": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "source_target_pairs={{0,1},{1,0}}": [[0, 1], [1, 0]],
    "replica_groups={}": [list(range(8))],
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_in_every_notation(text):
    module = parse_hlo(f"ENTRY %main (p: f32[2]) -> f32[2] {{\n ROOT %r = f32[2]{{0}} all-reduce(%p), {text}\n}}\n")
    np.testing.assert_array_equal(replica_groups(module.entry.root, 8), GROUPS[text])


def test_a_notation_of_groups_that_is_not_known_is_an_error():
    text = "ENTRY %main (p: f32[2]) -> f32[2] {\n ROOT %r = f32[2]{0} all-reduce(%p), replica_groups=new\n}\n"
    module = parse_hlo(text)
    with pytest.raises(ValueError, match="notation"):
        replica_groups(module.entry.root, 8)


TPU = """
HloModule jit_step, is_scheduled=true

%sliced (p0: bf16[4,8,128], p1: s32[]) -> bf16[8,128] {
  %p0 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %b = bf16[8,128]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

%scattered (p2: f32[16,128], p3: s32[]) -> f32[4,128] {
  %p2 = f32[16,128]{1,0} parameter(0)
  %p3 = s32[] parameter(1)
  %z = s32[] constant(0)
  %sum = f32[16,128]{1,0} all-reduce(%p2), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[4,128]{1,0} dynamic-slice(%sum, %p3, %z), dynamic_slice_sizes={4,128}
}

%begun (p8: bf16[8,128]) -> (bf16[8,128], bf16[16,128]) {
  %p8 = bf16[8,128]{1,0} parameter(0)
  %ag1 = bf16[16,128]{1,0} all-gather(%p8), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  ROOT %cc1 = (bf16[8,128]{1,0:S(1)}, bf16[16,128]{1,0:S(1)}) custom-call(%ag1), custom_call_target="AsyncCollectiveStart"
}

%ended (p9: bf16[8,128], p10: bf16[16,128]) -> bf16[16,128] {
  %p9 = bf16[8,128]{1,0:S(1)} parameter(0)
  %p10 = bf16[16,128]{1,0:S(1)} parameter(1)
  %ag2 = bf16[16,128]{1,0} all-gather(%p9), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  ROOT %cc2 = bf16[16,128]{1,0:S(1)} custom-call(%p9, %p10, %ag2), custom_call_target="AsyncCollectiveDone"
}

%conv (p4: bf16[8,128], p5: bf16[128,256]) -> f32[8,256] {
  %p4 = bf16[8,128]{1,0} parameter(0)
  %p5 = bf16[128,256]{1,0} parameter(1)
  ROOT %c = f32[8,256]{1,0} convolution(%p4, %p5), dim_labels=bf_io->bf
}

%batched (p6: bf16[3,8,64], p7: bf16[3,64,16]) -> f32[3,8,16] {
  %p6 = bf16[3,8,64]{2,1,0} parameter(0)
  %p7 = bf16[3,64,16]{2,1,0} parameter(1)
  ROOT %d = f32[3,8,16]{2,1,0} convolution(%p6, %p7), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}

%meanwhile (r0: bf16[8,128], r1: bf16[128,256], r2: bf16[3,64]) -> (bf16[3,64], bf16[8,128], bf16[128,256]) {
  %r0 = bf16[8,128]{1,0} parameter(0)
  %r1 = bf16[128,256]{1,0} parameter(1)
  %r2 = bf16[3,64]{1,0} parameter(2)
  %ag5 = bf16[16,128]{1,0} all-gather(%r0), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %r3 = bf16[3,64]{1,0} negate(%r2)
  ROOT %r4 = (bf16[3,64]{1,0}, bf16[8,128]{1,0:S(1)}, bf16[128,256]{1,0}) tuple(%r3, %r0, %r1)
}, execution_thread="main"

%both (s1: f32[], s2: f32[]) -> f32[] {
  %s1 = f32[] parameter(0)
  ROOT %s2 = f32[] parameter(1)
}

%into (t0: f32[16,128], t1: s32[2,1], t2: f32[2,128]) -> f32[16,128] {
  %t0 = f32[16,128]{1,0} parameter(0)
  %t1 = s32[2,1]{1,0} parameter(1)
  %t2 = f32[2,128]{1,0} parameter(2)
  ROOT %sc = f32[16,128]{1,0} scatter(%t0, %t1, %t2), to_apply=%both, update_window_dims={1}, inserted_window_dims={0}
}

%laid (p8: bf16[4,64]) -> bf16[64,4] {
  %p8 = bf16[4,64]{1,0} parameter(0)
  ROOT %bit = bf16[64,4]{0,1} bitcast(%p8)
}

%after (p9: bf16[4,64], p10: bf16[4,32]) -> bf16[64,32] {
  %p9 = bf16[4,64]{1,0} parameter(0)
  %f9 = bf16[64,4]{0,1} fusion(%p9), kind=kLoop, calls=%laid
  %p10 = bf16[4,32]{1,0} parameter(1)
  ROOT %c9 = bf16[64,32]{1,0} convolution(%f9, %p10), dim_labels=bf_io->bf
}

%below (i: (s32[], f32[8])) -> pred[] {
  %i = (s32[], f32[8]{0}) parameter(0)
  %at = s32[] get-tuple-element(%i), index=0
  %limit = s32[] constant(6)
  ROOT %lt = pred[] compare(%at, %limit), direction=LT
}

%round (j: (s32[], f32[8])) -> (s32[], f32[8]) {
  %j = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%j), index=1
  %y = f32[8]{0:T(128)S(1)} negate(%x)
  ROOT %t = (s32[], f32[8]{0}) tuple(%j, %y)
}

ENTRY %main.1 (a: bf16[4,8,128], b: s32[], g: f32[16,128], w: bf16[128,256], q: bf16[3,8,64], /*index=5*/k: bf16[3,64,16]) -> f32[8,256] {
  %a = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %g = f32[16,128]{1,0} parameter(2)
  %w = bf16[128,256]{1,0} parameter(3)
  %q = bf16[3,8,64]{2,1,0} parameter(4)
  %q0 = bf16[3,64]{1,0} constant({...})
  %k = bf16[3,64,16]{2,1,0} parameter(5)
  %start = (s32[], f32[8]{0}) tuple(%b, %a)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%below, body=%round
  %ws = (bf16[128,256]{1,0:S(1)}, bf16[128,256]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %wd = bf16[128,256]{1,0:S(1)} copy-done(%ws)
  %s = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kLoop, calls=%sliced
  %ags = (bf16[8,128]{1,0:S(1)}, bf16[16,128]{1,0:S(1)}) fusion(%s), kind=kCustom, calls=%begun
  %ag0 = bf16[8,128]{1,0:S(1)} get-tuple-element(%ags), index=0
  %ag3 = bf16[16,128]{1,0:S(1)} get-tuple-element(%ags), index=1
  %agc = (bf16[3,64]{1,0}, bf16[8,128]{1,0:S(1)}, bf16[128,256]{1,0}) fusion(%ag0, %w, %q0), calls=%meanwhile
  %agd = bf16[16,128]{1,0:S(1)} fusion(%ag0, %ag3), kind=kCustom, calls=%ended
  %rs = f32[4,128]{1,0} fusion(%g, %b), kind=kCustom, calls=%scattered
  %scores = f32[3,8,16]{2,1,0} fusion(%q, %k), kind=kOutput, calls=%batched
  %x0 = bf16[4,64]{1,0} constant({...})
  %x1 = ((bf16[4,64]{1,0}), bf16[4,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x0), slice={[0:4], [0:32]}
  %x2 = bf16[4,32]{1,0:S(1)} slice-done(%x1)
  %x3 = bf16[64,32]{1,0} fusion(%x0, %x2), kind=kOutput, calls=%after
  %x5 = s32[2,1]{1,0:S(1)} constant({...})
  %x6 = f32[2,128]{1,0} constant({...})
  %x7 = f32[16,128]{1,0} fusion(%g, %x5, %x6), kind=kLoop, calls=%into
  %x4 = bf16[64,32]{1,0} broadcast(%b), dimensions={}
  ROOT %out = f32[8,256]{1,0:T(8,128)S(1)} fusion(%s, %wd), kind=kOutput, calls=%conv
}
"""  # noqa: E501


def test_what_only_programs_for_tpus_have():
    """Products as convolutions, batches of them as windows, memory near the core, a sum fused with its slice, a
    message in the fusions that start, carry and end it, a loop whose rounds only its condition tells, an operand that
    is laid out anew in a fusion of its own, a slice that is fetched ahead, and rows put into an array where it lies."""
    module = parse_hlo(TPU)
    costs = count_costs(module, {"data": 2, "fsdp": 4})
    assert costs.total_flops == 2 * 8 * 128 * 256 + 2 * 3 * 8 * 64 * 16 + 2 * 64 * 4 * 32
    assert costs.sent("reduce-scatter") == {("fsdp",): 3 / 4 * 4 * 16 * 128}
    assert costs.sent("all-gather") == {("data",): 2 * 8 * 128}
    assert len(costs.collectives) == 2
    read_slice, copied = 2 * 8 * 128, 2 * 128 * 256
    scattered = 4 * 16 * 128 + 4 * 4 * 128
    scores = 2 * (3 * 8 * 64 + 3 * 64 * 16) + 4 * 3 * 8 * 16
    index = 2 * 4  # two fusions read it
    put, negated = 2 * 4 * 2 * 128, 2 * 2 * 3 * 64
    fetched, product, spread = 2 * 4 * 32, 2 * 4 * 64 + 2 * 64 * 32, 4 + 2 * 64 * 32
    assert costs.traffic == sum([read_slice, copied, scattered, scores, index, put, negated, fetched, product, spread])
