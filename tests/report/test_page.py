"""report.html: complete from what is there, closed to what hostile files would do to it."""

import json
import math
import os
import re
from html.parser import HTMLParser

import pytest

from fastalign.errors import DataError, InputError
from fastalign.files import append_metrics, write_json, write_text
from fastalign.report.page import SAMPLES_SHOWN, write_report

ATTACK = "\"'><script>alert(1)</script><img src=http://x.example/p onerror=alert(1)>{{ 7*7 }}</pre></svg>"
SECTIONS = {
    "metrics.jsonl": "Curves",
    "summary.json": "Before and after",
    "samples.jsonl": "Answers before and after",
    "preflight.txt": "Preflight report",
    "run.json": "Configuration",
}


class Page(HTMLParser):
    """Tags, attributes and texts of a page, and that its elements are closed in order."""

    VOID = ("meta", "img")

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.texts, self.headings, self.open = set(), [], [], [], []
        self.feed(self.html)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.texts.append(data)
        if self.open and self.open[-1] in ("h2", "summary"):
            self.headings.append(data)

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


def fill(run_dir, text="plain"):
    """A run folder in which every file is there and every text holds `text`."""
    for step in range(4):
        row = {"step": step, "epoch": step / 2, "time": 100.0 * step, "loss": 0.7 - 0.1 * step, text: step}
        append_metrics(run_dir / "metrics.jsonl", row | {"rewards/chosen": 0.1 * step, "rewards/rejected": -0.1 * step})
    append_metrics(run_dir / "metrics.jsonl", {"step": 3, "eval_loss": 0.5})
    rows = [{"metric": text, "before": 1.0, "after": 2.0, "unit": text, "better": "up"}]
    rows += [{"metric": "x", "before": text, "after": [text], "better": text}]
    summary = {"title": text, "model": text, "dataset": text, "method": text, "rows": rows, "facts": {text: text}}
    write_json(run_dir / "summary.json", summary)
    write_json(run_dir / "run.json", {text: text, "lora": {text: [text], "r": 16}})
    chat = [{"role": text, "content": text}]
    append_metrics(run_dir / "samples.jsonl", {"prompt": chat, "before": text, "after": text, "reference": text})
    write_text(run_dir / "preflight.txt", text)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_every_file_has_its_section(run_dir):
    fill(run_dir)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path)
    assert page.open == []
    assert sorted(page.headings) == sorted([*SECTIONS.values(), "Diagnostics"])
    assert "plain was trained with plain on plain: 3 steps, 1.5 epochs, 5 min 0 s." in page.text


@pytest.mark.parametrize("missing", SECTIONS)
def test_a_missing_file_leaves_out_its_section_alone(run_dir, missing):
    fill(run_dir)
    (run_dir / missing).unlink()
    page = Page(write_report(run_dir))
    diagnostics = ["Diagnostics"] if missing != "metrics.jsonl" else []
    assert sorted(page.headings) == sorted([*({*SECTIONS.values()} - {SECTIONS[missing]}), *diagnostics])


def test_an_empty_folder_gives_a_page_that_says_so(run_dir):
    page = Page(write_report(run_dir))
    assert page.headings == []
    assert "Training run run" in page.text and "No metrics were logged." in page.text


def test_files_are_data_never_markup(run_dir):
    fill(run_dir, "plain")
    usual = Page(write_report(run_dir))
    for name in SECTIONS:
        (run_dir / name).unlink()
    fill(run_dir, ATTACK)
    page = Page(write_report(run_dir))
    assert page.tags == usual.tags
    assert {name for name, _ in page.attributes} == {name for name, _ in usual.attributes}
    assert "49" not in page.text
    assert page.open == []
    # Wherever the plain text stood, the attack stands as text, whole.
    assert page.text.count(ATTACK) == usual.text.count("plain") > 15


def test_a_run_folder_with_a_hostile_name(tmp_path):
    folder = tmp_path / "<script>alert(1)<" / "script>"
    folder.mkdir(parents=True)
    assert "script" not in Page(write_report(folder)).tags


def test_the_page_loads_nothing(run_dir):
    fill(run_dir)
    page = Page(write_report(run_dir))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & page.tags
    assert page.values("src") == page.values("href") == []
    assert all(value.startswith("#") for value in page.values("xlink:href"))
    assert not re.search(r"https?:|//|@import|@font-face|url\((?!#)", page.html.replace("<!DOCTYPE html>", ""))
    (policy,) = (value for value in page.values("content") if "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_names_inside_the_page_are_unique_and_found(run_dir):
    fill(run_dir)
    page = Page(write_report(run_dir))
    names = page.values("id")
    assert len(names) == len(set(names)) > 0
    used = {value[1:] for value in page.values("xlink:href")} | set(re.findall(r"url\(#([^)]*)\)", page.html))
    assert used <= set(names)


def test_the_page_has_both_colour_schemes_and_fits_a_phone(run_dir):
    page = Page(write_report(run_dir))
    blocks = re.findall(r":root \{(.*?)\}", page.html, re.DOTALL)
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in blocks)
    assert light == dark >= {"--paper", "--ink", "--muted", "--grid", "--first", "--second"}
    assert "prefers-color-scheme: dark" in page.html
    assert "width=device-width, initial-scale=1" in page.values("content")


