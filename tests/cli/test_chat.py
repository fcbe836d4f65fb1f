"""`fastalign chat`: a conversation through a pipe, with its history, and within the model's positions."""

from __future__ import annotations

import io
from argparse import Namespace

import pytest

from fastalign.cli.chat import Conversation
from fastalign.cli.main import main
from fastalign.data.prompts import Prompt, encode_prompt
from fastalign.rollout.in_process import generate


@pytest.fixture
def say(monkeypatch, capsys):
    """f(lines, *argv): what the command prints for piped lines."""

    def say(lines, *argv):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        capsys.readouterr()
        assert main(["chat", *map(str, argv)]) == 0
        return capsys.readouterr()

    return say


@pytest.fixture
def conversation(tiny_llama, tokenizer):
    def conversation(**over):
        args = {"system": None, "plain": False, "max_new_tokens": 5, "temperature": 0.0, **over}
        return Conversation(tiny_llama().eval(), tokenizer, Namespace(**args))

    return conversation


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_a_run_answers_piped_questions(trained, say, name):
    lines = ["Name a colour.", "", "Another one?", "/quit", "not read"]
    first = say(lines, trained(name), "--max-new-tokens", 4).out
    assert len(first) > 2 and first == say(lines, trained(name), "--max-new-tokens", 4).out
    assert say(["/help", "/new"], trained(name)).out == "/new starts again, /undo takes back the last question, " + (
        "/quit or Ctrl-D ends\n"
    )


def test_questions_are_answered_in_the_light_of_what_was_said(conversation, tiny_llama, tokenizer):
    chat = conversation(system="Be brief.")
    chat.ask("Name a colour.")
    chat.ask("Another one?")
    turns = [{"role": "system", "content": "Be brief."}, *chat.turns]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    ids = encode_prompt(Prompt(turns[:-1]), tokenizer)
    (expected,) = generate(tiny_llama(), tokenizer, [ids], max_new_tokens=5)
    assert turns[-1]["content"] == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert chat.command("/undo") and len(chat.turns) == 2
    assert chat.command("/new") and not chat.turns
    assert not chat.command("/unknown")


def test_the_oldest_turns_make_room(conversation, capsys):
    chat = conversation()
    for _ in range(6):
        chat.ask("What about this and that? " * 2)
    assert len(chat.turns) < 12 and "oldest turns are left out" in capsys.readouterr().err
    chat.ask("x" * 150)
    assert len(chat.turns) <= 4


def test_what_has_no_room_or_no_template_is_refused(conversation, refused, model_dir, tmp_path, monkeypatch, tiny_llama,
                                                    tokenizer):  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 300 + "\n"))
    assert "leaves no room" in refused("chat", model_dir)
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    tiny_llama().save_pretrained(tmp_path / "bare")
    bare.save_pretrained(tmp_path / "bare")
    assert "has no chat template" in refused("chat", tmp_path / "bare")


def test_control_characters_are_shown_not_obeyed(conversation, capsys, monkeypatch):
    chat = conversation()
    monkeypatch.setattr(type(chat.tokenizer), "decode", lambda *args, **kwargs: "a\x1b[2Jb\n")
    chat.ask("Name a colour.")
    assert "\x1b" not in capsys.readouterr().out
