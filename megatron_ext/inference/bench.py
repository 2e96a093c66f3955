"""Speed of generation: the published way against modes `canvas` and `window`, one model, one run.

    python -m megatron_ext.inference.bench [--quick] [--json FILE]

The published way, written as its description reads: in every step the whole remaining canvas is
run against the cached prefix and projected to the vocabulary, and the posterior is a tensor of
[tokens, vocabulary] from which every position is drawn. The modes run the same steps; steps that
change nothing reuse their logits in all three. Times are medians over repetitions that alternate.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from megatron_ext.hf import GiddConfig, GiddForDiffusionLM
from megatron_ext.hf.steps_gidd import log_snr_grid
from megatron_ext.measure import Column, Report, Table, alternate, bench_parser

COLUMNS = [
    Column("noise", "noise"),
    Column("way", "way"),
    Column("median_s", "seconds", ".3g"),
    Column("lower_quartile_s", "lower quartile", ".3g"),
    Column("upper_quartile_s", "upper quartile", ".3g"),
    Column("tokens_per_s", "tokens/s", ".1f"),
    Column("times_published", "times published", ".2f"),
]
QUICK = {
    "vocab_size": 512, "hidden_size": 64, "layers": 1, "context": 128, "new_tokens": 32,
    "block_length": 16, "steps": 2, "repetitions": 1,
}  # fmt: skip


@torch.no_grad()
def generate_as_published(
    model: GiddForDiffusionLM, prompt: Tensor, max_length: int, block_length: int, steps: int
) -> Tensor:
    """Ancestral sampling of `max_length` tokens behind `prompt` [b, p], with dense posteriors."""
    schedule = model.mixing_schedule()
    context, mask = model.config.max_position_embeddings, schedule.mask_token_id
    levels = log_snr_grid(schedule, steps, "cosine")
    prior = schedule.pi(torch.tensor(schedule.min_log_snr)).expand(len(prompt) * context, -1)
    canvas = torch.multinomial(prior[:1], len(prompt) * context, replacement=True)
    canvas = canvas.view(len(prompt), context)
    canvas[:, : prompt.shape[1]] = prompt
    for first in range(prompt.shape[1], prompt.shape[1] + max_length, block_length):
        prefix = model.model(canvas[:, :first]).key_values
        logits = None
        for step in range(steps, 0, -1):
            ids = canvas[:, first : first + block_length]
            if logits is None:
                hidden = model.model(canvas[:, first:], prefix=prefix).last_hidden_state
                logits = model.logits(hidden)[:, :block_length]
                logits[..., mask] = -torch.inf
            probs = torch.softmax(logits.float(), dim=-1)
            now, after = (torch.full(ids.shape, levels[i]) for i in (step, step - 1))
            posterior = schedule.posterior(probs, ids, now, after)
            new = torch.multinomial(posterior.flatten(0, 1), 1).view_as(ids)
            if not torch.equal(new, ids):
                canvas[:, first : first + block_length], logits = new, None
    return canvas[:, : prompt.shape[1] + max_length]


def measure(arguments: argparse.Namespace, noise: str, shift: float) -> list[dict[str, Any]]:
    """A row per way at a mixing shift."""
    torch.manual_seed(0)
    config = GiddConfig(
        vocab_size=arguments.vocab_size, hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size, num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 64, attention_bias=True, mlp_bias=True,
        max_position_embeddings=arguments.context, weight_scaling=1.0, init_scale=0.02,
        head_init_scale=0.02, noise_type=shift, eos_token_id=1,
    )  # fmt: skip
    model = GiddForDiffusionLM(config).eval()
    prompt = torch.randint(4, arguments.vocab_size, (1, 32))
    length, block, steps = arguments.new_tokens, arguments.block_length, arguments.steps

    def ours(mode: str) -> Tensor:
        # An end of document would stop one way earlier than another.
        return model.generate(
            prompt, max_length=length, min_length=length, block_length=block, steps=steps,
            mode=mode, seed=0,
        )  # fmt: skip

    ways = {
        "published": lambda: generate_as_published(model, prompt, length, block, steps),
        "canvas": lambda: ours("canvas"),
        "window": lambda: ours("window"),
    }
    times = alternate(ways, arguments.repetitions)
    return [
        {
            "noise": noise,
            "way": way,
            **timing.summary(),
            "tokens_per_s": length / timing.median,
            "times_published": times["published"].relative_to(timing),
        }
        for way, timing in times.items()
    ]


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--vocab-size", type=int, default=131072)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--block-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    kinds = (("masked", -1000.0), ("balanced", 0.0), ("uniform", 1000.0))
    rows = [row for noise, shift in kinds for row in measure(arguments, noise, shift)]
    title = (
        f"Generation: {arguments.new_tokens} tokens in blocks of {arguments.block_length}, "
        f"{arguments.steps} steps; context {arguments.context}, vocabulary "
        f"{arguments.vocab_size}, width {arguments.hidden_size}, {arguments.layers} layers"
    )
    Report("generation", vars(arguments), [Table(title, COLUMNS, rows)]).finish(arguments.json)


if __name__ == "__main__":
    main()
