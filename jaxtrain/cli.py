"""The command line. Imports of what a command needs stand inside it, so that `--help` answers at
once."""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from jaxtrain.recipe.errors import UserError

HUGE_PAGES = "glibc.malloc.hugetlb=1"


class _Commands(click.Group):
    """`jaxtrain RECIPE …` is `jaxtrain train RECIPE …`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = next((arg for arg in args if not arg.startswith("-")), None)
        if first is not None and first not in self.commands and args[0] == first:
            args = ["train", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Commands, invoke_without_command=True)
@click.version_option(package_name="jaxtrain")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train a language model from a YAML recipe.

    \b
    jaxtrain RECIPE [key=value ...]     train; also --key value
    jaxtrain COMMAND --help             what a command takes
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def train(recipe: Path, overrides: tuple[str, ...], debug: bool) -> None:
    """Train the model of RECIPE; OVERRIDES are key=value or --key value, with dotted keys."""
    from jaxtrain import registry
    from jaxtrain.recipe.resolve import get_config

    config = get_config(recipe, as_overrides(overrides))
    remember_compilations()
    registry.find("trainer", config.type)(config).train()


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option("--batch", type=click.IntRange(min=1), help="Show what this step trains on.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the same as a page.")
@click.option("--devices", type=click.IntRange(min=1), help="Devices of the run, for --batch.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def data(recipe: Path, overrides: tuple[str, ...], debug: bool, **shown: Any) -> None:
    """Prepare the rows of RECIPE and show what is trained and what is masked."""
    from jaxtrain import registry
    from jaxtrain.data.command import show_data
    from jaxtrain.recipe.resolve import get_config
    from jaxtrain.tokenizer import model_files

    config = get_config(recipe, as_overrides(overrides))
    model = model_files(config.model)
    make = registry.find("tokenizer", config.tokenizer.type)
    tokenizer = make(config.tokenizer, model.path).create_tokenizer()
    show_data(config, tokenizer, max_positions=model.max_positions, **shown)


cli.add_command(data, "process-data")


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """`a.b=1` and `--a.b 1` and `--a.b=1`, all as `a.b=1`; UserError for anything else."""
    overrides, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            word = word[2:]
            if "=" not in word:
                if not rest or rest[0].startswith("--"):
                    raise click.UsageError(f"--{word} needs a value")
                word = f"{word}={rest.pop(0)}"
        elif "=" not in word:
            raise click.UsageError(f"{word!r} is no override; write key=value or --key value")
        overrides.append(word)
    return overrides


def main() -> None:
    """Run the command line; a fault of the user is one line and an exit code, no traceback."""
    use_huge_pages()
    debug = "--debug" in sys.argv
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(1)
    except UserError as error:
        if debug:
            raise
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)


def remember_compilations() -> None:
    """Keep compiled programs in the user's cache; jax reads the setting when it is imported."""
    from jaxtrain.assets import cache_folder

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))


def use_huge_pages() -> None:
    """Start this process again with an allocator that asks for huge pages, once.

    A training step on CPU takes much new memory; in 4 KiB pages a tenth of it goes into page
    faults. glibc reads the setting only when a process starts.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc.hugetlb" in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{HUGE_PAGES}".lstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
