#!/usr/bin/env bash
# The study's tokens: the quickstart's text in a vocabulary of 512.
set -euo pipefail
cd "$(dirname "$0")/../.."
python examples/quickstart/build_corpus.py data/quickstart
python tools/train_tokenizer.py --input data/quickstart/train.jsonl --vocab-size 512 --output data/study/tokenizer
for split in train valid; do
  python tools/preprocess_data.py --input "data/quickstart/$split.jsonl" \
    --tokenizer-model data/study/tokenizer --output-prefix "data/study/$split"
done
