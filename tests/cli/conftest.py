"""Commands in this process: rows in a file, and a command that must fail with one sentence."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="session")
def write_rows():
    """f(path, rows): the rows as a .jsonl file; returns its path."""

    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def rows(tmp_path, pairs, write_rows):
    """A file of preference rows."""
    return write_rows(tmp_path / "pairs.jsonl", pairs)


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail, and returns the one sentence it says."""
    from fastalign.cli.main import main

    def refused(*argv) -> str:
        assert main([str(item) for item in argv]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("fastalign: "), captured.err
        return lines[0]

    return refused


@pytest.fixture
def shown(capsys):
    """f(*argv): what a command prints that ends by itself, such as --help."""
    from fastalign.cli.main import main

    def shown(*argv) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(argv))
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return shown
