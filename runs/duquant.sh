#!/usr/bin/env bash
# DuQuant's main table: w4a4 with fixed clip ratios and with learned clipping, on one of the paper's models.
#
#   runs/duquant.sh llama2-7b OUT [DEVICE]
#
# Hardware: one GPU that holds a decoder block and 128 × 2048 hidden states in float32, twice for LWC (7B: 24 GB, 13B: 40 GB).
# Not run by us yet: no GPU was at hand. Zero-shot tasks and MMLU need lm-eval: pip install "dfrot[eval]". Expected WikiText-2
# perplexity, sequence 2048, from the paper (arXiv 2406.01721):
#
#                unquantized   DuQuant   DuQuant + LWC
#   llama2-7b    5.47          6.28      6.08
#   llama2-13b   4.88          5.42      5.33
#   llama3-8b    6.14          8.56      8.06
#   mistral-7b   5.32          5.86      –
#
# The rows with GPTQ, and those on top of QuaRot's folded rotations, are not in the paper. Every number is also JSON in OUT.
set -euo pipefail

case ${1:?which model} in
  llama1-7b) model=huggyllama/llama-7b ;;
  llama2-7b) model=meta-llama/Llama-2-7b-hf ;;
  llama2-13b) model=meta-llama/Llama-2-13b-hf ;;
  llama3-8b) model=meta-llama/Meta-Llama-3-8B ;;
  vicuna-7b) model=lmsys/vicuna-7b-v1.5 ;;
  mistral-7b) model=mistralai/Mistral-7B-v0.3 ;;
  *) echo "models: llama1-7b llama2-7b llama2-13b llama3-8b vicuna-7b mistral-7b" >&2; exit 2 ;;
esac
out=${2:?output directory}
device=${3:-cuda}
mkdir -p "$out"
zero_shot=piqa,arc_easy,arc_challenge,hellaswag,winogrande,mmlu

dfrot eval "$model" --ppl wikitext2 c4 --tasks $zero_shot --device "$device" --json "$out/unquantized.json"
for weights in "rtn" "lwc --calib-tokens 262144" "gptq --calib-tokens 262144 --weight-clip search"; do
  for base in none quarot; do
    name=duquant-$base-${weights%% *}
    # shellcheck disable=SC2086 — the words of the rounding are meant to be split
    dfrot quantize "$model" -o "$out/$name" --method duquant --base $base --preset duquant --weights $weights \
      --spec w4a4kv4 --calib wikitext2 --device "$device"
    dfrot eval "$out/$name" --ppl wikitext2 c4 --tasks $zero_shot --device "$device" --json "$out/$name.json"
  done
done
