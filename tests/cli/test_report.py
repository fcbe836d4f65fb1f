"""`fastalign report`: of runs that ended, were stopped, or still go on."""

from __future__ import annotations

import json
import shutil
import threading

from fastalign.cli.main import main
from fastalign.files import append_metrics


def test_the_page_of_a_run_that_ended(trained, tmp_path, capsys):
    folder = shutil.copytree(trained("dpo"), tmp_path / "run")
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == before
    assert capsys.readouterr().out == f"Report {folder / 'report.html'}\n"


def test_a_stopped_run_has_a_page_that_says_so(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(
        trained("dpo"), folder, ignore=shutil.ignore_patterns("summary.json", "samples.jsonl", "report.html")
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 6, "los')  # killed while it wrote
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert (
        "The run has not ended: step 5 of 12" in page and "Reward margin" in page and 'http-equiv="refresh' not in page
    )
    assert "The run has not ended" in capsys.readouterr().out


def test_a_running_run_is_watched_to_its_end(trained, tmp_path):
    folder = shutil.copytree(trained("sft"), tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in lines if "train_runtime" in line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line is not last))
    (folder / "report.html").unlink()
    found = []
    watching = threading.Thread(target=lambda: found.append(main(["report", str(folder), "--watch", "1"])))
    watching.start()
    while not (folder / "report.html").exists():
        watching.join(0.05)
        assert watching.is_alive()
    assert '<meta http-equiv="refresh" content="1">' in (folder / "report.html").read_text()
    append_metrics(folder / "metrics.jsonl", last)
    watching.join()
    assert found == [0] and "refresh" not in (folder / "report.html").read_text()


def test_what_is_no_run_is_refused(refused, tmp_path):
    assert "is not the folder of a run" in refused("report", tmp_path)
    assert "watch is 0" in refused("report", tmp_path, "--watch", 0)
