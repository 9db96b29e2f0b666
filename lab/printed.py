"""
What a benchmark prints, kept as JSON too: sentences, and tables as markdown.

    out = Printed("runs/losses.json")           # None: printed alone
    out.say("H200, torch 2.14")
    out.table("contender", "seconds")
    out.row("ours", "0.41")

The file is written anew with every line, so that what is stopped leaves what it had.
"""
import json
from pathlib import Path


class Printed:
    def __init__(self, path=None):
        self.path = path
        self.parts = []                 # a sentence, or {"columns": [...], "rows": [[...], ...]}

    def say(self, text):
        self.parts.append(text)
        self._print(text)

    def table(self, *columns):
        self.parts.append({"columns": columns, "rows": []})
        self._print(*table_lines(self.parts[-1]))

    def row(self, *cells):
        """One of the last table. Cells that are missing at its end are empty."""
        table = self.parts[-1]
        cells += ("",) * (len(table["columns"]) - len(cells))
        table["rows"].append(cells)
        self._print(row_line(cells))

    def _print(self, *lines):
        print(*lines, sep="\n", flush=True)
        if self.path:
            partial = Path(f"{self.path}.part")
            partial.write_text(json.dumps(self.parts))
            partial.replace(self.path)


def table_lines(table):
    """A table's dict as markdown, behind an empty line."""
    columns = table["columns"]
    rows = [columns, ["---"] * len(columns), *table["rows"]]
    return ["", *map(row_line, rows)]


def row_line(cells):
    return "".join(f"| {cell} " if cell != "" else "| " for cell in cells) + "|"


def as_markdown(parts):
    """Printed.parts -> the lines that were printed."""
    lines = []
    for part in parts:
        lines += table_lines(part) if isinstance(part, dict) else [part]
    return lines
