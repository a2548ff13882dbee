#!/usr/bin/env bash
# DFRot's main table, rows with round-to-nearest weights: QuaRot and DFRot on one of the paper's models.
#
#   runs/dfrot_rtn.sh llama2-7b OUT [DEVICE]
#
# Hardware: one GPU that holds the model in 16 bits (7B: 24 GB, 13B: 40 GB). Not run by us yet: no GPU was at
# hand. Expected WikiText-2 perplexity, sequence 2048, from the paper (arXiv 2412.00648), QuaRot / DFRot:
#
#                unquantized   w4a4kv4         w4a4kv16
#   llama2-7b    5.47          9.04 / 7.68     8.69 / 7.47
#   llama2-13b   4.88          6.31 / 6.21     6.23 / 6.12
#   llama3-8b    6.14          11.06 / 9.67    10.47 / 9.35
#   mistral-7b   5.32          6.38 / 6.36     6.29 / 6.27
#
# The third row, `dfrot` with our solver, is not in the paper. Every number is also a line of JSON in OUT.
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

dfrot eval "$model" --ppl wikitext2 --device "$device" --json "$out/unquantized.json"
for spec in w4a4kv4 w4a4kv16; do
  for method in "quarot" "dfrot --objective paper" "dfrot"; do
    name=${method// --objective /-}-$spec
    # shellcheck disable=SC2086 — the words of the method are meant to be split
    dfrot quantize "$model" -o "$out/$name" --method $method --spec "$spec" --calib wikitext2 --device "$device"
    dfrot eval "$out/$name" --ppl wikitext2 --device "$device" --json "$out/$name.json"
  done
done
