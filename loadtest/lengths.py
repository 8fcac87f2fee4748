"""Lengths drawn from a distribution, written as one word: `128`, `uniform:64,256`, `lognormal:512,0.6` ...

Real prompts and answers have long tails, and a server tuned on one fixed length looks better than it is.
"""

import math
import random
from dataclasses import dataclass
from typing import Self

from loadtest.errors import SettingsError

_ARGUMENTS = {
    "fixed": "LENGTH",
    "uniform": "LOWEST,HIGHEST",
    "normal": "MEAN,DEVIATION",
    "lognormal": "MEDIAN,SIGMA",
    "exponential": "MEAN",
    "choice": "LENGTH,LENGTH,...",
}


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution over whole numbers of tokens, never below one."""

    shape: str
    arguments: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """`text` is a number or SHAPE:ARGUMENTS; SettingsError names the shapes there are."""
        shape, colon, rest = text.partition(":")
        if not colon:
            shape, rest = "fixed", text
        try:
            arguments = tuple(float(word) for word in rest.split(","))
        except ValueError:
            arguments = ()
        wanted = _ARGUMENTS.get(shape)
        if wanted is None or not _fits(wanted, arguments):
            allowed = ", ".join(f"{name}:{form}" for name, form in _ARGUMENTS.items() if name != "fixed")
            raise SettingsError(f"length {text!r}: write a number of tokens or one of {allowed}")
        return cls(shape, arguments)

    def draw(self, rng: random.Random) -> int:
        """One length in tokens."""
        return max(1, round(self._draw(rng)))

    def _draw(self, rng: random.Random) -> float:
        first, second = self.arguments[0], self.arguments[-1]
        match self.shape:
            case "uniform":
                return rng.randint(int(first), int(second))
            case "normal":
                return rng.gauss(first, second)
            case "lognormal":
                return first * math.exp(rng.gauss(0.0, second))
            case "exponential":
                return rng.expovariate(1.0 / first)
            case "choice":
                return rng.choice(self.arguments)
        return first


def _fits(form: str, arguments: tuple[float, ...]) -> bool:
    if not arguments or arguments[0] <= 0 or not all(math.isfinite(value) for value in arguments):
        return False
    if form == "LOWEST,HIGHEST" and (len(arguments) != 2 or arguments[0] > arguments[1]):
        return False
    return form.endswith("...") or len(arguments) == form.count(",") + 1
