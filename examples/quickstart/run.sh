#!/usr/bin/env bash
# Text -> tokenizer -> tokens -> pretraining at tp 2 -> annealing at dp 2 -> bound, samples, export.
# Every step keeps what an earlier run left, so a second run goes straight to the samples.
# STEPS: optimizer steps in all, the last quarter at dp 2.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

data=data/quickstart
recipe=examples/quickstart/pretrain.yaml
steps=${STEPS:-240}
stable=$((steps * 3 / 4))
say() { printf '\n== %s\n' "$*"; }

say "1. Corpus"
python examples/quickstart/build_corpus.py "$data"

say "2. Tokenizer"
if [ ! -f "$data/tokenizer/tokenizer.json" ]; then
  python tools/train_tokenizer.py --input "$data/train.jsonl" --vocab-size 4096 --output "$data/tokenizer"
fi

say "3. Tokens"
for split in train valid; do
  python tools/preprocess_data.py --input "$data/$split.jsonl" \
    --tokenizer-model "$data/tokenizer" --output-prefix "$data/$split"
done

say "4. Pretraining: two ranks, tensor parallel, sequence parallel"
if [ ! -f runs/quickstart/latest ] || [ "$(cat runs/quickstart/latest)" -lt "$stable" ]; then
  torchrun --standalone --nproc-per-node 2 pretrain_diffusion.py --config "$recipe" \
    --tensor-model-parallel-size 2 --sequence-parallel --train-iters "$stable"
fi

say "5. Annealing from that checkpoint: two ranks, data parallel"
torchrun --standalone --nproc-per-node 2 pretrain_diffusion.py --config "$recipe" \
  --train-iters "$steps" --lr-wsd-decay-iters "$((steps - stable))"

say "6. Samples, and a page that shows how they came about"
python tools/generate.py --load runs/quickstart --num-samples 2 --steps 64 --max-length 120 \
  --prompt "The people of the United States" --trace runs/quickstart/trace.json
python tools/visualize_denoising.py runs/quickstart/trace.json --output runs/quickstart/denoising.html

say "7. Export to Hugging Face, loaded back with transformers alone"
if [ ! -f runs/quickstart/hf/config.json ] || [ runs/quickstart/latest -nt runs/quickstart/hf/config.json ]; then
  rm -rf runs/quickstart/hf
  python tools/convert_checkpoint.py export --load runs/quickstart --hf runs/quickstart/hf
fi
python examples/quickstart/use_exported.py runs/quickstart/hf
