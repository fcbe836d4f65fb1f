"""Ctrl-C and SIGTERM stop a run without losing a step that was made.

The first signal lets the optimiser step finish, saves a checkpoint and ends training. The second signal stops at once,
as if nothing had handled the first one.

Only the main thread of a process can handle signals. Training in another thread is therefore left as it is.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from fastalign.data.processes import is_lost_process, largest_of_processes
from fastalign.errors import TrainingError
from fastalign.models.adapters import has_adapter
from fastalign.models.reward import is_reward_model
from fastalign.report.page import write_report

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends training once a signal has arrived.

    Args:
        trainer: The trainer, whose processes must all stop after the same step.

    Attributes:
        received: The signal that arrived in this process while training ran; None if there was none. With several
            processes only `agreed` may decide what is done next, because all of them have to do the same.
        saved: Whether training has ended because of that signal, with everything saved.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self.saved = False
        self.saved_step = -1  # the step of the last checkpoint
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def handling(self) -> Iterator[None]:
        """A context in which the first signal is noted. Afterwards the handlers are again those from before.

        A signal that the process ignores (as under nohup) stays ignored.
        """
        self.received, self._agreed, self.saved, self.saved_step = None, None, False, -1
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):  # None: a handler that was not set from Python
                self._before[number] = before
                signal.signal(number, self._handle)
        try:
            yield
        finally:
            self._restore()

    def pass_on(self) -> None:
        """Gives the signal to the handler from before: by default KeyboardInterrupt, or the exit status 143."""
        assert self.received is not None, "there is a signal to pass on"
        handler = signal.getsignal(self.received)
        if callable(handler):
            handler(self.received, None)
        else:
            raise SystemExit(128 + self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()  # so that the second signal stops at once
        # Not by `print`: the signal may have arrived inside another print, which cannot be entered twice.
        text = f"\n{self.received.name}: finishing this step, then saving. A second signal stops at once.\n"
        if self.trainer.args.should_log:
            with suppress(OSError):  # a terminal that is gone is no reason to lose the run
                os.write(2, text.encode())

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    # Callbacks of the Trainer

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for a checkpoint and for the end of training, if a signal has arrived."""
        if self.agree() is not None:
            self._stop(control)

    def on_evaluate(self, args, state, control, **kwargs):
        """The same after an evaluation, so that a signal in one does not wait for another step."""
        if self.agree() is not None:
            self._stop(control)

    def on_save(self, args, state, control, **kwargs):
        """Notes which step is saved."""
        self.saved_step = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        """An epoch that is left early is no whole one: what is due at its end, such as an evaluation, is not."""
        if self.agreed is not None and self.saved_step == state.global_step:
            control.should_save = control.should_evaluate = False

    def _stop(self, control: Any) -> None:
        control.should_save = control.should_training_stop = True

    @property
    def agreed(self) -> signal.Signals | None:
        """The signal that all processes know of; None if there is none."""
        return self.received if self.trainer.args.world_size <= 1 else self._agreed

    def agree(self) -> signal.Signals | None:
        """Lets every process know of a signal that arrived in any of them; returns it. All processes must call it."""
        if self.trainer.args.world_size > 1:
            number = torch.tensor(self.received or 0, device=self.trainer.args.device)
            number = int(largest_of_processes(number))
            self._agreed = signal.Signals(number) if number else None
            self.received = self.received or self._agreed
        return self.agreed


class StoppableRuns(Trainer):
    """The part of `AlignmentTrainer` that ends training at a signal, with everything saved.

    Attributes:
        stopping: The callback that notes signals.
        how_to_go_on: What is printed as the way to go on after a stop.
    """

    model: torch.nn.Module  # wider in transformers.Trainer
    stopping: StopOnSignal
    how_to_go_on = "trainer.train(resume_from_checkpoint=True)"

    def train(self, *args, **kwargs):
        """`transformers.Trainer.train`. After a signal everything is saved, then the signal is raised anew.

        Raises:
            KeyboardInterrupt: Ctrl-C, after a checkpoint, the model and the report were saved.
            SystemExit: SIGTERM, likewise; its status is 143.
            TrainingError: Another process that trains with this one is gone.
        """
        with self.stopping.handling():
            try:
                output = super().train(*args, **kwargs)
            except RuntimeError as error:
                if not is_lost_process(error):
                    raise
                raise TrainingError(
                    f"Another process stopped or did not answer at step {self.state.global_step + 1}, so process "
                    f"{self.args.process_index} stops too: mend what that one says, then go on with "
                    "resume_from_checkpoint=last."
                ) from error
            if self.stopping.agree() is not None:
                self._save_stopped()
        if self.stopping.received is not None:
            self.stopping.pass_on()
        return output

    def _save_stopped(self) -> None:
        """Saves what a run leaves: a checkpoint unless this step has one, the model, and the report."""
        received, state, folder = self.stopping.agreed, self.state, Path(str(self.args.output_dir))
        if self.stopping.saved_step != state.global_step:
            self._save_checkpoint(self.model, None)
        self.save_model(str(model_folder(folder, self.model)))
        if self.is_world_process_zero() and received is not None:
            write_report(folder)
            print(
                f"Stopped by {received.name} after step {state.global_step} of {state.max_steps}; everything is saved "
                f"in {folder}. To go on:\n  {self.how_to_go_on}",
                flush=True,
            )
        self.stopping.saved = True


def model_folder(run_folder: Path, model: torch.nn.Module) -> Path:
    """Where a run leaves its model: an adapter in the run folder, a whole model in a folder inside.

    The many files of a whole model would hide the report among them.
    """
    adapter_alone = has_adapter(model) and not is_reward_model(model)  # a reward model is saved with it merged
    return run_folder if adapter_alone else run_folder / "model"
