"""`python -m megatron_taipan.evaluation TASK MODEL ...`: what a trained model can do, one task after another.

    python -m megatron_taipan.evaluation                  the tasks
    python -m megatron_taipan.evaluation TASK --help      what one of them takes

A task is a module beside this one with `main(arguments)`, and runs by its own name too (`python -m` and the module).
Tasks that measure take several models, print a table, and with `--out FOLDER` write it as Markdown, JSON and a picture
(passkey takes one and only prints: retrieval --kinds passkey does the rest).
perplexity shares long contexts out over the processes that torchrun or srun start; the others run as one process.
"""

import sys
from importlib import import_module

from megatron_taipan.errors import UserError
from megatron_taipan.programs import exits_cleanly

TASKS = {  # command: what it answers, as the list of tasks prints it
    "perplexity": "how well is held-out text predicted",
    "passkey": "is a number found again in a long text",
    "retrieval": "are numbers, sentences and words found again, by length and depth",
    "qa": "are questions answered from their context: SQuAD, SWDE, FDA, DROP, TriviaQA, NQ",
    "zero-shot": "the nine multiple-choice tasks of the paper, by lm-eval",
    "calibrate": "set the gates' thresholds so that a wanted share of the tokens is selected",
    "selection": "which tokens do the selective layers select",
    "recall_tokens": "how well are tokens predicted that the text has shown before, by their distance",
    "latency": "how long do prefill and a decoded token take, and how much memory, by length of the context",
    "curves": "how did training go: loss and selected share by step, from the runs' logs",
    "report": "all results of a folder in one HTML page, with the models' sizes, memory and operations by part",
}


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """Runs one task, with the arguments after its name."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"    {task:<16}{answers}" for task, answers in TASKS.items()))
        return 0
    task, *rest = given
    if task not in TASKS:
        raise UserError(f"{task!r} is not a task; the tasks are {', '.join(TASKS)}")
    return import_module(f"megatron_taipan.evaluation.{task.replace('-', '_')}").main(rest)


if __name__ == "__main__":
    done = main()
    from megatron_taipan.parallel.processes import finish  # imported late: the list of tasks needs no torch

    finish(done)
