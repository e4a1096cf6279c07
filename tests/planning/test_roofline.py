"""From counts to seconds, against closed forms."""

from __future__ import annotations

import itertools

import pytest

from jaxlm.core.errors import UserError
from jaxlm.core.hardware import CHIPS, chip_of
from jaxlm.planning.hlo_costs import Collective, HloCosts
from jaxlm.planning.roofline import DeviceCoordinates, group_bandwidth, roofline
from jaxlm.planning.topology import parse_topology


def coordinates(topology):
    torus = [chip[::-1] for chip in itertools.product(*(range(size) for size in topology.shape[::-1]))]
    return [DeviceCoordinates(number, chip) for number in range(topology.slices) for chip in torus]


def bandwidth(name, members, kind="all-gather"):
    topology = parse_topology(name)
    devices = coordinates(topology)
    group = tuple(devices.index(DeviceCoordinates(*member)) for member in members)
    return group_bandwidth(Collective(kind, ("fsdp",), group, 1.0, 1), topology, devices) / topology.chip.link


LINKS = {
    "a row that closes": ("v5e:16x16", [(0, (x, 3)) for x in range(16)], 2),
    "a row that is open": ("v5e:8x8", [(0, (x, 3)) for x in range(8)], 1),
    "half a row": ("v5e:16x16", [(0, (x, 3)) for x in range(8)], 1),
    "every other chip of a row": ("v5e:16x16", [(0, (x, 3)) for x in range(0, 16, 2)], 0.5),
    "both dimensions": ("v5e:16x16", [(0, (x, y)) for x in range(16) for y in range(16)], 4),
    "one of each": ("v5e:8x16", [(0, (x, y)) for x in range(8) for y in range(16)], 3),
    "a cube": ("v5p:4x4x4", [(0, (x, y, z)) for x in range(4) for y in range(4) for z in range(4)], 6),
    "a diagonal": ("v5e:4x4", [(0, (x, x)) for x in range(4)], 1),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_that_a_group_has(case):
    name, members, links = LINKS[case]
    assert bandwidth(name, members) == links


def test_permutations_go_one_way_and_round():
    assert bandwidth("v5e:16x16", [(0, (0, 0)), (0, (1, 0))], "collective-permute") == 1
    assert bandwidth("v5e:16x16", [(0, (15, 0)), (0, (0, 0))], "collective-permute") == 1
    assert bandwidth("v5e:8x8", [(0, (7, 0)), (0, (0, 0))], "collective-permute") == 1 / 7


def test_between_slices_is_the_data_centre():
    chip = parse_topology("v5e:4x4*2").chip
    assert bandwidth("v5e:4x4*2", [(0, (0, 0)), (1, (0, 0))]) == chip.dcn / chip.link


def test_a_roofline():
    topology = parse_topology("v5e:16x16")
    chip = topology.chip
    costs = HloCosts(traffic=chip.bandwidth)
    costs.flops.update(float=chip.flops, int8=chip.int8)
    row = tuple(range(16))
    costs.collectives = [Collective("all-gather", ("fsdp",), row, 4 * chip.link, 1),
                          Collective("all-reduce", ("fsdp",), row, 2 * chip.link, 1)]
    time = roofline(costs, topology, coordinates(topology))
    assert (time.compute, time.memory, time.network) == (2, 1, {"fsdp": 3})
    assert (time.step, time.serial, time.bound) == (3, 6, "network")
    assert roofline(costs, parse_topology("cpu:8"), []) is None


def test_every_chip_of_a_topology_has_all_figures():
    for chip in CHIPS:
        assert chip.source and chip.flops > 0
        if chip.name:
            assert min(chip.int8, chip.memory, chip.bandwidth, chip.link, chip.dimensions, chip.wraps, chip.dcn) > 0
    assert chip_of("TPU v5 lite").name == "v5e" and chip_of("TPU v5").name == "v5p" and chip_of("cpu") is None


def test_topologies():
    topology = parse_topology("v5p:4x4x8*2")
    assert (topology.shape, topology.slices, topology.size) == ((4, 4, 8), 2, 256)
    assert topology.wraps_around(2) and not parse_topology("v5p:2x2x1").wraps_around(0)
    assert parse_topology("cpu:8").size == 8


@pytest.mark.parametrize("name, said", [
    ("v5x:16x16", "the nearest is 'v5e:16x16'"), ("v5e", "the nearest is 'v5e:4x4'"),
    ("v5e:16", "v5e:4x4"), ("v5p:4x4", "v5p:4x4x4"), ("cpux:8", "'cpu:8'"),
    ("v5e:0x4", "the nearest is 'v5e:4x4'"), ("h100:8", "chips: v5e"),
])  # fmt: skip
def test_mistaken_topologies_are_told(name, said):
    with pytest.raises(UserError, match=said):
        parse_topology(name)
