"""8-bit weights beside the checkpoint's dtype: decode speed in turns, and the KL divergence of the distributions.

python scripts/bench_weights.py [MODEL] [--dtype bfloat16] [--texts 2 --tokens 512] [--turns 5] [--json]
"""

from __future__ import annotations

import click

from nanokv.bench.codec_quality import Reference, summary
from nanokv.bench.codec_speed import in_turns
from nanokv.bench.codec_texts import texts_for
from nanokv.bench.measure import warm_up
from nanokv.cli.common import emit_json, json_option, model_folder
from nanokv.llm import LLM

BATCHES = (1, 4, 16)


@click.command()
@click.argument("model", required=False)
@click.option("--dtype", default="auto", show_default=True, help="Of activations, and of the weights beside.")
@click.option("--texts", default=2, show_default=True)
@click.option("--tokens", default=512, show_default=True, help="Of each text.")
@click.option("--context", default=256, show_default=True, help="Tokens of each request that decodes.")
@click.option("--turns", default=5, show_default=True)
@json_option
def main(model: str | None, dtype: str, texts: int, tokens: int, context: int, turns: int, as_json: bool) -> None:
    """Compares --weights q8 with --weights auto on MODEL."""
    folder = model_folder(model)
    rows = []
    with LLM(folder, dtype=dtype) as raw, LLM(folder, dtype=dtype, weights="q8") as q8:
        for llm in (raw, q8):
            warm_up(llm, 64)
        for batch in BATCHES:
            found = in_turns(q8, raw, batch, context, steps=16, turns=turns)
            rows.append({"part": "speed", **found})
            click.echo(
                f"decode of {batch}: {found['speed_ratio']:.2f} x, {found['output_tokens_per_s']:.1f} tok/s", err=True
            )
        reference = Reference(raw, texts_for(raw, texts, tokens))
        judged = [[reference.judge(llm, name) for name in reference.texts] for llm in (q8, raw)]
        quality = summary(*judged)
        rows.append({"part": "quality", "texts": texts, "text_tokens": tokens, **quality})
        click.echo(f"KL {quality['kl']:.5f} nats, top-1 {quality['top1_agreement']:.2%}", err=True)
        settings = {"dtype": str(raw.dtype).removeprefix("torch."), "context": context, "turns": turns}
    if as_json:
        emit_json("weights", folder.name, settings, rows)


if __name__ == "__main__":
    main()
