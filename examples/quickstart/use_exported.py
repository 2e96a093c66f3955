"""Load an exported folder with transformers alone, and generate: nothing of this project is needed.

python examples/quickstart/use_exported.py runs/quickstart/hf
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str) -> None:
    # The code of the model is in the folder; only trust folders that you made or have read.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    prompt = tokenizer("My fellow citizens", add_special_tokens=False, return_tensors="pt")
    ids = model.generate(prompt.input_ids, max_length=60, steps=32, min_length=60, seed=0)
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
