"""Lists of nodes and numbers, as queuing systems write them."""

from __future__ import annotations

import re
from collections.abc import Iterator


def expand_hosts(text: str) -> list[str]:
    """Expand a list of nodes such as ``login,node[1,3-4],rack[0-1]n[08-10]``."""
    # Split only at commas outside of brackets.
    return [name for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text) for name in _expand_item(item)]


def _expand_item(item: str) -> Iterator[str]:
    head, bracket, rest = item.partition("[")
    if not bracket:
        yield head
        return
    ranges, _, tail = rest.partition("]")
    tails = list(_expand_item(tail))
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for end in tails:
                yield f"{head}{number:0{len(first)}d}{end}"


def expand_ranges(text: str) -> list[int]:
    """Expand numbers such as ``0-2,5``."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def expand_repeated(text: str) -> list[int]:
    """Expand counts such as ``4(x2),1``."""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts
