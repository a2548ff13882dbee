#!/usr/bin/env bash
# DFRot's main table: QuaRot and DFRot, weights by RTN and by GPTQ, on one of the paper's models.
#
#   runs/dfrot.sh llama2-7b OUT [DEVICE]
#
# Hardware: one GPU that holds the model in 16 bits for evaluation (7B: 24 GB, 13B: 40 GB), and host memory for the hidden
# states of 128 × 2048 tokens, twice (7B: 9 GB; on disk if memory does not hold them). Not run by us yet: no GPU was at hand.
# Zero-shot tasks need lm-eval: pip install "dfrot[eval]". Expected WikiText-2 perplexity, sequence 2048, from the paper (arXiv
# 2412.00648), QuaRot / DFRot:
#
#                unquantized   w4a4kv4 rtn     w4a4kv4 gptq    w4a4kv16 rtn    w4a4kv16 gptq
#   llama2-7b    5.47          9.04 / 7.68     6.27 / 6.21     8.69 / 7.47     6.20 / 6.14
#   llama2-13b   4.88          6.31 / 6.21     5.51 / 5.47     6.23 / 6.12     5.47 / 5.39
#   llama3-8b    6.14          11.06 / 9.67    8.20 / 7.95     10.47 / 9.35    8.02 / 7.81
#   mistral-7b   5.32          6.38 / 6.36     5.81 / 5.81     6.29 / 6.27     5.75 / 5.76
#
# The third row of each group, `rangerot`, is ours and not in the paper. The paper's columns are taken as they come
# (--act-order False) and its Hessians see 128 sequences. Every number is also a line of JSON in OUT.
set -euo pipefail

case ${1:?which model} in
  llama2-7b) model=meta-llama/Llama-2-7b-hf ;;
  llama2-13b) model=meta-llama/Llama-2-13b-hf ;;
  llama3-8b) model=meta-llama/Meta-Llama-3-8B ;;
  mistral-7b) model=mistralai/Mistral-7B-v0.3 ;;
  qwen2-7b) model=Qwen/Qwen2-7B ;;
  *) echo "models: llama2-7b llama2-13b llama3-8b mistral-7b qwen2-7b" >&2; exit 2 ;;
esac
out=${2:?output directory}
device=${3:-cuda}
mkdir -p "$out"
zero_shot=piqa,winogrande,hellaswag,arc_easy,arc_challenge,lambada_openai

dfrot eval "$model" --ppl wikitext2 --tasks $zero_shot --device "$device" --json "$out/unquantized.json"
for weights in "rtn" "gptq --act-order False --calib-tokens 262144"; do
  for spec in w4a4kv4 w4a4kv16; do
    for method in "quarot" "dfrot --objective paper" "rangerot"; do
      name=${method// --objective /-}-${weights%% *}-$spec
      # shellcheck disable=SC2086 — the words of method and weights are meant to be split
      dfrot quantize "$model" -o "$out/$name" --method $method --weights $weights --spec "$spec" \
        --calib wikitext2 --device "$device"
      dfrot eval "$out/$name" --ppl wikitext2 --tasks $zero_shot --device "$device" --json "$out/$name.json"
    done
  done
done
