"""A few rounds of the fuzzer, the same in every run; `python tests/fuzz.py` has any number of them."""

from pathlib import Path

import pytest
from fuzz import Fuzz, Ground


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    folder: Path = tmp_path_factory.mktemp("fuzz") / "ground"
    folder.mkdir()
    return Fuzz(Ground(folder))


def test_files_out_of_order_are_read_or_refused_in_a_line(fuzz: Fuzz) -> None:
    assert fuzz.files(150, 1) == 150


def test_command_lines_end_with_0_or_2(fuzz: Fuzz) -> None:
    assert fuzz.command_lines(60, 2) == 60


def test_rows_end_with_0_or_2(fuzz: Fuzz) -> None:
    assert fuzz.rows(40, 3) == 40


def test_overrides_are_taken_or_refused_in_a_line(fuzz: Fuzz) -> None:
    assert fuzz.overrides(60, 4) == 60
