"""`fastalign chat RUN`: a conversation with a model, on the terminal or line by line through a pipe."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from fastalign.cli.generate import add_sampling, check_sampling
from fastalign.errors import ModelError, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELP = "/new starts again, /undo takes back the last question, /quit or Ctrl-D ends"


def add(commands: Any) -> None:
    """Adds `chat` to the parser's commands."""
    parser = commands.add_parser("chat", help="talk with the model of a run, or any other")
    parser.add_argument("model", help="a run folder, or a model as for training")
    parser.add_argument("--system", metavar="TEXT", help="the system turn that the conversation starts with")
    add_sampling(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Reads questions until the input ends, and writes an answer to each."""
    check_sampling(args)

    import torch

    from fastalign.models.runs import load_run

    model, tokenizer = load_run(args.model, dtype=args.dtype)
    if not tokenizer.chat_template and not args.plain:
        raise ModelError(
            f"The tokenizer of {args.model} has no chat template: use --plain, which continues the text of the "
            "conversation, or `fastalign generate --plain`."
        )
    torch.manual_seed(args.seed)
    chat = Conversation(model, tokenizer, args)
    terminal = sys.stdin.isatty()
    if terminal:
        print(_HELP)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            break
        if line.strip() == "/quit":
            break
        if not chat.command(line.strip()) and line.strip():
            chat.ask(line)
    return 0


class Conversation:
    """The turns so far, and what answers the next one.

    Args:
        model: on its device.
        tokenizer: the model's tokenizer.
        args: the arguments of the command.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.start = [{"role": "system", "content": args.system}] if args.system else []
        self.turns: list[dict[str, str]] = []

    def command(self, line: str) -> bool:
        """Runs a line that is a command; False if it is none."""
        if line == "/new":
            self.turns = []
        elif line == "/undo":
            self.turns = self.turns[:-2]
        elif line == "/help":
            print(_HELP)
        else:
            return False
        return True

    def ask(self, question: str) -> None:
        """Answers a question, and prints the answer while it is made."""
        from transformers import TextStreamer

        from fastalign.rollout.in_process import generate

        class Printed(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False):
                print(printable(text), flush=True, end="\n" if stream_end else "")

        self.turns.append({"role": "user", "content": question})
        ids = self._fit()
        streamer = Printed(self.tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        (answer,) = generate(
            self.model, self.tokenizer, [ids], max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.temperature or None, streamer=streamer,
        )  # fmt: skip
        text = str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()
        self.turns.append({"role": "assistant", "content": text})

    def _fit(self) -> list[int]:
        """The tokens of the conversation. The oldest turns are dropped where the model has no room for all."""
        from fastalign.models.fit import positions_of

        room, dropped = positions_of(self.model) - self.args.max_new_tokens, 0
        while len(ids := self._encode()) > room and len(self.turns) > 1:
            self.turns = self.turns[2:]
            dropped += 2
        if dropped:
            print(f"(the {dropped} oldest turns are left out: the model has no room for them)", file=sys.stderr)
        if len(ids) > room:
            raise ModelError(
                f"The question has {len(ids):,} tokens, which leaves no room for an answer of "
                f"{self.args.max_new_tokens}: ask something shorter, or lower --max-new-tokens."
            )
        return ids

    def _encode(self) -> list[int]:
        from fastalign.data.prompts import Prompt, encode_prompt

        if self.args.plain:
            text = "\n".join(turn["content"] for turn in (*self.start, *self.turns))
            return encode_prompt(Prompt(text + "\n"), self.tokenizer, plain=True)
        return encode_prompt(Prompt([*self.start, *self.turns]), self.tokenizer)
