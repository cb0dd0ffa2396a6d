"""prequant generate: continue a text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .app import command, show


@command("generate", "Continue a text, token by token.")
def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="The text to continue, or the input of a seq2seq model.")],
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to add at most.", min=1)] = 40,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens at random instead of taking the likeliest.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits before drawing.", show_default="the model's own")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from so many tokens only.", min=1, show_default="the model's own")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens of this total only.", show_default="the model's own"),
    ] = None,
    num_beams: Annotated[int, typer.Option(help="Search with so many beams; shown when it is done.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    quantized_cache: Annotated[
        bool, typer.Option("--quantized-cache", help="Keep keys and values of the text so far as 8-bit codes.")
    ] = False,
    adapter: options.AdapterFile = None,
) -> None:
    """Continue a text with a folder that prequant saved, or with an ordinary model, and show each word as it comes."""
    from prequant.continuing import continue_text, load_generator

    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings: dict[str, Any] = {name: value for name, value in drawing.items() if value is not None} if sample else {}
    loaded, tokenizer = load_generator(model, adapter)
    stream = num_beams == 1  # beams are known only when all of them are
    settings |= {"do_sample": sample, "num_beams": num_beams}
    if quantized_cache:
        settings["cache_implementation"] = "quantized"
    text = continue_text(loaded, tokenizer, prompt, max_new_tokens, seed, stream=stream, **settings)
    if not stream:
        show(text)
