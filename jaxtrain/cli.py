"""The command line. Imports of what a command needs stand inside it, so that `--help` answers at
once."""

import gc
import json
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from jaxtrain.environment import describe, prepare_jax, set_flags
from jaxtrain.explain import explain_error, raise_user_errors
from jaxtrain.recipe.errors import UserError, did_you_mean, printable
from jaxtrain.recipe.strangers import COMMANDS
from jaxtrain.signals import ended_by_signals, ignore_signals

COLOURS = {"same": "green", "mapped": "cyan", "no effect": "yellow", "refused": "red"}
YAML = (".yaml", ".yml")
HUGE_PAGES = "glibc.malloc.hugetlb=1"
BEGAN = time.perf_counter()
GC_THRESHOLD = 50_000
"""New objects after which Python looks for garbage. What is imported stays: to look through it
again and again, after 700 as by default, takes a second of a start."""


class _Commands(click.Group):
    """`jaxtrain RECIPE …` is `jaxtrain train RECIPE …`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else "-"
        if not first.startswith("-") and first not in self.commands:
            if not (Path(first).suffix or Path(first).exists()):
                nearest = COMMANDS.get(first, "")
                help = f"; {nearest}" if nearest else did_you_mean(first, self.commands)
                raise click.UsageError(f"no command and no recipe is called {first!r}{help}")
            args = ["train", *args]
        return super().parse_args(ctx, args)


LAUNCHER = """
    hostfile include exclude no_ssh no_ssh_check no_local_rank no_python module force_multi
    launcher_args save_pid ssh_port enable_each_rank_log autotuning elastic_training
    bind_cores_to_rank bind_core_list num_nodes node_rank master_addr master_port
"""
"""Flags of DeepSpeed's launcher that would ask for more than a process with its own devices."""


