"""How numbers are written for people: metrics, their differences, bytes and seconds.

Shares of examples (accuracy, F1) are kept as fractions and shown in per cent, their differences in
points; losses and perplexities are shown with four significant digits, their differences with
three. What is missing or not finite is shown as a dash.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
MEGABYTE = 1e6
_NAMES = {"macro_f1": "macro F1", "rouge_l": "ROUGE-L"}
_SHARES = ("accuracy", "f1", "exact_match", "precision", "recall")


def number(value: object) -> float:
    """Return what a JSON file holds as a float, NaN for null and whatever is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


@dataclass(frozen=True)
class Unit:
    """The unit of one metric, by its name: per cent for shares, plain numbers for losses."""

    metric: str

    @property
    def share(self) -> bool:
        """Whether the metric is a share of examples, shown in per cent."""
        return self.metric.split("[", 1)[0].endswith(_SHARES)

    @property
    def scale(self) -> float:
        """What a raw value is multiplied by to be shown."""
        return 100.0 if self.share else 1.0

    @property
    def name(self) -> str:
        """The metric's name in a sentence."""
        return _NAMES.get(self.metric, self.metric.replace("_", " "))

    @property
    def title(self) -> str:
        """The metric's name at the start of a title: "Macro F1", "Loss"."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def axis(self) -> str:
        """The metric's name with its unit, for an axis."""
        return f"{self.name} (%)" if self.share else self.name

    @property
    def points(self) -> str:
        """The word after a difference, with its space: " points" for shares."""
        return " points" if self.share else ""

    def value(self, raw: float | None) -> str:
        """Return "77.4%" or "2.583"."""
        if raw is None or not math.isfinite(raw):
            return NOTHING
        return f"{self._fixed(raw, self._decimals(raw))}{'%' if self.share else ''}"

    def spread(self, mean: float | None, sd: float | None) -> str:
        """Return "77.4 ± 1.2%", or the mean alone where there is no standard deviation."""
        if mean is None or sd is None or not math.isfinite(mean) or not math.isfinite(sd):
            return self.value(mean)
        decimals = self._decimals(mean)
        text = f"{self._fixed(mean, decimals)} ± {self._fixed(sd, decimals)}"
        return f"{text}%" if self.share else text

    def differences(self, *raw: float | None, signed: bool = True) -> tuple[str, ...]:
        """Return differences with common decimals: none that is not zero is shown as zero."""
        shown = [None if x is None or not math.isfinite(x) else x * self.scale for x in raw]
        sizes = [abs(x) for x in shown if x]
        decimals = 1 if self.share else 3
        if sizes:
            digits = 1 if self.share else 2
            decimals = max(digits - _exponent(max(sizes)), 1 if self.share else 0)
            while decimals < 8 and round(min(sizes), decimals) == 0:
                decimals += 1
        return tuple(
            NOTHING if x is None else _signed(x, decimals) if signed else _plain(x, decimals)
            for x in shown
        )

    def difference(self, raw: float | None, *, signed: bool = True) -> str:
        """Return one difference: "+1.0" (points) or "−0.0213"."""
        return self.differences(raw, signed=signed)[0]

    def interval(self, low: float | None, high: float | None) -> str:
        """Return "−2.3 to +4.3"."""
        if low is None or high is None:
            return NOTHING
        return " to ".join(self.differences(low, high))

    def _decimals(self, raw: float) -> int:
        return 1 if self.share else min(max(3 - _exponent(raw), 0), 6)

    def _fixed(self, raw: float, decimals: int) -> str:
        return _plain(raw * self.scale, decimals)


def megabytes(count: float | None) -> str:
    """Return a number of bytes in units of 10^6 bytes, without the unit."""
    if count is None or not math.isfinite(count):
        return NOTHING
    size = count / MEGABYTE
    return _plain(size, 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 4)


def seconds(value: float | None) -> str:
    """Return seconds, with a decimal below ten, without the unit."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return _plain(value, 1 if value < 10 else 0)


def clip(text: str, length: int) -> str:
    """Return text as one line of printable characters, cut to a length."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    return line if len(line) <= length else f"{line[: length - 1].rstrip()}…"


def listed(words: list[str], last: str = "and") -> str:
    """Return "a", "a and b" or "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def ranges(values: list[int]) -> str:
    """Return sorted whole numbers with runs drawn together: "1, 3–5"."""
    parts: list[list[int]] = []
    for value in sorted(set(values)):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}{NOTHING}{p[-1]}" for p in parts)


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _plain(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def _signed(value: float, decimals: int) -> str:
    text = _plain(value, decimals)
    zero = not text.strip("0.,")
    return text if zero or text.startswith(MINUS) else f"+{text}"
