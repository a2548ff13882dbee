"""What tuning after rounding brings: perplexity, KL divergence and seconds by recipe, parts and steps, in a table.

    python benchmarks/tuning.py OUT --calib TEXT --ppl TEXT TEXT [--device cuda] [--seeds 0,1,2] [--tune none,all]

Every recipe is quantized once a seed, where `none` is among the rows; the tuned ones then start from the same blocks.
Of several seeds the table shows means, with their standard deviation. One of the texts should be of another kind than
the one that is tuned on, to show whether tuning only learned that kind. Finished rows are lines of OUT/results.jsonl
and are not measured again.

On a GPU, the full budget: --steps 170 --tokens 8192 --seq-len 1024. On two cores: --steps 100.
"""

from rows import measure, parser, quantized, unquantized


def main() -> None:
    given = parser(__doc__).parse_args()
    measure(given, {**unquantized(given), **quantized(given)})


if __name__ == "__main__":
    main()
