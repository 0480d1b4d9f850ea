"""Commands that say what there is (losses, models, recipes), and convert."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from limbeck._cli_judge import no_such, refuse
from limbeck._cli_run import print_json
from limbeck._cli_show import table
from limbeck.errors import Problem, UsageError, listed, nearest


def losses(
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False, help="Show all about this loss.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/losses.md: all about all of them.")] = False,
) -> None:
    """The losses, and when to use each.

    NAME shows the formula, the parameters and a piece of a recipe.
    """
    from limbeck.losses import LOSSES
    from limbeck.losses import _described as words

    if markdown and name is not None:
        raise UsageError(Problem("--markdown", f"takes no name beside it, got '{name}'."))
    if markdown:
        print(words.page(), end="")
        return
    if name is None:
        table(words.COLUMNS, words.overview())
        return
    if name not in LOSSES:
        raise UsageError(Problem("", f"there is no loss '{name}'; there are {listed(list(LOSSES))}.", nearest(name, LOSSES)))
    entry = LOSSES[name]
    text = words.described(entry).replace("``", "")
    print(f"{entry.name}: {entry.summary}\n\n{text}\n\nNeeds: {entry.needs}.\nCost a step: {entry.cost}\nPaper: {entry.source}\n")
    table(("parameter", "default", "allowed"), words.parameters(entry))
    print(f"\nIn a recipe:\n\n{words.snippet(entry)}", end="")


def models() -> None:
    """The names of models, and when to use each."""
    from limbeck.models import known_models

    table(("name", "what it is", "when to use it"), [(str(a), str(b), str(c)) for a, b, c in known_models()])


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False, help="Print this recipe.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe file, for editors.")] = False,
    of_papers: Annotated[
        bool, typer.Option("--published", help="List the recipes of papers: PAIR/METHOD, with what was reported.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --published: print docs/published.md.")] = False,
) -> None:
    """Recipes to start from, and those of papers.

    `limbeck recipes NAME > my.yaml` starts a recipe. For completion and checks while typing, run `limbeck recipes --schema >
    limbeck.schema.json` beside it; its first line names that file to the editor. A recipe of a paper can be run by its name:
    `limbeck distill cifar100-resnet32x4-resnet8x4/dkd --data npz:cifar100.npz`.
    """
    for option, given in (("--schema", schema), ("--published", of_papers)):
        if given and name is not None:
            raise UsageError(Problem(option, f"takes no name beside it, got '{name}'."))
    if schema and of_papers:
        raise UsageError(Problem("--schema", "and --published print different things; give one."))
    if markdown and not of_papers:
        raise UsageError(Problem("--markdown", "is for --published."))
    if schema:
        from limbeck.reading import json_schema

        print_json(json_schema())
        return
    ready = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
    if of_papers:
        from limbeck import _published_show as show

        if markdown:
            print(show.page(), end="")
        else:
            table(show.COLUMNS, show.rows())
    elif name is None:
        papers = ("PAIR/METHOD", "To compare with the figures of a paper: `limbeck recipes --published` lists them.")
        table(("recipe", "when to use it"), [*((key, _first_comment(path)) for key, path in ready.items()), papers])
    elif name.removesuffix(".yaml") in ready:
        print("# yaml-language-server: $schema=limbeck.schema.json")
        print(ready[name.removesuffix(".yaml")].read_text(encoding="utf-8"), end="")
    elif "/" in name:
        from limbeck import _published_show as show

        found = show.text(name)
        print("# yaml-language-server: $schema=limbeck.schema.json")
        print(found, end="")
    else:
        raise UsageError(Problem("", f"there is no recipe '{name}'; there are {listed(list(ready))}.", nearest(name, ready)))


def convert(
    source: Annotated[str, typer.Argument(metavar="FILE.pth", show_default=False, help="A foreign .pt, .pth, .bin or .ckpt file.")],
    target: Annotated[str, typer.Argument(metavar="OUT.safetensors", show_default=False)],
    key: Annotated[str | None, typer.Option("--key", metavar="NAME", help="The entry of the file that holds the weights.")] = None,
) -> None:
    """Turn foreign .pth weights into safetensors.

    The one command that opens a pickle, and weights only.
    """
    problems = []
    if not os.path.isfile(source):
        problems.append(no_such(Path(source), "file"))
    if Path(target).suffix != ".safetensors":
        problems.append(Problem("", f"got the target '{target}', expected a name that ends in .safetensors."))
    refuse(problems)
    from limbeck.convert import convert as convert_file

    convert_file(Path(source), Path(target), key=key)


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
