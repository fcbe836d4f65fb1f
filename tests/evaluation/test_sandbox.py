"""What this system can lock code in with; what the locked-in code can do is in test_code.py."""

from __future__ import annotations

from fastalign.evaluation import sandbox


def test_landlock_comes_first_where_both_are_there():
    found = sandbox.isolations()
    assert found == [name for name in ("landlock", "namespaces") if name in found]


def test_a_machine_whose_calls_are_not_known_has_nothing(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert sandbox.isolations() == []
