"""The statistics in a few lines, for the terminal."""

import statistics
from collections import Counter

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dfrot.inspect.schema import Stats

LISTED = 5  # massive tokens


def summary(stats: Stats) -> Group:
    """A row for every rotation, and the tokens that are massive in most norms."""
    table = Table("rotation", "error: ordinary", "massive", "kurtosis", "sensitivity, nats")
    for name in stats["rotations"]:
        error, by_block = stats["error"][name], stats["sensitivity"].get(name)
        table.add_row(
            name,
            *("—" if mean is None else f"{mean:.4f}" for mean in (error["ordinary"], error["massive"])),
            f"{statistics.mean(stats['kurtosis'][name]):.2f}",
            "—" if by_block is None else f"{sum(by_block):.4f}",
        )
    lines = [f"{len(stats['massive'])} norm outputs of {len(stats['norms'])} norms with massive activations"]
    seen = Counter((token["position"], token["token"], token["channel"]) for token in stats["massive"])
    for (position, token, channel), norms in seen.most_common(LISTED):
        lines.append(f"position {position} {token!r}, channel {channel}: in {norms} norms")
    return Group(table, *map(Text, lines))
