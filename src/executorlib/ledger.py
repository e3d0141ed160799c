"""Nodes, cores and GPUs: what there is, what is free, and who holds which.

Pure bookkeeping: no I/O, no clock. Finding room costs the same for one node and for ten thousand, because
nodes are kept in buckets by what is free on them, and a bit mask says which buckets hold any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from executorlib.resources import Demand


class Node:
    """A machine's share in the ledger.

    Args:
        name: Host name.
        cores: Core (CPU) numbers.
        gpus: GPU device names.
    """

    __slots__ = ("free_cores", "free_gpus", "kept_for", "name", "total_cores", "total_gpus")

    def __init__(self, name: str, cores: Iterable[int], gpus: Iterable[str] = ()) -> None:
        self.name = name
        # Used as stacks from the end; reversed so that the lowest numbers go first.
        self.free_cores = list(cores)[::-1]
        self.free_gpus = list(gpus)[::-1]
        self.total_cores = len(self.free_cores)
        self.total_gpus = len(self.free_gpus)
        self.kept_for: Demand | None = None

    def cores_for(self, demand: Demand) -> int:
        """Cores that the demand takes on this node."""
        return self.total_cores if demand.exclusive else demand.cores

    def available(self) -> tuple[int, int]:
        """GPUs and cores that are free and not kept for a call."""
        kept = self.kept_for
        if kept is None:
            return len(self.free_gpus), len(self.free_cores)
        return max(0, len(self.free_gpus) - kept.gpus), max(0, len(self.free_cores) - self.cores_for(kept))

    def could_hold(self, demand: Demand) -> bool:
        """Whether the demand fits on the node when it is empty."""
        return demand.cores <= self.total_cores and demand.gpus <= self.total_gpus


class Allocation:
    """What one call or worker holds, until it is given back with `Ledger.release`.

    Attributes:
        node: The node.
        cores: Core numbers held on it.
        gpus: GPU device names held on it.
    """

    __slots__ = ("cores", "gpus", "node")

    def __init__(self, node: Node, cores: list[int], gpus: list[str]) -> None:
        self.node = node
        self.cores = cores
        self.gpus = gpus

    def __repr__(self) -> str:
        return f"<allocation on {self.node.name}: cores {self.cores}, gpus {self.gpus}>"


class Ledger:
    """The free resources of a set of nodes.

    Args:
        nodes: The nodes.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        most_gpus = max((node.total_gpus for node in self.nodes), default=0)
        most_cores = max((node.total_cores for node in self.nodes), default=0)
        # _buckets[g][c]: nodes with g GPUs and c cores free, in the order in which they got there.
        self._buckets: list[list[dict[Node, None]]] = [
            [{} for _ in range(most_cores + 1)] for _ in range(most_gpus + 1)
        ]
        self._masks = [0] * (most_gpus + 1)
        for node in self.nodes:
            self._insert(node)

    def could_hold(self, demand: Demand) -> bool:
        """Whether the demand can be met at all, once enough is free."""
        return any(node.could_hold(demand) for node in self.nodes)

    def allocate(self, demand: Demand) -> Allocation | None:
        """Take what the demand needs from one node, the fullest that has it; None where none has.

        Nodes with few free GPUs come first, so that calls without GPUs leave the others to those that need them.
        """
        need = demand.cores
        if demand.exclusive:
            node = self._idle_node(demand)
            if node is None:
                return None
        else:
            for gpus in range(demand.gpus, len(self._masks)):
                mask = self._masks[gpus] >> need
                if mask:
                    cores = need + (mask & -mask).bit_length() - 1
                    node = next(iter(self._buckets[gpus][cores]))
                    break
            else:
                return None
        return self._take(node, demand)

    def reserve(self, demand: Demand) -> Node | None:
        """Withhold what the demand needs from everybody else, on the node where it will fit soonest (most is free).

        Returns:
            The node, for `allocate_reserved` and `unreserve`; None where no node could ever hold the demand.
        """
        able = [node for node in self.nodes if node.kept_for is None and node.could_hold(demand)]
        if not able:
            return None
        node = max(able, key=lambda node: (len(node.free_cores), len(node.free_gpus)))
        self._remove(node)
        node.kept_for = demand
        self._insert(node)
        return node

    def allocate_reserved(self, node: Node, demand: Demand) -> Allocation | None:
        """Take the demand from a reserved node if it fits by now; the reservation ends with that."""
        if len(node.free_cores) < node.cores_for(demand) or len(node.free_gpus) < demand.gpus:
            return None
        self.unreserve(node)
        return self._take(node, demand)

    def unreserve(self, node: Node) -> None:
        """End a reservation."""
        self._remove(node)
        node.kept_for = None
        self._insert(node)

    def release(self, allocation: Allocation) -> None:
        """Give back what was taken."""
        node = allocation.node
        self._remove(node)
        node.free_cores += allocation.cores
        if allocation.gpus:
            node.free_gpus += allocation.gpus
        self._insert(node)

    def grow(self, node: Node, cores: Iterable[int]) -> None:
        """Add cores to a node."""
        added = list(cores)
        self._remove(node)
        node.free_cores[:0] = added
        node.total_cores += len(added)
        for row in self._buckets:
            row += [{} for _ in range(node.total_cores + 1 - len(row))]
        self._insert(node)

    def free(self) -> tuple[int, int]:
        """Cores and GPUs that are free now, over all nodes."""
        return sum(len(node.free_cores) for node in self.nodes), sum(len(node.free_gpus) for node in self.nodes)

    def check_invariants(self) -> None:
        """Raise AssertionError where the index and the nodes disagree."""
        for gpus, row in enumerate(self._buckets):
            for cores, bucket in enumerate(row):
                assert bool(bucket) == bool(self._masks[gpus] >> cores & 1)
                for node in bucket:
                    assert node.available() == (gpus, cores)
        assert sum(len(bucket) for row in self._buckets for bucket in row) == len(self.nodes)
        for node in self.nodes:
            assert len(set(node.free_cores)) == len(node.free_cores) <= node.total_cores
            assert len(set(node.free_gpus)) == len(node.free_gpus) <= node.total_gpus

    def _idle_node(self, demand: Demand) -> Node | None:
        for gpus in range(demand.gpus, len(self._masks)):
            for bucket in self._buckets[gpus][demand.cores :]:
                for node in bucket:
                    if len(node.free_cores) == node.total_cores and node.kept_for is None:
                        return node
        return None

    def _take(self, node: Node, demand: Demand) -> Allocation:
        self._remove(node)
        cores = _pop(node.free_cores, node.cores_for(demand))
        gpus = _pop(node.free_gpus, demand.gpus) if demand.gpus else []
        self._insert(node)
        return Allocation(node, cores, gpus)

    def _insert(self, node: Node) -> None:
        gpus, cores = node.available()
        self._buckets[gpus][cores][node] = None
        self._masks[gpus] |= 1 << cores

    def _remove(self, node: Node) -> None:
        gpus, cores = node.available()
        bucket = self._buckets[gpus][cores]
        del bucket[node]
        if not bucket:
            self._masks[gpus] &= ~(1 << cores)


class Unlimited(Ledger):
    """Resources that somebody else counts, such as a cluster's: there is always room.

    Args:
        name: What stands for the node.
    """

    def __init__(self, name: str) -> None:
        super().__init__([Node(name, ())])

    def could_hold(self, demand: Demand) -> bool:
        """See `Ledger.could_hold`."""
        return True

    def allocate(self, demand: Demand) -> Allocation:
        """See `Ledger.allocate`; the allocation names no cores."""
        return Allocation(self.nodes[0], [], [])

    def release(self, allocation: Allocation) -> None:
        """See `Ledger.release`."""


def _pop(stack: list[int] | list[str], count: int) -> list:  # type: ignore[type-arg]
    if count == 1:
        return [stack.pop()]
    # Neighbouring cores share caches, and GPUs links, so several are taken in order.
    stack.sort(reverse=True)
    taken = stack[-count:][::-1]
    del stack[-count:]
    return taken