def _checked_launcher(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value == "ray" or (value is None and os.environ.get("USE_RAY") == "1"):
        raise click.UsageError("Ray is not supported: start one process per host")
    if value is not None:
        click.echo("no effect  --launcher: a run is one process with the devices of its host")
    return value


class _NewPath(click.Path):
    """A file or folder that can be made, and is not there; known before a model is read."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path.exists():
            self.fail(f"{path} exists already; name a new one", param, ctx)
        from jaxtrain.files import why_unwritable

        if why := why_unwritable(path):
            self.fail(f"{path}: {why}", param, ctx)
        return path


def _on_devices(command: Any) -> Any:
    """The flags of DeepSpeed's launcher that mean something here."""
    launcher = click.option(
        "--launcher", type=click.Choice(["deepspeed", "ray"]), callback=_checked_launcher,
        expose_value=False, help="No effect: there is no launcher.",
    )  # fmt: skip
    devices = click.IntRange(min=1)
    return click.option("--num_gpus", type=devices, help="Use the first so many devices.")(
        launcher(command)
    )


def _of_recipe(command: Any) -> Any:
    """A command that reads a recipe, with overrides."""
    debug = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
    overrides = click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
    recipe = click.argument("recipe", type=click.Path(path_type=Path))
    accept_any = cli.command(context_settings={"ignore_unknown_options": True})
    return accept_any(recipe(overrides(debug(command))))


@click.group(cls=_Commands, invoke_without_command=True)
@click.version_option(package_name="jaxtrain")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train a language model from a YAML recipe.

    \b
    jaxtrain RECIPE [key=value ...]     train; also --key value, del:key
    jaxtrain COMMAND --help             what a command takes
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@_of_recipe
@click.option(
    "--allow-change", "allowed", multiple=True, metavar="KEY",
    help="Resume though this key of the recipe has changed and the state may not fit it.",
)  # fmt: skip
@click.option(
    "--python_profile", type=click.Choice(["tottime", "cumtime", "disable"]), default="disable",
    help="At the end, print where this process's Python code spent its time, in this order.",
)  # fmt: skip
@_on_devices
@ended_by_signals()
def train(
    recipe: Path,
    overrides: tuple[str, ...],
    allowed: tuple[str, ...],
    python_profile: str,
    num_gpus: int | None,
) -> None:
    """Train the model of RECIPE; OVERRIDES are key=value or --key value, with dotted keys."""
    use_huge_pages()
    from jaxtrain.recipe.resolve import resolve

    resolved = resolve(recipe, as_overrides(overrides))
    config = resolved.require_config()
    for line in resolved.report.unheeded():
        click.echo(line)

    prepare_jax()
    from jaxtrain import registry
    from jaxtrain.parallel.mesh import first_devices
    from jaxtrain.preflight import all_faults_at_once

    if python_profile != "disable":
        print_profile(python_profile)
    with raise_user_errors(config):
        cls = registry.find("trainer", config.type)
        import_s = time.perf_counter() - BEGAN
        with all_faults_at_once(resolved, num_gpus):
            trainer = cls(config, devices=first_devices(num_gpus) if num_gpus else None)
        trainer.allowed_changes, trainer.console.spent_s["import"] = allowed, import_s
        trainer.train()


@_of_recipe
@click.option("--dump-config", is_flag=True, help="Print the recipe with every default filled in.")
@click.option("--online", is_flag=True, help="Ask the hub for the model and data it names, too.")
@_on_devices
def check(
    recipe: Path, overrides: tuple[str, ...], dump_config: bool, online: bool, num_gpus: int | None
) -> None:
    """Say everything that is wrong with RECIPE, what became of its keys, and the run it asks for.

    Opens no device, fetches nothing, writes nothing.
    """
    from jaxtrain.recipe.check import describe
    from jaxtrain.recipe.dump import to_yaml
    from jaxtrain.recipe.resolve import resolve

    resolved = resolve(recipe, as_overrides(overrides))
    given = ""
    if online and resolved.config is not None:
        from jaxtrain.recipe.online import check_access

        given, faults = check_access(resolved.config)
        resolved = resolved.with_faults(faults)
    if dump_config:
        click.echo(to_yaml(resolved.require_config()), nl=False)
        return
    if resolved.config is not None:
        from jaxtrain.preflight import find_faults

        resolved = resolved.with_faults(find_faults(resolved.config, num_gpus))
    if resolved.faults:
        click.echo(f"{printable(str(resolved.error))}\n", err=True)
    if report := printable(describe(resolved, num_gpus)):
        click.echo(re.sub(r"(?m)^\w[\w -]{9} ", coloured, report))
    if given:
        click.echo(f"online     {given}")
    sys.exit(resolved.error.exit_code if resolved.faults else 0)


def coloured(match: re.Match[str]) -> str:
    """The word that a line of the report begins with; `click.echo` drops colour off a terminal."""
    word = match[0].strip()
    return click.style(match[0], fg=COLOURS.get(word), bold=word not in COLOURS)


@_of_recipe
@click.option("--devices", type=click.IntRange(min=1), help="Simulate so many devices on the CPU.")
def plan(recipe: Path, overrides: tuple[str, ...], devices: int | None) -> None:
    """Compile the step of RECIPE and say what memory it takes of each device.

    Reads no data and no weights.
    """
    set_flags()
    if devices is not None:  # jax reads both when it is imported
        flag = f"--xla_force_host_platform_device_count={devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxtrain.plan import plan
    from jaxtrain.recipe.resolve import resolve

    config = resolve(recipe, as_overrides(overrides)).require_config()
    with raise_user_errors(config):
        for name, fact in plan(config):
            click.echo(f"{name:10} {fact}")


@cli.command()
@click.argument("source", metavar="RUN|CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=_NewPath(), help="The new folder.")
def export(source: Path, to: Path) -> None:
    """Write the newest checkpoint of a run, or one checkpoint, as a folder that transformers
    loads."""
    from jaxtrain.export import export

    click.echo(f"{export(source, to)} → {to}")


@_of_recipe
@click.option(
    "--checkpoint", metavar="RUN|CHECKPOINT",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Weights of a checkpoint, or of the newest one of a run; else those of the recipe.",
)  # fmt: skip
@click.option(
    "--out", type=_NewPath(), help="Write the metrics here, as JSON."
)  # fmt: skip
@click.option(
    "--lm-eval", metavar="TASKS",
    help="Run these tasks of lm-evaluation-harness instead, with commas between them. RECIPE may "
    "be a run, checkpoint or model too; the results are also written beside a run or checkpoint.",
)  # fmt: skip
@click.option(
    "--include-path", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with task files of your own, for --lm-eval.",
)  # fmt: skip
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples in a prompt of a task.")
@click.option("--limit", type=click.IntRange(min=1), help="Examples of each task.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Of tasks; 8 by default.")
@_on_devices
def evaluate(
    recipe: Path,
    overrides: tuple[str, ...],
    checkpoint: Path | None,
    out: Path | None,
    lm_eval: str | None,
    num_gpus: int | None,
    **how: Any,
) -> None:
    """Evaluate on the evaluation sets of RECIPE, or on tasks, and train nothing.

    Without --checkpoint, the weights are those that a run of RECIPE would start or resume from.
    """
    from jaxtrain.recipe.resolve import resolve

    how = {name: value for name, value in how.items() if value is not None}
    if how and lm_eval is None:
        raise click.UsageError(f"--{next(iter(how)).replace('_', '-')} is for --lm-eval")
    config = None
    is_model = recipe.suffix == ".gguf" or not (recipe.is_file() or recipe.suffix in YAML)
    if lm_eval is None or not is_model:
        config = resolve(recipe, as_overrides(overrides)).require_config()
    elif overrides or checkpoint:
        raise click.UsageError(f"overrides and --checkpoint are for a recipe, found {recipe}")
    if lm_eval is not None:
        if num_gpus is not None:
            raise click.UsageError("--num_gpus is for evaluation sets; tasks take all devices")
        names = tuple(filter(None, (name.strip() for name in lm_eval.split(","))))
        return run_tasks(config or recipe, checkpoint, out, names=names, **how)
    assert config is not None
    prepare_jax()
    with raise_user_errors(config):
        from jaxtrain.evaluate import evaluate

        metrics = evaluate(config, checkpoint, num_gpus)
    if out:
        from jaxtrain.files import write_atomically

        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(metrics, indent=2) + "\n", must_be_new=True)


cli.add_command(evaluate, "eval")


def run_tasks(
    source: Any, checkpoint: Path | None, out: Path | None, *, names: tuple[str, ...], **how: Any
) -> None:
    if not names:
        raise click.UsageError("--lm-eval names no task")
    prepare_jax()
    from jaxtrain.evaluate import evaluate_tasks

    table, file = evaluate_tasks(source, checkpoint, out, names=names, **how)
    click.echo(table)
    if file is not None:
        click.echo(f"written to {file}")


class _Text(click.ParamType):
    """Text that is not empty."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value or self.fail("must be text, found ''", param, ctx)


def _of_speaker(command: Any) -> Any:
    """A command that lets a model reply."""
    options = (
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=512,
                     show_default=True, help="Maximum length of a reply."),
        click.option("--temperature", type=click.FloatRange(min=0),
                     help="0 takes the likeliest token each time."),
        click.option("--top-k", type=click.IntRange(min=0),
                     help="Sample among so many of the likeliest tokens."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True),
                     help="Sample among the likeliest tokens that have this probability together."),
        click.option("--min-p", type=click.FloatRange(0, 1),
                     help="Sample among tokens at least so likely as this fraction of the "
                     "likeliest."),
        click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True),
                     help="Above 1, makes tokens that are there already less likely."),
        click.option("--stop", multiple=True, metavar="TEXT", type=_Text(),
                     help="End a reply before this text or special token; may be repeated."),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                     help="Of the sampling."),
        click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
        click.argument("source", metavar="RUN|CHECKPOINT|MODEL"),
    )  # fmt: skip
    for option in options:
        command = option(command)
    return cli.command()(command)


@_of_speaker
@click.option(
    "--prompt", multiple=True, type=_Text(), help="A user's message; may be repeated."
)  # fmt: skip
@click.option("--system", help="The system message before each --prompt.")
@click.option(
    "--file", type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="JSON Lines with `messages` or `prompt`; prints each record with its reply.",
)  # fmt: skip
@click.option(
    "--out", type=_NewPath(), help="Write the records of --file here."
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--raw", is_flag=True, help="Continue a text as it is, without a chat template.")
def generate(
    source: str,
    prompt: tuple[str, ...],
    system: str | None,
    file: Path | None,
    out: Path | None,
    batch_size: int,
    raw: bool,
    **how: Any,
) -> None:
    """Reply to prompts; by default as the model's generation_config.json says, else with the
    likeliest tokens.

    A file that --out writes can be a data source of a recipe.
    """
    if bool(prompt) == bool(file):
        raise click.UsageError("one of --prompt and --file says what to reply to")
    if out and not file:
        raise click.UsageError("--out is for the records of --file")
    if system and (file or raw):
        raise click.UsageError("--system is for --prompt, with a chat template")
    prepare_jax()
    from jaxtrain.generate import generate

    generate(source, prompt, system, file, out, batch_size, is_raw=raw, write=echo_text, **how)


@_of_speaker
@click.option("--system", help="The system message.")
def chat(source: str, system: str | None, **how: Any) -> None:
    """Talk with a model; /help lists what else a line may be."""
    import readline  # noqa: F401  lets `input` edit lines

    prepare_jax()
    from jaxtrain.generate import chat

    chat(source, system, read=read_line, write=echo_text, **how)


def read_line() -> str | None:
    """A line from the user; None at the end."""
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        echo_text("\n")
        return None


def echo_text(text: str) -> None:
    """Prints a piece of a reply at once; lines stay lines, other control characters are shown."""
    click.echo(printable(text), nl=False)
    sys.stdout.flush()


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--markdown", is_flag=True, help="The reference page instead of JSON Schema.")
def schema(recipe: Path | None, markdown: bool) -> None:
    """Print the JSON Schema of recipes; with the keys of RECIPE's own trainer, if given."""
    from jaxtrain.recipe.schema import json_schema, reference

    text = reference() if markdown else f"{json.dumps(json_schema(recipe), indent=2)}\n"
    click.echo(text, nl=False)


@cli.command()
@click.argument("name", required=False)
@click.argument("target", type=click.Path(path_type=Path), required=False)
def recipes(name: str | None, target: Path | None) -> None:
    """List the recipes that ship; show the one called NAME; copy it to TARGET, a file or folder."""
    from jaxtrain.recipe.shipped import copy_recipe, format_list, read_recipe

    if name is None:
        click.echo(format_list())
    elif target is None:
        click.echo(read_recipe(name), nl=False)
    else:
        for file in copy_recipe(name, target):
            click.echo(file)


@cli.command()
def env() -> None:
    """Print what a run here would start with: versions, devices, flags of XLA."""
    prepare_jax()
    for name, fact in describe():
        click.echo(f"{name:25} {fact}")
    from jaxtrain.parallel.mesh import list_devices

    click.echo(f"{'devices':25} {list_devices()}")


@cli.command()
@click.argument("name", metavar="[MODEL_TYPE]", required=False)
def models(name: str | None) -> None:
    """List the families of models that train here; say what is known of one."""
    from jaxtrain.model.listing import describe_family, list_families

    for line in list_families() if name is None else describe_family(name):
        click.echo(line)


@_of_recipe
@click.option("--batch", type=click.IntRange(min=1), help="Show what this step trains on.")
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the same as a page."
)
@click.option("--devices", type=click.IntRange(min=1), help="Devices of the run, for --batch.")
def data(recipe: Path, overrides: tuple[str, ...], **shown: Any) -> None:
    """Prepare the data of RECIPE and show what is trained and what is masked."""
    from jaxtrain import registry
    from jaxtrain.data.command import show_data
    from jaxtrain.model_folder import find_model_files
    from jaxtrain.recipe.resolve import resolve

    resolved = resolve(recipe, as_overrides(overrides), only_data=True)
    config = resolved.require_config()
    for note in resolved.report.notes:
        click.echo(f"note      {note}")
    with raise_user_errors(config):
        model = find_model_files(config.model)
        make = registry.find("tokenizer", config.tokenizer.type)
        tokenizer = make(config.tokenizer, model.path).create_tokenizer()
        show_data(config, tokenizer, max_positions=model.max_positions, **shown)


