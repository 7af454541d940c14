"""Options of a task that runs after saves, beside the training; see train/tasks.py."""

import difflib
import re
import shlex
from typing import Any, Literal

from pydantic import field_validator, model_validator

from megatron_taipan.section import Section, option

PLACEHOLDERS = ("checkpoint", "step", "out")  # of commands and arguments, in braces
PLACEHOLDER = re.compile(r"(?<!\$)\{(\w+)\}")  # a shell has ${NAME} of its own


class TaskConfig(Section):
    """One task: what runs, on which of the run's checkpoints, with what."""

    name: str = option(
        ...,
        "letters, digits, . _ and -, at most 100; checkpoint.dir/tasks/NAME is its folder",
        pattern=r"^[A-Za-z0-9][\w.-]*$",
        max_length=100,  # a file system takes 255 bytes
    )
    every: int | None = option(
        None,
        "steps between its turns, a multiple of checkpoint.save_every or save_weights_every; null: after every save;"
        " the run's last checkpoint is always a turn",
        ge=1,
    )
    evaluation: Literal["perplexity", "retrieval", "qa", "zero-shot", "recall_tokens", "latency"] | None = option(
        None,
        "perplexity, retrieval (passkey and others), qa, zero-shot, recall_tokens or latency: python -m"
        " megatron_taipan.evaluation THIS CHECKPOINT ARGS --out OUT, whose table goes into the log",
    )
    args: list[str] = option([], "of the evaluation, a list or a line; placeholders as in command")
    command: str | None = option(
        None,
        "instead of an evaluation: a shell command with {checkpoint}, and {step} and {out} if it wants them, filled in"
        " quoted; a last line of its output that is a JSON object of numbers goes into the log",
    )
    device: str = option(
        "cpu", "cpu: it sees no GPU; cuda:N: it sees GPU N of the host alone", pattern=r"^(cpu|cuda:\d+)$"
    )
    threads: int = option(1, "OMP_NUM_THREADS of the task", ge=1)
    timeout_s: float = option(3600.0, "seconds after which it is ended, with an alarm", gt=0)
    wait_s: float = option(600.0, "seconds that a run which has finished waits for it", ge=0)

    @field_validator("args", mode="before")
    @classmethod
    def _line(cls, value: Any) -> Any:
        """A line is split as a shell would; numbers of a list are taken as text."""
        if isinstance(value, str):
            return shlex.split(value)
        return [str(v) if isinstance(v, int | float) else v for v in value] if isinstance(value, list) else value

    @field_validator("name", "command", "args")
    @classmethod
    def _can_be_passed_on(cls, value: Any) -> Any:
        """What no program can be given would fail at every turn."""
        for text in [value] if isinstance(value, str) else value or []:
            if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"{text[:100]!r} has a zero byte or half a surrogate pair, which no command can have")
        return value

    @model_validator(mode="after")
    def _one_program(self) -> "TaskConfig":
        if (self.evaluation is None) == (self.command is None):
            raise ValueError(f"task {self.name} needs either `evaluation` or `command`, and has {self._has()}")
        if self.command is not None and self.args:
            raise ValueError(f"task {self.name}: args belong to an evaluation; write them into the command")
        if self.command is not None and "checkpoint" not in PLACEHOLDER.findall(self.command):
            raise ValueError(
                f"task {self.name}: its command has no {{checkpoint}}, so it would read none; put {{checkpoint}} where"
                " the path belongs"
            )
        if any(arg == "--out" or arg.startswith("--out=") for arg in self.args):
            raise ValueError(f"task {self.name}: the run gives --out, where it reads the results; leave it out")
        for text in (*self.args, self.command or ""):
            for word in PLACEHOLDER.findall(text):
                if word not in PLACEHOLDERS and (near := difflib.get_close_matches(word.lower(), PLACEHOLDERS)):
                    raise ValueError(f"task {self.name}: {{{word}}} is not a placeholder; did you mean {{{near[0]}}}?")
        return self

    def _has(self) -> str:
        return "neither" if self.evaluation is None else "both"

    def check_cadence(self, save_every: int, save_weights_every: int) -> None:
        """Refuses turns at whose steps no checkpoint is written; 0 stands for no cadence.

        Raises:
            ValueError: with the numbers.
        """
        if self.every is None or any(c and self.every % c == 0 for c in (save_every, save_weights_every)):
            return
        raise ValueError(
            f"task {self.name}: every={self.every} is a multiple neither of checkpoint.save_every={save_every} nor of"
            f" checkpoint.save_weights_every={save_weights_every}, so there would be no checkpoint at its turns; choose"
            " a multiple of one that is not 0, or leave it out for a turn after every save"
        )


def meaning_of_tasks() -> str:
    """Every option of a task with its default, for `--help`."""
    fields = TaskConfig.model_fields.items()
    defaults = {n: "required" if f.is_required() else "null" if f.default is None else f.default for n, f in fields}
    each = (f"{name} [{defaults[name]}]: {f.description}" for name, f in fields)
    return "a list of tasks that run after saves beside the training, rank 0 starts them; each has " + "; ".join(each)
