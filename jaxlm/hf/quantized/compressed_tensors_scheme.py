"""The quantization schemes of the compressed-tensors layout: how a linear map is quantized, from and to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxlm.core.errors import UserError

__all__ = ["FORMATS", "Scheme"]

FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "mxfp4-pack-quantized", "naive-quantized", "mixed-precision",
    "dense",
)


@dataclass(frozen=True)
class Scheme:
    """How a linear map is quantized.

    - ``bits`` is the width of a weight; ``floats`` says that weights are floats, float8_e4m3fn or the 4 bits of MXFP4,
      else they are integers.
    - ``symmetric``: there are no zero points.
    - ``group`` inputs share a scale; 0 is one scale an output, or one for the whole matrix.
    - ``rows`` outputs share a scale.
    - ``strategy`` is what compressed-tensors calls this sharing: "tensor", "channel", "group" or "block".
    - ``activations`` are "" (not quantized), "dynamic" (a scale for each token) or "static" (one fixed scale). They are
      8 bits wide and of the same kind as the weights; beside weights of MXFP4 there are none.
    """

    bits: int
    floats: bool = False
    symmetric: bool = True
    group: int = 0
    rows: int = 1
    strategy: str = "channel"
    activations: str = ""

    @property
    def mxfp4(self) -> bool:
        return self.floats and self.bits == 4

    @property
    def format(self) -> str:
        """The format in which matrices of this scheme are written."""
        if self.mxfp4:
            return "mxfp4-pack-quantized"
        if self.floats:
            return "float-quantized"
        return "int-quantized" if self.activations else "pack-quantized"

    def to_json(self) -> dict[str, Any]:
        """The fields of a group of ``quantization_config``, without its targets."""
        kind = "float" if self.floats else "int"
        weights = {"num_bits": self.bits, "type": kind, "symmetric": self.symmetric, "strategy": self.strategy}
        weights |= {"group_size": self.group or None, "dynamic": False}
        weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"} if self.mxfp4 else {}
        inputs = None
        if self.activations:
            dynamic = self.activations == "dynamic"
            inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token" if dynamic else "tensor"}
            inputs |= {"group_size": None, "dynamic": dynamic}
        return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": self.format}

    @classmethod
    def from_json(cls, name: str, fields: Any) -> Scheme:
        """The scheme of the group ``name`` of ``quantization_config``.

        Raises:
            UserError: a field is not understood, or jaxlm has no such quantization.
        """
        if not isinstance(fields, dict) or not isinstance(fields.get("weights"), dict):
            raise UserError(f"config_groups: {name} has no weights; only groups that spell out their weights are read")
        if fields.get("output_activations") is not None:
            raise UserError(f"config_groups: {name} quantizes output activations, which is not supported")
        if fields.get("format") not in (None, *FORMATS):
            raise UserError(f"config_groups: {name} has the format {fields['format']!r}, which is not supported")
        weights = fields["weights"]
        bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        floats, symmetric = kind == "float", weights.get("symmetric", True)
        known = type(bits) is int and (bits in (4, 8) if floats else 1 <= bits <= 8)
        if kind not in ("int", "float") or not known:
            raise UserError(f"config_groups: {name} has weights of the type {kind!r} in {bits!r} bits; not supported")
        if type(symmetric) is not bool or (floats and not symmetric):
            raise UserError(f"config_groups: {name} has symmetric = {symmetric!r}, which is not supported there")
        if weights.get("dynamic"):
            raise UserError(f"config_groups: {name} quantizes weights dynamically, which is not supported")
        group, rows, strategy = _sharing(name, weights)
        if floats and bits == 4 and (group, strategy) != (32, "group"):
            raise UserError(f"config_groups: {name} has 4-bit floats, which are read as MXFP4 only, in groups of 32")
        return cls(bits, floats, symmetric, group, rows, strategy, _activations(name, fields, kind, group))


def _sharing(name: str, weights: Mapping[str, Any]) -> tuple[int, int, str]:
    """(inputs that share a scale, outputs that share one, strategy)."""
    group, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "group" if group != -1 else "channel"
    if strategy in ("tensor", "channel"):
        return 0, 1, strategy
    if strategy == "group" and type(group) is int and group > 0:
        return group, 1, strategy
    block = weights.get("block_structure")
    if strategy == "block" and isinstance(block, list) and len(block) == 2:
        if all(type(size) is int and size > 0 for size in block):
            return block[1], block[0], strategy
    raise UserError(f"config_groups: {name} has the strategy {strategy!r} with groups of {group!r}; not supported")


def _activations(name: str, fields: Mapping[str, Any], kind: str, group: int) -> str:
    """"", "dynamic" or "static"; see ``Scheme``."""
    given = fields.get("input_activations")
    if given is None:
        return ""
    if not isinstance(given, dict):
        raise UserError(f"config_groups: {name} has input_activations {given!r}, which is not an object")
    how = (given.get("strategy"), given.get("dynamic"))
    plain = all(isinstance(each, str | bool | None) for each in how)
    found = {("token", True): "dynamic", ("tensor", False): "static"}.get(how) if plain else None
    alike = given.get("num_bits", 8) == 8 and given.get("type", "int") == kind and given.get("symmetric", True) is True
    if found is None or not alike or (group and kind == "float"):
        raise UserError(
            f"config_groups: {name} quantizes input_activations in a way that is not supported: only symmetric ones of "
            "8 bits, of the type of the weights, with a scale for each token or one fixed scale; floats beside weights "
            "with one scale an output"
        )
    return found
