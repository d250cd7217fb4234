"""`specrt run`: a prompt in, text out as it comes, and how fast."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compiler.cli.console import command, plural, print_json
from compiler.cli.options import Debug, Json
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runtime import Hypothesis, Model


@command
def run_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", show_default=False, help="A compiled bundle.")],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", show_default=False, help="The text to go on from; else read from stdin."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(show_default=False, help="Token ids instead of text: 1,2,3. Prints ids.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is what a user says: put it into the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, show_default="greedy", help="Sample; 0 is greedy, 1 the model's own odds.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, show_default=False, help="Sample from the k likeliest.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, show_default=False, help="Sample from the likeliest that sum to p."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.0, show_default="none", help="Above 1: avoid what was said.")
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default=False, help="The same seed gives the same text.")] = None,
    num_beams: Annotated[
        int | None, typer.Option(min=1, show_default="the bundle's", help="Beam search with so many; 1 is none.")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(show_default=False, help="Of beams: above 0 long ones, below 0 short ones win.")
    ] = None,
    early_stopping: Annotated[
        str | None, typer.Option(show_default=False, help="Of beams: `true`, `false` or `never`, as in transformers.")
    ] = None,
    num_return_sequences: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Print so many of the best beams.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(show_default="the bundle's", help="A token id to stop at, or `none`; may be repeated."),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print while it is generated.")] = True,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Generate text with a compiled bundle."""
    import runtime

    if prompt is not None and tokens is not None:
        raise SpecRTError("CLI-013", "`--prompt` and `--tokens` are both given", hint="give one of them")
    if chat and tokens is not None:
        raise SpecRTError("CLI-013", "`--chat` and `--tokens` are both given", hint="a chat template takes text")
    ids = None if tokens is None else ids_of("--tokens", tokens)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "stop": _stop(stop),
    }  # fmt: skip
    beams = {
        "num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": _early(early_stopping),
        "num_return_sequences": num_return_sequences,
    }  # fmt: skip
    began = time.perf_counter()
    build_here(bundle)
    with runtime.load(bundle) as model:
        if ids is None:
            prompt = sys.stdin.read() if prompt is None else prompt
            ids = model.chat([{"role": "user", "content": prompt}]) if chat else model.encode(prompt)
        found = Run(len(ids), load=time.perf_counter() - began)
        if (model.bundle.beams.num_beams if num_beams is None else num_beams) > 1:
            pieces = _search(model, ids, found, text=tokens is None, options=options | beams)
        else:
            pieces = _generate(model, ids, found, text=tokens is None, options=options | beams)
        if json:
            text = "".join(pieces)
            print_json(
                {
                    "bundle": str(bundle),
                    "prompt": prompt,
                    **_report(found, ids, model, text if tokens is None else None),
                }
            )
            return
        for piece in pieces if stream else ["".join(pieces)]:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        print(found.told(), file=sys.stderr)


@dataclass
class Run:
    """What came out, and the seconds that it took."""

    prompt_tokens: int
    load: float
    prefill: float = 0.0
    decode: float = 0.0
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    beams: list[Hypothesis] = field(default_factory=list)  # best first; its prompt is counted in `decode`

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens a second, the first new token included in the time."""
        return self.prompt_tokens / self.prefill if self.tokens and not self.beams else None

    @property
    def decode_rate(self) -> float | None:
        """New tokens a second after the first."""
        return (len(self.tokens) - 1) / self.decode if len(self.tokens) > 1 and not self.beams else None

    def told(self) -> str:
        """One line for people."""
        if self.beams:
            line = f"loaded in {self.load:.2f} s; prompt of {plural(self.prompt_tokens, 'token')}"
            return f"{line}, best of the beams {plural(len(self.tokens), 'token')}, in {self.decode:.3f} s"
        line = f"loaded in {self.load:.2f} s; prompt of {plural(self.prompt_tokens, 'token')} in {self.prefill:.3f} s"
        if self.prefill_rate is not None and self.prompt_tokens > 1:
            line += f" ({self.prefill_rate:,.0f} tokens/s)"
        line += f"; {plural(len(self.tokens), 'new token')}"
        if self.decode_rate is not None:
            line += f" in {self.prefill + self.decode:.3f} s ({self.decode_rate:,.0f} tokens/s after the first)"
        return line + (", ended by a stop token" if self.finish == "stop" else "")


def _generate(model: Model, ids: list[int], run: Run, *, text: bool, options: dict[str, Any]) -> Iterator[str]:
    """The new text, or ids, piece by piece; fills `run`."""
    began = time.perf_counter()

    def new() -> Iterator[int]:
        for event in model.stream([ids], **options):
            if not run.tokens:
                run.prefill = time.perf_counter() - began
            run.tokens.append(event.token)
            run.decode = time.perf_counter() - began - run.prefill
            run.finish = event.finish
            yield event.token

    if text:
        yield from model.tokenizer.stream(new(), after=ids)
    else:
        for index, token in enumerate(new()):
            yield f",{token}" if index else str(token)


def _search(model: Model, ids: list[int], run: Run, *, text: bool, options: dict[str, Any]) -> Iterator[str]:
    """The texts, or ids, of the best beams, a line each; fills `run`."""
    began = time.perf_counter()
    (run.beams,) = model.search([ids], **options)
    run.decode = time.perf_counter() - began
    run.tokens, run.finish = run.beams[0].ids, run.beams[0].finish
    for index, beam in enumerate(run.beams):
        yield "\n" * (index > 0) + (model.decode(beam.ids, after=ids) if text else ",".join(map(str, beam.ids)))


def _report(run: Run, ids: list[int], model: Model, text: str | None) -> dict[str, Any]:
    if model.bundle.tokenizer is not None and (text is None or run.beams):
        text = model.decode(run.tokens, after=ids)
    return {
        "prompt_tokens": ids,
        "tokens": run.tokens,
        "text": text,
        "seconds": {"load": run.load, "prefill": run.prefill, "decode": run.decode},
        "prefill_tokens_per_second": run.prefill_rate,
        "decode_tokens_per_second": run.decode_rate,
        "finish": run.finish,
        "beams": [{"tokens": beam.ids, "score": beam.score, "finish": beam.finish} for beam in run.beams],
    }


def build_here(bundle: Path) -> None:
    """Build what a GPU bundle lacks for this machine; a bundle for the CPU lacks nothing."""
    if (bundle / "segments").is_dir():
        from compiler.lower.tensorrt.plans import build_bundle

        build_bundle(bundle)


def ids_of(option: str, text: str) -> list[int]:
    """Token ids of an option; raises SpecRTError CLI-013 for anything else."""
    try:
        return [int(item) for item in text.replace(",", " ").split()]
    except ValueError as error:
        message = f"`{option} {text}` is no list of token ids"
        raise SpecRTError("CLI-013", message, hint=f"write whole numbers with commas: `{option} 1,2,3`") from error


def _early(given: str | None) -> bool | str | None:
    """`early_stopping` as `runtime` takes it, which refuses other words."""
    return {"true": True, "false": False}.get(given, given) if given is not None else None


def _stop(given: list[str] | None) -> tuple[int, ...] | None:
    """Token ids to stop at; None means the bundle's, and the word `none` no token at all."""
    if not given:
        return None
    if given == ["none"]:
        return ()
    return tuple(token for text in given for token in ids_of("--stop", text))
