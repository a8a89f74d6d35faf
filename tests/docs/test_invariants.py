"""docs/invariants.md lists every numbered invariant with the file that states it and the tests that name it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "invariants.md").read_text()
LETTERS = "ARLQDFHCOZSKUPTWB"

LISTED = {
    number: (sentence, file, re.findall(r"^- `(.+)`$", tests, re.MULTILINE))
    for number, sentence, file, tests in re.findall(
        r"^\*\*(\w+)\*\* (.+)\n\nStated in `([^`]+)`\. Tests:(.*(?:\n\n(?:- .+\n)+)?)", PAGE, re.MULTILINE
    )
}


def stated() -> list[tuple[str, str, str]]:
    """Number, first words and file of every line, anywhere in the sources, that states an invariant."""
    sources = [path for package in ("shmbroker", "gpu_worker", "tee_worker", "tests") for path in sorted((ROOT / package).rglob("*.py"))]
    return [
        (number, words, str(path.relative_to(ROOT)))
        for path in sources
        for number, words in re.findall(rf"^ *([{LETTERS}]\d+)  (\S.+)$", path.read_text(), re.MULTILINE)
    ]


def test_every_invariant_that_the_code_states_is_listed_with_its_words_and_its_file() -> None:
    for number, words, file in stated():
        assert number in LISTED, f"{number} of {file} is not listed; run: python docs/generate.py"
        sentence, where, _ = LISTED[number]
        assert sentence.startswith(words.replace("``", "`")), number
        assert where == file, number
    assert {number for number, _, _ in stated()} == set(LISTED)


def test_no_number_is_given_twice_and_none_is_left_out() -> None:
    numbers = [number for number, _, _ in stated()]
    assert len(numbers) == len(set(numbers))
    for letter in LETTERS:
        of_letter = sorted(int(number[1:]) for number in numbers if number[0] == letter)
        assert of_letter == list(range(1, len(of_letter) + 1)), letter
        assert of_letter, letter


@pytest.mark.parametrize("number", sorted(LISTED))
def test_every_test_that_is_listed_exists_and_names_the_invariant(number: str) -> None:
    for test in LISTED[number][2]:
        file, *names = test.split("::")
        source = (ROOT / file).read_text()
        for name in names:
            assert re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE), test
    assert LISTED[number][2], f"no test names {number}: write it into the docstring of the test that shows it"


def test_the_rules_of_the_published_layout_have_the_numbers_of_the_code() -> None:
    told = set(re.findall(r"^- \*\*(L\d+)\*\*", (ROOT / "docs" / "memory-layout.md").read_text(), re.MULTILINE))
    assert told == {number for number in LISTED if number[0] == "L"}
