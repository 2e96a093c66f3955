"""Plan, run and fit a scaling study, and predict from its laws or the published ones.

python tools/scaling_laws.py plan examples/scaling/study.yaml
python tools/scaling_laws.py launch runs/study --jobs 2
python tools/scaling_laws.py collect runs/study
python tools/scaling_laws.py fit runs/study
python tools/scaling_laws.py plot runs/study
python tools/scaling_laws.py predict --noise uniform --flops 1e21
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.scaling import commands  # noqa: E402


def plan(study: commands.Folder, flops_per_second: float | None = None) -> int:
    """Work out a study's runs: plan.json and one configuration per run in its output folder.

    Args:
        study: YAML file; docs/scaling.md says what it may hold.
        flops_per_second: What the machine reaches in training, for an estimate of the hours.
    """
    from megatron_ext.data.tokenizer import load_tokenizer
    from megatron_ext.scaling.ladder import describe, make_plan, write_plan
    from megatron_ext.scaling.study import read_study

    description = read_study(study)
    tokenizer = description.recipe.get("data", {}).get("tokenizer_model")
    vocab_size = None if tokenizer is None else load_tokenizer(tokenizer).vocab_size
    made, configs = make_plan(description, vocab_size)
    path = write_plan(made, configs)
    print(describe(made, description, flops_per_second))
    print(f"{path}: written")
    return 0


def main() -> int:
    subcommands = {
        "plan": plan, "launch": commands.launch, "collect": commands.collect, "fit": commands.fit,
        "plot": commands.plot, "predict": commands.predict,
    }  # fmt: skip
    try:
        return tyro.extras.subcommand_cli_from_dict(subcommands, description=__doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
