"""Convert between Hugging Face folders and training runs, bit for bit, and compare the two.

python tools/convert_checkpoint.py import --hf models/gidd-unif-3b --save runs/gidd-unif-3b
python tools/convert_checkpoint.py export --load runs/mine --hf models/mine
python tools/convert_checkpoint.py verify --load runs/mine --hf models/mine
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def import_(
    hf: Path, save: Path, mask_token_id: int | None = None, pad_token_id: int | None = None
) -> int:
    """Hugging Face folder -> training run at step 0, for any layout.

    Continue it: pretrain_diffusion.py --config SAVE/config.yaml --load SAVE --finetune --save OTHER

    Args:
        hf: Folder with config.json, *.safetensors and the tokenizer's files.
        save: Folder of the new run; must be absent or empty.
        mask_token_id: Id of the mask token; the tokenizer's when absent (published: 3).
        pad_token_id: Id of the padding token; the tokenizer's when absent (published: 2).
    """
    from megatron_ext.checkpoint.import_hf import import_folder

    done = import_folder(hf, save, mask_token_id=mask_token_id, pad_token_id=pad_token_id)
    print(f"{done.folder}: {done.num_parameters:,} parameters in {done.dtype}, bit for bit")
    return 0


def export(
    load: Path, hf: Path, ckpt_step: int | None = None,
    dtype: Literal["as-trained", "bfloat16", "float32"] = "as-trained",
    max_shard_size: str = "5GB", tokenizer_model: str | None = None,
) -> int:  # fmt: skip
    """Training checkpoint -> Hugging Face folder with weights, code, tokenizer and model card.

    Loads with AutoModelForCausalLM.from_pretrained(HF, trust_remote_code=True).

    Args:
        load: A run's --save folder; the layout it was trained at does not matter.
        hf: Folder to write; must be absent or empty.
        ckpt_step: Checkpoint to export; the latest when absent.
        dtype: Number format of everything but the norm gains, which are float32 always.
        max_shard_size: Largest *.safetensors file, such as 5GB or 500MB.
        tokenizer_model: Where the tokenizer is, if not where it was in training.
    """
    from megatron_ext.checkpoint.export_hf import export_run

    options = {"max_shard_size": max_shard_size, "tokenizer_model": tokenizer_model}
    done = export_run(load, hf, step=ckpt_step, dtype=dtype, **options)
    print(f"{done.folder}: {done.num_parameters:,} parameters in {done.dtype}")
    return 0


def verify(
    load: Path, hf: Path, ckpt_step: int | None = None, seq_length: int = 256,
    new_tokens: int = 16, seed: int = 0,
) -> int:  # fmt: skip
    """Run both models on the same noised tokens in float32; exit code 1 where they disagree.

    Compares logits, per-token losses and bounds, and greedy generation, one model after the other.

    Args:
        load: A run's --save folder.
        hf: Hugging Face folder with the same weights.
        ckpt_step: Checkpoint to compare; the latest when absent.
        seq_length: Tokens per sequence, at most the model's context.
        new_tokens: Tokens to generate.
        seed: Keys tokens and noise.
    """
    from megatron_ext.inference.verify import report, verify_conversion

    options = {"seq_length": seq_length, "new_tokens": new_tokens, "seed": seed}
    checks = verify_conversion(load, hf, step=ckpt_step, **options)
    print(report(checks))
    return int(not all(check.agrees for check in checks))


def main() -> int:
    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"import": import_, "export": export, "verify": verify}, description=__doc__
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
