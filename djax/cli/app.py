"""The command line. jax is imported inside the commands, so that help and wrong flags answer at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from djax.cli.cache import COMPILE_CACHE_HELP, use_compile_cache
from djax.cli.errors import OneLineCommand, OneLineGroup
from djax.cli.flags import (
    DISTRIBUTED_HELP,
    DISTRIBUTED_METAVAR,
    MESH_HELP,
    MESH_METAVAR,
    Debug,
    LengthFlags,
    ModelFlags,
    RecipeFlags,
    SamplingFlags,
    Source,
    with_flags,
)
from djax.cli.inspect import inspect_command
from djax.cli.interrupt import interruptible, reaching
from djax.cli.mesh import Launch, launch
from djax.cli.parts import parts_command
from djax.cli.plan import plan_command
from djax.errors import ArgumentError, check_choice, check_integer, check_number
from djax.models.config import DTYPES

if TYPE_CHECKING:
    from djax.api import DiffusionLM
    from djax.engine.streaming import StreamStep

_IN_RANGE = "give one in that range"

app = typer.Typer(
    cls=OneLineGroup, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Masked-diffusion language models in JAX.", context_settings={"help_option_names": ["-h", "--help"]})

Json = Annotated[bool, typer.Option(
    "--json", help="One JSON object per prompt on standard output: text, tokens, counts, stop reason.")]
JsonFull = Annotated[bool, typer.Option(
    "--json-full", help="The same with the whole canvas, and step and log-probability of each token.")]


def main() -> None:
    """Run the command line; exits with 0, 1 (failed), 2 (wrong input), or 130, 143 or 129 (SIGINT, SIGTERM, SIGHUP)."""
    with interruptible():
        app()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Debug = False,
) -> None:
    """Masked-diffusion language models in JAX."""
    if version:
        import djax

        print(f"djax {djax.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command(cls=OneLineCommand)
@with_flags(length=LengthFlags, sampling=SamplingFlags, flags=RecipeFlags, model=ModelFlags)
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(
        metavar="PROMPT", help="Text; several make a batch; - or nothing reads standard input.")] = None,
    *,
    messages: Annotated[str | None, typer.Option(
        "--messages", metavar="FILE", help="JSON file (- is standard input) with chat messages, or a list of "
        "conversations.")] = None,
    token_ids: Annotated[str | None, typer.Option(
        "--token-ids", metavar="FILE", help="JSON file (- is standard input) with a list of token ids, or a list "
        "of lists.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take PROMPT as it is, without the chat template.")] = False,
    allow_special_tokens: Annotated[bool, typer.Option(
        "--allow-special-tokens", help="Let control tokens written in a prompt, such as <|role_end|>, be control "
        "tokens and not text: for prompts with the template written out.")] = False,
    json: Json = False,
    json_full: JsonFull = False,
    live: Annotated[bool | None, typer.Option(
        "--live/--no-live", help="Show the canvas while it is denoised; on by default on a terminal.")] = None,
    length: LengthFlags, sampling: SamplingFlags, flags: RecipeFlags, model: ModelFlags,
) -> None:
    """Complete prompts.

    A plain text goes through the chat template as one user message, unless --raw is given.
    """
    live = _wants_live(live, json=json or json_full, distributed=model.distributed is not None)
    _check_sampling(sampling)
    check_integer("--max-new-tokens", length.max_new_tokens, 1, advice=_IN_RANGE)
    from djax.cli.inputs import read_prompts
    from djax.cli.outputs import Output

    where = launch(model.mesh, distributed=model.distributed)
    prompts = where.read(
        lambda: read_prompts(prompt, messages=messages, token_ids=token_ids, raw=raw), "prompts")
    arguments = _arguments(flags, sampling) | {
        "max_new_tokens": length.max_new_tokens, "stop_on_eos": not length.no_stop, "align": length.align,
        "allow_special_tokens": allow_special_tokens}
    lm = _load(model, where)
    if live:
        _generate_live(lm, lm.stream(prompts, **arguments), sampling.block_length)
        return
    output = Output(as_json=json or json_full, full=json_full, prints=where.first, tokenizer=lm.tokenizer,
                    eos_ids=(lm.config.eos_id, *lm.config.other_eos_ids))
    with reaching(output.tell):
        generation = lm.generate(prompts, **arguments, watch=output.put)
    output.print(generation)


@app.command(cls=OneLineCommand)
@with_flags(sampling=SamplingFlags, flags=RecipeFlags, model=ModelFlags)
def infill(
    template: Annotated[str | None, typer.Argument(
        metavar="TEMPLATE", help="Text with \\[MASK:n] where n tokens are to be filled in, taken as it is, without the "
        "chat template; - or nothing reads standard input.")] = None,
    *,
    token_ids: Annotated[str | None, typer.Option(
        "--token-ids", metavar="FILE", help="JSON file (- is standard input) with token ids, null where one is to "
        "be filled in.")] = None,
    json: Json = False,
    json_full: JsonFull = False,
    sampling: SamplingFlags, flags: RecipeFlags, model: ModelFlags,
) -> None:
    """Fill in the masked positions of a text; everything else stays as it is."""
    _check_sampling(sampling)
    from djax.cli.inputs import read_masked_ids, read_stdin, read_template
    from djax.cli.outputs import Output

    if template is not None and token_ids is not None:
        raise ArgumentError("--token-ids", "TEMPLATE and --token-ids together", allowed="one of them",
                            advice="drop one")
    where = launch(model.mesh, distributed=model.distributed)
    if token_ids is None and template in (None, "-"):
        template = where.read(lambda: read_stdin("TEMPLATE"), "template")
    arguments = _arguments(flags, sampling)
    lm = _load(model, where)
    # What stands at a masked position is never read: any id of the vocabulary will do.
    placeholder = lm.config.mask_id or 0

    def read() -> tuple[list[list[int]], list[list[bool]]]:
        if token_ids is not None:
            return read_masked_ids(token_ids, mask_id=placeholder)
        ids, mask = read_template(template or "", lm.tokenizer, mask_id=placeholder)
        return [ids], [mask]

    rows, masks = where.read(read, "token ids")
    output = Output(as_json=json or json_full, full=json_full, prints=where.first, eos_ids=(),
                    tokenizer=lm.tokenizer, whole=True)
    with reaching(output.tell):
        generation = lm.infill(rows, masks, **arguments, watch=output.put)
    output.print(generation)


@app.command(cls=OneLineCommand)
def convert(
    source: Source,
    destination: Annotated[str, typer.Argument(metavar="DST", help="Directory to write.")],
    *,
    dtype: Annotated[str | None, typer.Option(
        "--dtype", help="bfloat16, float16 or float32; the checkpoint's own if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    mesh: Annotated[str | None, typer.Option("--mesh", metavar=MESH_METAVAR, help=MESH_HELP)] = None,
    distributed: Annotated[str | None, typer.Option(
        "--distributed", metavar=DISTRIBUTED_METAVAR, help=DISTRIBUTED_HELP)] = None,
    debug: Debug = False,
) -> None:
    """Convert a Hugging Face checkpoint to djax's own format (Orbax), with a manifest of digests."""
    check_choice("--dtype", dtype, DTYPES, optional=True)
    import convert as converter
    from djax import assets

    found = assets.resolve(source)
    where = launch(mesh, distributed=distributed)
    with reaching(lambda: f"interrupted; {destination} is as it was"), \
            _progress("converting", where) as progress:
        written = converter.convert(
            found, destination, dtype=dtype, overwrite=force, mesh=where.mesh, progress=progress)
    if where.first:
        print(written)


