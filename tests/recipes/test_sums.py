"""The data of grpo-sums: every sum once, both orders of a pair in one file, as the files hold it."""

from __future__ import annotations

import json

from fastalign.recipes.sums import make_data


def test_the_files_are_those_that_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "FOLDER", tmp_path)
    make_data.main()
    sides = []
    for name in ("train.jsonl", "test.jsonl"):
        text = (make_data.Path(make_data.__file__).parent.parent / "grpo-sums" / name).read_text()
        assert (tmp_path / name).read_text() == text
        rows = [json.loads(line) for line in text.splitlines()]
        digits = [tuple(int(c) for c in row["prompt"][0]["content"] if c.isdigit()) for row in rows]
        assert all(str(sum(pair)) == row["answer"] for pair, row in zip(digits, rows, strict=True))
        sides.append(set(digits))
    assert len(sides[0] | sides[1]) == 81 and not sides[0] & sides[1]
    assert all((b, a) in side for side in sides for a, b in side)
