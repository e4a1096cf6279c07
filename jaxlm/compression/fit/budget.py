"""What a model is fitted to: a size, or a perplexity."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jaxlm.core.errors import UserError

__all__ = ["Budget", "LossTarget"]


@dataclass(frozen=True)
class Budget:
    """How large a model may be: one of three.

    Attributes:
        bits: for each weight of the kernels, scales and zero points included.
        bytes: of all weights on disk, embeddings and head too.
        zeros: the share of the kernels' weights that are to be zero.
    """

    bits: float = 0.0
    bytes: int = 0
    zeros: float = 0.0

    @staticmethod
    def parse(text: str) -> Budget:
        """A budget from text: ``3.2bits``, ``900MiB`` (B, kB, MB, GB, KiB, MiB, GiB), or ``70%zeros``.

        Raises:
            UserError: the text is none of these.
        """
        powers = {"": 0, "k": 1, "m": 2, "g": 3}
        if found := re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(bits?|([kmg]?)(i?)b)", text.strip(), re.IGNORECASE):
            number, unit, power, binary = found.groups()
            if float(number) > 0 and unit.lower().startswith("bit"):
                return Budget(bits=float(number))
            if float(number) > 0 and not (binary and not power):
                return Budget(bytes=int(float(number) * (1024 if binary else 1000) ** powers[power.lower()]))
        found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*%\s*zeros?", text.strip(), re.IGNORECASE)
        if found and 0 < float(found[1]) < 100:
            return Budget(zeros=float(found[1]) / 100)
        raise UserError(
            f"cannot fit to {text!r}; give bits a weight as 3.2bits, the size of the weights as 900MiB, or 70%zeros"
        )

    def limit(self, weights: int) -> int:
        """The largest size, in bytes or in weights that are not zero, for this number of weights in the kernels."""
        if self.zeros:
            return round((1 - self.zeros) * weights)
        return int(self.bits * weights / 8) if self.bits else self.bytes

    def describe(self, size: int, weights: int) -> str:
        """A size in the unit of this budget."""
        if self.zeros:
            return f"{1 - size / weights:.2%} zeros"
        return f"{8 * size / weights:.4g} bits a weight" if self.bits else f"{size:,} bytes"


@dataclass(frozen=True)
class LossTarget:
    """A perplexity to keep: ``perplexity``, or the dense model's and the share ``more`` of it."""

    perplexity: float = 0.0
    more: float = 0.0

    @staticmethod
    def parse(text: str) -> LossTarget:
        """A target from text: ``46.5`` or ``+1%``.

        Raises:
            UserError: the text is neither.
        """
        if found := re.fullmatch(r"(\+?)(\d+(?:\.\d+)?|\.\d+)(%?)", text.strip()):
            sign, number, percent = found.groups()
            if sign and percent and float(number) > 0:
                return LossTarget(more=float(number) / 100)
            if not sign and not percent and float(number) > 1:
                return LossTarget(perplexity=float(number))
        raise UserError(f"cannot keep to a perplexity of {text!r}; give one as 46.5, or above the dense model's as +1%")

    def limit(self, dense: float) -> float:
        """The largest loss in nats a token, where the dense model has the loss ``dense``.

        Raises:
            UserError: the dense model itself is above the target.
        """
        most = math.log(self.perplexity) if self.perplexity else dense + math.log1p(self.more)
        if most < dense:
            raise UserError(
                f"a perplexity of {self.perplexity:g} is less than the {math.exp(dense):.4f} of the dense model on the "
                "part of the calibration data that is kept to judge by"
            )
        return most
