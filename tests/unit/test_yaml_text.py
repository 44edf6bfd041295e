"""YAML that somebody else wrote: what it says, and how little it can cost."""

import time

import pytest
import yaml

from darkroom.yaml_text import parse_yaml


def aliases(levels: int, each: int) -> str:
    """A list of lists of … of aliases: each ** levels values in a few lines."""
    lines = [f"x0: &x0 [{', '.join('1' * each)}]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * each)}]" for i in range(1, levels)]
    return "\n".join(lines)


def test_values_are_those_of_yaml_1_2_and_aliases_are_shared() -> None:
    assert parse_yaml("a: 2e-4\nb: [1, .5, 1.E+3, no, null]\nc: &c {d: 1}\ne: *c\nf: {<<: *c, g: 2}") == {
        "a": 2e-4,
        "b": [1, 0.5, 1000.0, False, None],
        "c": {"d": 1},
        "e": {"d": 1},
        "f": {"d": 1, "g": 2},
    }
    assert parse_yaml("") is None
    assert len(parse_yaml(aliases(4, 10))["x3"]) == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aliases(9, 10), "more than 200000 values, aliases counted"),
        (aliases(200, 2), "more than 200000 values, aliases counted"),
        (
            "m0: &m0 {a: 1}\n"
            + "".join(f"m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
            "more than 200000 values",
        ),
        ("a: " + "[" * 20_000 + "]" * 20_000, "more than 32 levels deep"),
        ("a: " + "{a: " * 20_000, "more than 32 levels deep"),
        ("- " * 20_000, "more than 32 levels deep"),
        ("a: &a [*a]", "an alias of what it stands in"),
        ("a: &a {b: {c: *a}}", "an alias of what it stands in"),
        ("a: 1" + "0" * 5000, "a value that cannot be read: Exceeds the limit"),
        ("a: 2024-99-99", "a value that cannot be read: month must be in 1..12"),
        ("? [a]\n: b", "found unhashable key"),
        ("? {a: 1}\n: b", "found unhashable key"),
        ("a: 1\na: 2", 'key "a" appears twice'),
        ("a: \0", "character 0 is not allowed"),
        ("a: " + "x" * (4 << 20), "more than 4194304 bytes"),
        ("ä" * (2 << 20) + "ä", "more than 4194304 bytes"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    ],
    ids=lambda value: value[:24],
)
def test_what_costs_more_than_it_is_worth_or_is_no_value_is_one_error(text: str, message: str) -> None:
    start = time.process_time()
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        parse_yaml(text)
    assert message in str(caught.value.problem)
    assert time.process_time() - start < 10


def test_a_long_word_of_digits_takes_no_longer_than_another() -> None:
    start = time.process_time()
    assert parse_yaml("a: 0x" + "f" * 200_000)["a"].bit_length() == 800_000
    assert parse_yaml("a: '" + "1" * 200_000 + "'")["a"][:3] == "111"
    assert len(parse_yaml("a: 0." + "1" * 200_000 + "e")["a"]) == 200_003
    assert time.process_time() - start < 5
