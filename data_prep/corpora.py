"""Corpora by name: what `tokenize --recipe` reads, and which of them models are measured on."""

import argparse
import re

from data_prep.extract import form_given
from megatron_taipan.errors import UserError

# Last parts of the hub names under which lm-evaluation-harness 0.4.13 and the literature on recall (arXiv 2402.18668)
# load what the paper reports: copies keep them, whoever the owner is.
EVALUATION_SETS = {
    **dict.fromkeys(("ai2_arc", "boolq", "hellaswag", "openbookqa", "piqa", "race"), "a zero-shot task"),
    **dict.fromkeys(("super_glue", "truthful_qa", "truthfulqa_mc", "winogrande"), "a zero-shot task"),
    **dict.fromkeys(("squad", "squad_v2", "based-squad"), "questions on a text"),
    **dict.fromkeys(("swde", "based-swde", "based-swde-v2", "fda", "based-fda"), "values to extract from a text"),
    **dict.fromkeys(("drop", "natural_questions", "nq_open", "trivia_qa"), "questions on a text"),
}
ON_THE_HUB = re.compile(r"(?:hub:|hf://datasets/)([^:@]+)")


def inputs_of(args: argparse.Namespace) -> list[str]:
    """`--input`, or the source of `--recipe` where it is not given; a line says which of them is read, and what comes
    before the recipe's form of the text.

    Raises:
        UserError: neither says what to read.
    """
    if not args.recipe:
        if args.input:
            return args.input
        raise UserError("nothing to read: give --input, or --recipe NAME (`data_prep recipes` lists them)")
    from data_prep.recipes import load_recipe  # here, because a start without one need not read YAML

    recipe = load_recipe(args.recipe)
    given = form_given(args)
    text = f"; the text is what {given} says, and not the recipe" if given else ""
    if args.input:
        print(f"recipe {args.recipe}: reads --input, and not its source {recipe.source}{text}")
        return args.input
    if recipe.input is None:
        raise UserError(f"recipe {args.recipe} has no source that can be read ({recipe.source}); give --input")
    print(f"recipe {args.recipe}: reads {recipe.input} (licence: {recipe.licence}){text}")
    return [recipe.input]


def refuse_evaluation_data(args: argparse.Namespace) -> None:
    """Stops where a recipe or an input names a set that models are measured on, but with --allow-evaluation-data, where
    a line says so.

    Raises:
        UserError: it does.
    """
    named = {name: found for name in args.input or [] if (found := evaluation_set(name))}
    template = ""
    if args.recipe:
        from data_prep.recipes import EVALUATION, load_recipe

        recipe = load_recipe(args.recipe)
        if recipe.purpose == EVALUATION:
            named = {f"--recipe {args.recipe}": recipe.name}
            template = f"; text of your own in its form needs no recipe: --template {recipe.template!r}"
    if not named:
        return
    name, found = next(iter(named.items()))
    if not args.allow_evaluation_data:
        raise UserError(
            f"{name}: {found} is a set that models are measured on, and what a model has seen in training measures"
            f" nothing; give --allow-evaluation-data if its results on it are not to be reported{template}"
        )
    print(
        f"{name}: {found} is a set that models are measured on; do not report results on it of a model trained on this"
    )


def evaluation_set(name: str) -> str:
    """The set that an input of the hub is, in words; empty where it is none that is known."""
    found = ON_THE_HUB.match(name)
    last = found[1].split("/")[:2][-1].lower() if found else ""
    return f"{last} ({EVALUATION_SETS[last]})" if last in EVALUATION_SETS else ""
