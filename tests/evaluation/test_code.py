"""The sandbox, tried with code that does what it must not be able to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastalign.errors import ConfigError
from fastalign.evaluation import code
from fastalign.evaluation.code import check_isolation, code_of, continued, run_code
from fastalign.evaluation.sandbox import isolations

HOWS = isolations()


def test_this_machine_can_lock_code_in():
    assert "landlock" in HOWS or "namespaces" in HOWS


@pytest.mark.parametrize("how", HOWS)
def test_what_code_may_do(how):
    program = """
import math, threading, tempfile, random
open("mine.txt", "w").write("x")
assert open("mine.txt").read() == "x"
with tempfile.TemporaryFile() as file:
    file.write(b"1")
found = []
thread = threading.Thread(target=found.append, args=(1,))
thread.start(); thread.join()
assert found == [1]
open("/dev/null", "w").write("x")
"""
    assert run_code(program, how=how) == (True, "")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import os; os._exit(0)", "it ended itself, with status 0"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os.fork()", "PermissionError"),
        ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("import urllib.request as u; u.urlopen('http://127.0.0.1:9')", "URLError"),
        ("x = bytearray(3 * 10**9)", "MemoryError"),
        ("import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (2**40, 2**40))", "ValueError"),
        ("import socket; socket.sethostname(socket.gethostname())", "PermissionError"),
        ("open('big', 'wb').write(b'0' * 2**25)", ""),
    ],
)
def test_what_code_may_not_do(how, program, said):
    result = run_code(program, how=how)
    assert not result.passed
    assert said in result.reason


@pytest.mark.parametrize("how", HOWS)
def test_nothing_outside_of_its_folder_changes(how, tmp_path):
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim.txt"
    victim.write_text("before")
    victim.chmod(0o666)
    for act in (
        f"open({str(victim)!r}, 'w')",
        f"open({str(tmp_path / 'new.txt')!r}, 'w')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.rename({str(victim)!r}, 'mine')",
        f"import os; os.truncate({str(victim)!r}, 0)",
        f"import os; os.chmod({str(victim)!r}, 0)",
        f"import os; os.link({str(victim)!r}, 'mine'); open('mine', 'w')",
        f"import os; os.symlink({str(victim)!r}, 'mine'); open('mine', 'w')",
        f"import os; os.utime({str(victim)!r}, (0, 0))",
    ):
        assert not run_code(act, how=how).passed, act
        assert victim.read_text() == "before"
        assert victim.stat().st_mode & 0o777 == 0o666 and victim.stat().st_mtime > 1e9
    assert [path.name for path in tmp_path.iterdir()] == ["victim.txt"]


def test_an_endless_loop_ends():
    result = run_code("import time\nwhile True: time.sleep(0.01)", seconds=1)
    assert result == (False, "it ran for more than 1 seconds")


def test_code_is_refused_where_nothing_locks_it_in(monkeypatch):
    monkeypatch.setattr(code, "isolation", lambda: "none")
    with pytest.raises(ConfigError, match="--unsafe-code"):
        check_isolation(unsafe=False)
    check_isolation(unsafe=True)


def test_the_code_of_an_answer():
    assert code_of("Here:\n```python\nx = 1\n```\nDone.") == "x = 1\n"
    assert code_of("x = 1") == "x = 1"
    assert continued("def f():\n", "    return 1\n\nprint(f())") == "def f():\n    return 1\n"


def test_files_of_the_code_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run_code("open('left', 'w')")
    assert not list(Path(tmp_path).iterdir())