class _TrainCommand(OneLineCommand):
    """Help that ends with the fields of a configuration, read when it is asked for: that takes jax."""

    def get_help(self, ctx: Any) -> str:
        from djax.train.config import describe_fields

        self.epilog = "\n\n".join(["Fields of CONFIG.toml, as table.field (default):", *describe_fields()])
        return super().get_help(ctx)


@app.command(cls=_TrainCommand)
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.toml", help="The run: data, optimizer, output.")], *,
    no_compile_cache: Annotated[bool, typer.Option("--no-compile-cache", help=COMPILE_CACHE_HELP)] = False,
    debug: Debug = False,
) -> None:
    """Train or fine-tune a model; run again, it goes on where it stopped."""
    from djax.cli.train import reached, run

    use_compile_cache(not no_compile_cache)
    with reaching(lambda: reached(Path(config))):
        print(run(Path(config)))


app.command("plan", cls=OneLineCommand)(plan_command)
app.command("parts", cls=OneLineCommand)(parts_command)
app.command("inspect", cls=OneLineCommand)(inspect_command)


def _arguments(flags: RecipeFlags, sampling: SamplingFlags) -> dict[str, Any]:
    """Keyword arguments that `generate`, `stream` and `infill` share."""
    from djax.cli.recipe import build_recipe

    options = dict(vars(sampling))
    return {"recipe": build_recipe(flags), "key": options.pop("seed"), **options}


