"""The table of tests/bench/README.md: what a program prints is found in it, and rows that were not measured stay."""

import re
from pathlib import Path

import pytest

from tests.bench import __main__ as table
from tests.bench.results import read, result, show

BENCH = Path(__file__).parent / "bench"
TEXT = f"# Measuring\n\n{table.BEGIN}\n| a |\n|---|\n{table.END}\n\nMore.\n"


def test_what_a_program_shows_is_read_from_its_output(capsys):
    assert show("whole / part", [3.0, 1.0, 2.0], least=1.5) and not show("part / whole", [2.0], most=1.5)
    [first, second] = read("words\n" + capsys.readouterr().out + "more words\n")
    assert first == result("whole / part", [1.0, 2.0, 3.0], least=1.5)
    assert (first.ratio, first.low, first.high, first.pairs, first.kept) == (2.0, 1.0, 3.0, 3, True)
    assert first.row() == "whole / part | 2 (1 to 3, 3 pairs) | at least 1.5"
    assert second.row() == "part / whole | 2 | at most 1.5, **missed**"


def test_rows_of_programs_that_were_not_run_stay_and_all_keep_their_order():
    first, second, third = (program.name for program in table.PROGRAMS[:3])
    text = table.written(TEXT, {third: [f"| {third} | c |"], first: [f"| {first} | a |"]})
    text = table.written(text, {second: [f"| {second} | b |", f"| {second} | b2 |"], first: [f"| {first} | anew |"]})
    rows = [f"| {first} | anew |", f"| {second} | b |", f"| {second} | b2 |", f"| {third} | c |"]
    assert "\n".join(rows) in text and text.startswith("# Measuring\n") and text.endswith("\n\nMore.\n")
    assert "| a |" not in text


@pytest.mark.parametrize(
    ("find", "output", "ratios"),
    [
        (table.inference, 'x\n{"model": "m", "batch": 1, "speedup": 3.5}\n', [3.5]),
        (table.swap, '{"p99_ratio": 1.5, "limit": 2.0}\n', [1.5]),
        (table.memory, '{"ratio": 1.03, "limit": 1.15}\n', [1.03]),
        (table.precision, '{"model": "m"}\n{"model": "m", "batch": 1, "faster": [1.2, 0.4, 4.7]}\n', [1.2]),
        (table.intake, 'x\n{"ratio_20000_clock": 1.1, "ratio_1000_clock": 0.78, "peak_mb": 103}\n', [0.78, 1.1]),
        (
            table.start,
            "agent, from a commit to /readyz      6.00 s (from 5.00 to 7.00; below 15)\n"
            "server, to its first answer          1.00 s (from 0.90 to 1.10; below 15)\n"
            "imports of the trainer alone         4.00 s\n",
            [1.5, 0.25],
        ),
    ],
)
def test_ratios_are_found_in_what_the_programs_print(find, output, ratios):
    assert [one.ratio for one in find(output)] == ratios


def test_a_program_whose_data_are_missing_is_left_out_and_says_what_it_needs(tmp_path):
    [update] = [program for program in table.PROGRAMS if program.name == "update"]
    assert update.lacks(None) == update.lacks(tmp_path) == "tiny-imagenet-stream.zip, tiny-imagenet.json (DATA=folder)"
    for name in update.files:
        (tmp_path / name).touch()
    assert update.lacks(tmp_path) is None


def test_every_program_is_run_or_named_as_left_out():
    told = (BENCH / "README.md").read_text(encoding="utf-8")
    run = {program.command.split()[0] for program in table.PROGRAMS}
    for path in BENCH.glob("bench_*.py"):
        name = path.stem.removeprefix("bench_")
        assert name in run or f"`bench_{name}`" in told.partition("Not among them")[2], name
    for program in table.PROGRAMS:
        assert f"| {program.name} | `{table.shown(program)}` |" in told
    assert re.search(f"{table.BEGIN}\n.*{table.END}", told, re.S)
