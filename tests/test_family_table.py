"""The table of docs/families.md is what its command prints."""

from pathlib import Path

import family_table
import pytest
import transformers

PAGE = (Path(__file__).parent.parent / "docs/families.md").read_text()
TABLE = [line for line in PAGE.splitlines() if line.startswith("| ")]


def test_every_family_of_the_tests_has_a_row_and_runs():
    rows = dict(line.strip("| ").split(" | ", 1) for line in TABLE[2:])
    for model_type, family in family_table.MADE.items():
        if model_type in family_table.audio_text_types() and model_type not in family_table.WHOLE:
            assert rows[model_type].startswith("runs"), family


@pytest.mark.slow
@pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in TABLE[0], reason="of another version"
)
def test_the_table_is_what_the_command_prints(capsys):
    family_table.main()
    assert capsys.readouterr().out.splitlines() == TABLE