def _load(model: ModelFlags, where: Launch) -> DiffusionLM:
    check_choice("--dtype", model.dtype, DTYPES, optional=True)
    use_compile_cache(not model.no_compile_cache)
    from djax.api import load

    with _progress("loading", where) as progress:
        return load(model.model, dtype=model.dtype, mesh=where.mesh, mask_id=model.mask_id, eos_id=model.eos_id,
                    progress=progress)


def _generate_live(lm: DiffusionLM, steps: Iterator[StreamStep], block_length: int) -> None:
    """Draw the stream, then print the completions and, on standard error, what they took."""
    from djax.cli.live import LiveCanvas
    from djax.cli.outputs import print_texts

    view = LiveCanvas(tokenizer=lm.tokenizer, block_length=block_length)

    def show() -> None:
        view.close()
        if view.last is not None:
            print_texts(view.last.reached(lm.tokenizer), list(view.last.tokens))
            sys.stdout.flush()

    def tell() -> str:
        show()
        return "interrupted" + ("" if view.last is None else f"; {view.status(view.last)}")

    with reaching(tell):
        view.run(steps)
        show()
    if view.last is not None:
        print(view.status(view.last), file=sys.stderr)


def _wants_live(live: bool | None, *, json: bool, distributed: bool) -> bool:
    terminal = sys.stdout.isatty()
    if distributed:
        if live:
            raise ArgumentError("--live", "it with --distributed", allowed="one of them", advice="drop one")
        return False
    if live and json:
        raise ArgumentError("--live", "it with --json", allowed="one of them", advice="drop one")
    if live and not terminal:
        raise ArgumentError("--live", "it with an output that is not a terminal", allowed="a terminal",
                            advice="drop --live or run it in a terminal")
    return terminal and not json if live is None else live


def _check_sampling(sampling: SamplingFlags) -> None:
    """Wrong numbers are refused before jax is imported and a model is loaded."""
    check_integer("--block-length", sampling.block_length, 1, advice=_IN_RANGE)
    check_integer("--top-k", sampling.top_k, 1, optional=True, advice=_IN_RANGE)
    check_integer("--seed", sampling.seed, 0, 2**63 - 1, advice=_IN_RANGE)
    check_number("--temperature", sampling.temperature, 0.0, advice=_IN_RANGE)
    check_number("--top-p", sampling.top_p, 0.0, 1.0, above=True, optional=True, advice=_IN_RANGE)
    check_number("--min-p", sampling.min_p, 0.0, 1.0, optional=True, advice=_IN_RANGE)
    check_number("--guidance", sampling.guidance, -1.0, optional=True, advice=_IN_RANGE)


@contextmanager
def _progress(label: str, where: Launch) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error where that is the first process's terminal; None elsewhere."""
    if not (where.first and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield progress
