"""Scores of written answers, against numbers by hand."""

from __future__ import annotations

import pytest

from fedgraft.answers import exact_match, final_answer, rouge_l


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has <<2+3=5>>5 apples.\n#### 5", "5"),
        ("#### 70,000", "70000"),
        ("####$1,234.50.", "1234.5"),
        ("#### 5 apples\nQuestion: and 7?\n#### 7", "5"),  # what comes after is another question
        ("#### -3", "-3"),
        ("#### +0042", "42"),
        ("#### 3.00", "3"),
        ("#### -0", "0"),
        ("#### .5", "0.5"),
        ("#### 1/2", "1/2"),
        ("####\n8", "8"),
        ("#### ", ""),
        ("#### none", "none"),
        ("It costs $3, then 12 dollars.", "12"),
        ("between 3-4", "4"),  # a dash, no sign
        ("10 - 7 = 3", "3"),
        ("so 5 - 8 is -3.", "-3"),
        ("1, 2, 3", "3"),
        ("Paris, of course!", "paris of course"),
        ("", ""),
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("it is 1,000", "steps\n#### 1000", 1.0),
        ("#### 18", "... = 18\n#### 18", 1.0),
        ("#### 18.5", "#### 18", 0.0),
        ("18 and no more, or 19", "#### 18", 0.0),
        ("", "#### 18", 0.0),
        ("", "", 0.0),
        ("YES.", "yes", 1.0),
    ],
)
def test_exact_match(text: str, reference: str, score: float) -> None:
    assert exact_match(text, reference) == score


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        # Lin 2004, section 3.1: S1 "police killed the gunman"; S2 has 3 of its words in order, S3
        # 2. With beta 1 and four words each: 3/4 and 2/4.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # LCS 3 of 3 and 6 words: P = 1, R = 1/2, F = 2 (1 x 1/2) / (3/2) = 2/3
        ("a b c", "a x b y c z", 2 / 3),
        ("The cat, sat!", "the CAT sat", 1.0),
        ("c b a", "a b c", 1 / 3),
        ("a a a", "a", 1 / 2),
        ("nothing", "in common", 0.0),
        ("", "words", 0.0),
        ("words", "", 0.0),
    ],
)
def test_rouge_l(text: str, reference: str, score: float) -> None:
    assert rouge_l(text, reference) == pytest.approx(score, abs=1e-12)
    assert rouge_l(reference, text) == pytest.approx(score, abs=1e-12)