cli.add_command(data, "process-data")


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """`a.b=1` and `--a.b 1` and `--a.b=1`, all as `a.b=1`, and `del:a.b`; UsageError for anything
    else."""
    overrides, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            word = word[2:]
            if word == "resume" or word.startswith("resume="):
                raise click.UsageError(f"--{word}: {COMMANDS['resume']}")
            if (flag := word.split("=")[0]) in LAUNCHER.split():
                raise click.UsageError(
                    f"--{flag} is a flag of DeepSpeed's launcher, which is not used here: a run is "
                    "one process with the devices of its host"
                )
            if "=" not in word:
                if not rest or rest[0].startswith("--"):
                    raise click.UsageError(f"--{word} needs a value")
                word = f"{word}={rest.pop(0)}"
        elif "=" not in word and not word.startswith("del:"):
            raise click.UsageError(
                f"{word!r} is no override; write key=value, --key value or del:key"
            )
        overrides.append(word)
    return overrides


def main() -> None:
    """Run the command line; a fault of the user is one line and an exit code, no traceback."""
    debug = "--debug" in sys.argv
    gc.set_threshold(GC_THRESHOLD)
    try:
        try:
            cli(standalone_mode=False)
        finally:
            ignore_signals()
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(1)
    except Exception as error:  # also of a command without a recipe, or of the recipe's own file
        known = error if isinstance(error, UserError) else explain_error(error)
        if debug or known is None:
            raise
        click.echo(printable(str(known)), err=True)
        sys.exit(known.exit_code)


def print_profile(order: str) -> None:
    """From now to the end of the command, which may fail: print the 30 functions that took longest,
    by `order`."""
    import cProfile
    import pstats

    profile = cProfile.Profile()
    report = lambda: pstats.Stats(profile).sort_stats(order).print_stats(30)
    click.get_current_context().call_on_close(report)
    profile.enable()


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
