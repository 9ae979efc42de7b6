"""Written answers scored: exact match of the final answer, and ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARK = "####"
_NUMBER = re.compile(
    r"(?:(?<![\w.])[-+])?"  # a sign, and not the dash of "3-4"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:/\d+|\.\d+)?|(?<!\d)\.\d+)"
)
_WORD = re.compile(r"\w+")


def final_answer(text: str) -> str:
    """Return the final answer of a text, in a form that equal answers share.

    It is the number after the first "####", on its line, as in GSM8K (Cobbe et al. 2021,
    arXiv:2110.14168); without that mark the last number of the text. Numbers lose thousands
    separators, currency signs, units, a plus sign, and zeros that say nothing: "$1,234.50." is
    "1234.5". An answer without a number is all its words in lower case.
    """
    _, marked, answer = text.partition(_MARK)
    answer = answer.strip().split("\n", 1)[0] if marked else text
    numbers = _NUMBER.findall(answer)
    if numbers:
        return _plain(numbers[0 if marked else -1])
    return " ".join(_words(answer))


def exact_match(answer: str, reference: str) -> float:
    """Return 1.0 where both have the same final answer, else 0.0."""
    wanted = final_answer(reference)
    return float(bool(wanted) and final_answer(answer) == wanted)


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L's F-measure of an answer, from 0 to 1.

    Precision and recall are the longest common subsequence of words over the answer's and the
    reference's words, and F their harmonic mean (Lin 2004, "ROUGE: A Package for Automatic
    Evaluation of Summaries", https://aclanthology.org/W04-1013/, section 3, with beta 1). Words are
    runs of letters and digits in lower case, without stemming.
    """
    written, wanted = _words(answer), _words(reference)
    common = _longest_common_subsequence(written, wanted)
    return 2 * common / (len(written) + len(wanted)) if common else 0.0


def _plain(number: str) -> str:
    sign = "-" if number.startswith("-") else ""
    above, _, below = number.lstrip("+-").replace(",", "").partition("/")
    whole, _, part = above.partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    plain = (f"{whole}.{part}" if part else whole) + (f"/{below}" if below else "")
    return plain if plain == "0" else sign + plain


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return its length, row by row of the usual table: len(a) x len(b) steps."""
    above = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for k, other in enumerate(b):
            row.append(above[k] + 1 if word == other else max(above[k + 1], row[k]))
        above = row
    return above[-1]