def test_the_same_files_give_the_same_bytes(run_dir):
    fill(run_dir)
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_a_run_without_rewards_has_no_charts_of_them(run_dir):
    for step in range(3):
        append_metrics(run_dir / "metrics.jsonl", {"step": step, "loss": 2.0 - step, "mean_token_accuracy": 0.5})
        append_metrics(run_dir / "metrics.jsonl", {"step": step, "eval_mean_token_accuracy": 0.4, "eval_runtime": 2.0})
        append_metrics(run_dir / "metrics.jsonl", {"step": step, "eval_model_preparation_time": 0.1})
    append_metrics(
        run_dir / "metrics.jsonl", {"step": 2, "train_runtime": 9.0, "train_loss": 1.0, "total_flos": 1e12, "once": 1}
    )
    page = Page(write_report(run_dir))
    assert page.html.count("<figure>") == 2
    assert "Loss" in page.text and "mean_token_accuracy" in page.text
    assert "Reward" not in page.text and "KL" not in page.text and "train_" not in page.text
    assert "once" not in page.text and "time" not in page.text


def test_a_diverged_run_says_where(run_dir):
    for step, loss in enumerate([0.7, 0.6, math.nan, math.inf]):
        append_metrics(run_dir / "metrics.jsonl", {"step": step, "loss": loss, "grad_norm": math.nan})
    page = Page(write_report(run_dir))
    assert "train: 2 of 4 values are not finite, the first at step 2" in page.text
    assert "train: 4 of 4 values are not finite, the first at step 0" in page.text
    assert page.html.count("<svg") == 1


def test_a_run_killed_while_writing(run_dir):
    fill(run_dir)
    whole = write_report(run_dir).read_bytes()
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run_dir / name).open("ab") as file:
            file.write(b'{"step": 4, "loss": 0.\xe2\x82')
    assert write_report(run_dir).read_bytes() == whole


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_damaged_file_is_named_and_the_old_page_stays(run_dir, name):
    fill(run_dir)
    whole = write_report(run_dir).read_bytes()
    (run_dir / name).write_text('{"title": ')
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == whole


def test_a_failed_write_leaves_the_old_page_and_no_other_file(run_dir, monkeypatch):
    fill(run_dir)
    whole, files = write_report(run_dir).read_bytes(), sorted(run_dir.iterdir())
    write_text(run_dir / "preflight.txt", "new")

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == whole
    assert sorted(run_dir.iterdir()) == files


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "summary",
    [
        {"rows": None, "facts": None},
        {"rows": [None, 3, {}], "facts": [1]},
        {"rows": {"a": 1}, "title": 7, "model": ["a", "b"], "dataset": {"x": 1}},
        {"rows": [{"metric": None, "before": "NaN", "after": True, "better": "up", "unit": 3}]},
    ],
)
def test_an_unusual_summary_is_shown_as_far_as_it_goes(run_dir, summary):
    write_json(run_dir / "summary.json", summary)
    assert Page(write_report(run_dir)).open == []


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ({"before": 1, "after": 2, "better": "up"}, "+1 ✓ better"),
        ({"before": 1, "after": 2, "better": "down"}, "+1 ✗ worse"),
        ({"before": 2, "after": 1, "better": "down"}, "\N{MINUS SIGN}1 ✓ better"),
        ({"before": 2, "after": 2, "better": "down"}, "0 = same"),
        ({"before": 1, "after": 2, "better": None}, "+1"),
        ({"before": None, "after": 2, "better": "up"}, "\N{EN DASH}"),
        ({"before": 1, "after": math.nan, "better": "up"}, "\N{EN DASH}"),
    ],
)
def test_the_table_says_what_got_better(run_dir, row, verdict):
    write_json(run_dir / "summary.json", {"rows": [row | {"metric": "M"}]})
    text = Page(write_report(run_dir)).text
    assert text.split(" No metrics")[0].strip().endswith(verdict)


def test_a_change_that_is_not_finite_is_no_verdict(run_dir):
    (run_dir / "summary.json").write_text('{"rows": [{"metric": "M", "before": 1.5, "after": NaN, "better": "up"}]}')
    assert "1.5 NaN NaN No metrics" in Page(write_report(run_dir)).text


def test_the_first_samples_are_shown_and_the_rest_counted(run_dir):
    for index in range(SAMPLES_SHOWN + 3):
        append_metrics(run_dir / "samples.jsonl", {"prompt": f"prompt-{index}.", "after": "one two"})
    page = Page(write_report(run_dir))
    assert f"prompt-{SAMPLES_SHOWN - 1}." in page.text and f"prompt-{SAMPLES_SHOWN}." not in page.text
    assert f"The first {SAMPLES_SHOWN} of {SAMPLES_SHOWN + 3}" in page.text
    assert "After · 2 words" in page.text and "Before ·" not in page.text


def test_text_that_has_no_utf8(run_dir):
    append_metrics(run_dir / "samples.jsonl", {"prompt": "x", "after": "\ud83d cut\x00\x1b"})
    (run_dir / "preflight.txt").write_bytes(b"caf\xe9")
    assert r"\ud83d cut" in Page(write_report(run_dir)).text


def test_what_a_diagnostic_quotes_is_data_too(run_dir):
    fill(run_dir)
    row = {"step": 3, "not_finite": "loss", "prompt": ATTACK[:50]}
    (run_dir / "nonfinite_rows.jsonl").write_text(json.dumps(row) + "\n")
    page = Page(write_report(run_dir))
    assert (
        "Loss or gradient is not finite" in page.text and "<script>" in page.text and "At step 3 the loss" in page.text
    )
    assert not {"script", "img"} & {*page.tags}
