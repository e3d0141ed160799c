"""Keeps account of nodes, cores and GPUs: what there is, what is free, and who holds what.

Pure bookkeeping: no I/O, no clock. Finding room costs the same for one node as for ten thousand, because nodes are kept
in buckets by what they have free, and a bit mask tells which buckets are not empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from executorlib.resources import Demand, Resources, check_ranks_of_nodes

if TYPE_CHECKING:
    from executorlib.machine import NodeShape


class _Row:
    """Nodes with the same number of available GPUs, in buckets by their available cores."""

    __slots__ = ("buckets", "mask")

    def __init__(self, most_cores: int) -> None:
        self.buckets: list[list[Node]] = [[] for _ in range(most_cores + 1)]
        self.mask = 0  # bit c is set if bucket c is not empty

    def nodes(self, cores: int) -> Iterator[Node]:
        """Nodes with at least this many cores available, the fullest first."""
        mask = self.mask >> cores
        while mask:
            lowest = mask & -mask
            mask ^= lowest
            yield from reversed(self.buckets[cores + lowest.bit_length() - 1])


class Node:
    """The record of one machine in the ledger.

    Args:
        name: Host name.
        cores: Core (CPU) numbers.
        gpus: GPU device names.
    """

    __slots__ = (
        "column",
        "free_cores",
        "free_gpus",
        "kept",
        "kept_for",
        "name",
        "position",
        "row",
        "total_cores",
        "total_gpus",
    )

    def __init__(self, name: str, cores: Iterable[int], gpus: Iterable[str] = ()) -> None:
        self.name = name
        # Both are stacks, popped from the end; reversed so that the lowest numbers are taken first.
        self.free_cores = list(cores)[::-1]
        self.free_gpus = list(gpus)[::-1]
        self.total_cores = len(self.free_cores)
        self.total_gpus = len(self.free_gpus)
        self.kept_for: Reservation | None = None
        self.kept = (0, 0)  # cores and GPUs
        # The node's place in the ledger's index. A lost node is in no row.
        self.row: _Row | None = None
        self.column = 0
        self.position = 0

    @classmethod
    def of(cls, shape: NodeShape) -> Node:
        """A node with everything that an allocation or an instance has there."""
        return cls(shape.name, range(shape.cpus), shape.gpus)

    def __repr__(self) -> str:
        return f"<node {self.name}>"

    def available(self) -> tuple[int, int]:
        """GPUs and cores that are free and not kept for a call."""
        if self.kept_for is None:
            return len(self.free_gpus), len(self.free_cores)
        cores, gpus = self.kept
        return max(0, len(self.free_gpus) - gpus), max(0, len(self.free_cores) - cores)

    @property
    def lost(self) -> bool:
        """True if the node was removed from its ledger."""
        return self.row is None

    @property
    def idle(self) -> bool:
        """True if nothing on the node is held or kept for a call."""
        return len(self.free_cores) == self.total_cores and self.kept_for is None

    @property
    def keeps_all(self) -> bool:
        """True if everything that is kept for a call is free by now."""
        cores, gpus = self.kept
        return len(self.free_cores) >= cores and len(self.free_gpus) >= gpus


class Share(NamedTuple):
    """The resources that are held on one node.

    Attributes:
        node: The node.
        cores: Core numbers.
        gpus: GPU device names.
    """

    node: Node
    cores: list[int]
    gpus: list[str]


class Allocation:
    """The resources that one call or worker holds until `Ledger.release` gives it back.

    Attributes:
        node: The node, or the first of several.
        cores: Core numbers held on it.
        gpus: GPU device names held on it.
        further: What is held on other nodes.
    """

    __slots__ = ("cores", "further", "gpus", "node")

    def __init__(self, node: Node, cores: list[int], gpus: list[str], further: tuple[Share, ...] = ()) -> None:
        self.node = node
        self.cores = cores
        self.gpus = gpus
        self.further = further

    @property
    def shares(self) -> list[Share]:
        """The share held on each node; nodes with more ranks come first."""
        return [Share(self.node, self.cores, self.gpus), *self.further]

    def __repr__(self) -> str:
        held = "; ".join(f"{node.name}: cores {cores}, gpus {gpus}" for node, cores, gpus in self.shares)
        return f"<allocation on {held}>"


class Reservation:
    """Parts of nodes that are kept for one call and withheld from all others.

    Attributes:
        demand: What the call needs.
        nodes: The nodes, in the order of the demand's shares.
        lacking: On how many of the nodes the call's share is not free yet.
    """

    __slots__ = ("demand", "lacking", "nodes")

    def __init__(self, demand: Demand, nodes: list[Node]) -> None:
        self.demand = demand
        self.nodes = nodes
        self.lacking = 0


class Ledger:
    """The free resources of a set of nodes.

    Args:
        nodes: The nodes.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self._shapes = Counter((node.total_cores, node.total_gpus) for node in self.nodes)
        most_cores = max((node.total_cores for node in self.nodes), default=0)
        most_gpus = max((node.total_gpus for node in self.nodes), default=0)
        # Rows by available GPUs. Idle nodes are apart: calls that need no whole node take other nodes first.
        self._used = [_Row(most_cores) for _ in range(most_gpus + 1)]
        self._idle = [_Row(most_cores) for _ in range(most_gpus + 1)]
        for node in reversed(self.nodes):  # buckets are stacks, and the first node is to be taken first
            self._insert(node)

    def could_hold(self, demand: Demand) -> bool:
        """Return whether the demand can ever be met, once enough is free."""
        shares = demand.shares()
        largest, smallest = shares[0], shares[-1]
        return self._able(largest) >= shares.count(largest) and self._able(smallest) >= len(shares)

    def _able(self, share: tuple[int, int]) -> int:
        """Return how many nodes could hold the share if they were empty."""
        cores, gpus = share
        return sum(count for (most, devices), count in self._shapes.items() if most >= cores and devices >= gpus)

    def room_for(self, demand: Demand) -> int:
        """Return how many calls of this demand fit at once when all is free: an upper bound if its shares differ."""
        cores, gpus = demand.shares()[-1]
        places = []
        for (most, devices), count in self._shapes.items():
            fitting = min(total // need for total, need in ((most, cores), (devices, gpus)) if need)
            places.append((min(fitting, 1) if demand.exclusive else fitting, count))
        room = sum(each * count for each, count in places)
        # A call cannot use the same node twice.
        while room * demand.nodes > (usable := sum(min(each, room) * count for each, count in places)):
            room = usable // demand.nodes
        totals = [sum(node.total_cores for node in self.nodes), sum(node.total_gpus for node in self.nodes)]
        return min([room, *(total // need for total, need in zip(totals, demand, strict=False) if need)])

    def spread(self, resources: Resources) -> Demand | None:
        """Decide what a call takes here: on ``num_nodes`` nodes or, without that, on as few nodes as can hold it.

        Returns:
            The demand; None if it can never be met.
        """
        if resources.num_nodes is not None:
            counts = range(resources.num_nodes, min(resources.num_nodes, resources.cores) + 1)
        else:
            most_cores = max((node.total_cores for node in self.nodes), default=0)
            fewest = -(-resources.cores // max(1, most_cores // resources.threads_per_core))
            counts = range(fewest, min(resources.cores, len(self.nodes)) + 1)
        return next((demand for demand in map(resources.demand_over, counts) if self.could_hold(demand)), None)

    def allocate(self, demand: Demand) -> Allocation | None:
        """Take what the demand needs, from the fullest nodes that have it; None if there is not enough.

        Nodes with few free GPUs come first, so that calls without GPUs leave the others to calls that need them.
        Idle nodes come last, so that they are left to calls that need whole nodes.
        """
        if demand.nodes > 1:
            chosen = _choose(demand.shares(), {}, self._fitting_idle if demand.exclusive else self._fitting)
            return None if chosen is None else self._take_all(chosen, demand)
        need = demand.cores
        for gpus in range(demand.gpus, len(self._idle)):
            row = self._used[gpus]
            mask = 0 if demand.exclusive else row.mask >> need
            if not mask:
                row = self._idle[gpus]
                mask = row.mask >> need
            if mask:
                node = row.buckets[need + (mask & -mask).bit_length() - 1][-1]
                return Allocation(*self._take(node, node.total_cores if demand.exclusive else need, demand.gpus))
        return None

    def reserve(self, demand: Demand) -> Reservation | None:
        """Keep what the demand needs from all other calls, on the nodes where it will fit soonest (where most is free).

        Returns:
            The reservation, for `allocate_reserved` and `unreserve`; None if the nodes that are not reserved already
            could never meet the demand.
        """
        chosen = _choose(demand.shares(), {}, self._emptiest_first)
        if chosen is None:
            return None
        reservation = Reservation(demand, list(chosen))
        for node, (cores, gpus) in chosen.items():
            self._keep(node, reservation, (node.total_cores if demand.exclusive else cores, gpus))
            reservation.lacking += not node.keeps_all
        return reservation

    def allocate_reserved(self, reservation: Reservation) -> Allocation | None:
        """Take what was reserved once all is there, using other nodes for missing shares; this ends the reservation."""
        demand = reservation.demand
        if reservation.lacking:
            there: dict[Node, tuple[int, int]] = {}
            elsewhere = []
            for node, share in zip(reservation.nodes, demand.shares(), strict=True):
                if node.keeps_all:
                    there[node] = share
                else:
                    elsewhere.append(share)
            chosen = _choose(elsewhere, there, self._fitting_idle if demand.exclusive else self._fitting)
            if chosen is None:
                return None
        else:
            chosen = dict(zip(reservation.nodes, demand.shares(), strict=True))
        self.unreserve(reservation)
        return self._take_all(chosen, demand)

    def unreserve(self, reservation: Reservation) -> None:
        """End a reservation without taking anything."""
        for node in reservation.nodes:
            self._keep(node, None, (0, 0))

    def release(self, allocation: Allocation) -> None:
        """Give back what was taken, except on nodes that have been removed since."""
        self._give_back(allocation.node, allocation.cores, allocation.gpus)
        for share in allocation.further:
            self._give_back(*share)

    def grow(self, node: Node, cores: Iterable[int]) -> None:
        """Add cores to a node on which nothing is reserved."""
        added = list(cores)
        self._remove(node)
        self._shapes[node.total_cores, node.total_gpus] -= 1
        node.free_cores[:0] = added
        node.total_cores += len(added)
        self._shapes[node.total_cores, node.total_gpus] += 1
        for row in self._used + self._idle:
            row.buckets += [[] for _ in range(node.total_cores + 1 - len(row.buckets))]
        self._insert(node)

    def remove(self, node: Node) -> None:
        """Remove a lost node. A reservation that includes it must have been ended before."""
        self._remove(node)
        node.row = None
        self.nodes.remove(node)
        self._shapes[node.total_cores, node.total_gpus] -= 1

    def free(self) -> tuple[int, int]:
        """Cores and GPUs that are free now on all nodes together."""
        return sum(len(node.free_cores) for node in self.nodes), sum(len(node.free_gpus) for node in self.nodes)

    def check_invariants(self) -> None:
        """Raise AssertionError if the index and the nodes disagree."""
        indexed = 0
        for rows in (self._used, self._idle):
            for gpus, row in enumerate(rows):
                for cores, bucket in enumerate(row.buckets):
                    assert bool(bucket) == bool(row.mask >> cores & 1)
                    indexed += len(bucket)
                    for position, node in enumerate(bucket):
                        assert node.available() == (gpus, cores)
                        assert node.idle == (rows is self._idle)
                        assert (node.row, node.column, node.position) == (row, cores, position)
        assert indexed == len(self.nodes)
        assert +self._shapes == Counter((node.total_cores, node.total_gpus) for node in self.nodes)
        for node in self.nodes:
            assert len(set(node.free_cores)) == len(node.free_cores) <= node.total_cores
            assert len(set(node.free_gpus)) == len(node.free_gpus) <= node.total_gpus
            assert node.kept_for is not None or node.kept == (0, 0)
        for reservation in {node.kept_for for node in self.nodes if node.kept_for is not None}:
            assert reservation.lacking == sum(not node.keeps_all for node in reservation.nodes)

    def _fitting(self, share: tuple[int, int]) -> Iterator[Node]:
        """Nodes that have the share available, in the order in which `allocate` takes them."""
        cores, gpus = share
        for rows in zip(self._used[gpus:], self._idle[gpus:], strict=True):
            for row in rows:
                yield from row.nodes(cores)

    def _fitting_idle(self, share: tuple[int, int]) -> Iterator[Node]:
        """Idle nodes that have the share available, in the same order."""
        cores, gpus = share
        for row in self._idle[gpus:]:
            yield from row.nodes(cores)

    def _emptiest_first(self, share: tuple[int, int]) -> Iterator[Node]:
        """Nodes that could hold the share when empty and on which nothing is kept, those with most available first."""
        cores, gpus = share
        for column in range(len(self._idle[0].buckets) - 1, -1, -1):
            for rows in (self._idle, self._used):
                for row in reversed(rows):
                    for node in row.buckets[column]:
                        if node.kept_for is None and cores <= node.total_cores and gpus <= node.total_gpus:
                            yield node

    def _take_all(self, chosen: dict[Node, tuple[int, int]], demand: Demand) -> Allocation:
        # Larger shares first, as `Demand.shares` has them.
        ordered = sorted(chosen.items(), key=lambda item: item[1], reverse=True)
        first, *further = [
            self._take(node, node.total_cores if demand.exclusive else cores, gpus) for node, (cores, gpus) in ordered
        ]
        return Allocation(*first, tuple(further))

    def _take(self, node: Node, cores: int, gpus: int) -> Share:
        self._remove(node)
        share = Share(node, _pop(node.free_cores, cores), _pop(node.free_gpus, gpus) if gpus else [])
        self._insert(node)
        return share

    def _give_back(self, node: Node, cores: list[int], gpus: list[str]) -> None:
        if node.row is None:
            return
        self._remove(node)
        reservation = node.kept_for
        kept_all = reservation is None or node.keeps_all
        node.free_cores += cores
        if gpus:
            node.free_gpus += gpus
        if reservation is not None and not kept_all:
            reservation.lacking -= node.keeps_all
        self._insert(node)

    def _keep(self, node: Node, reservation: Reservation | None, kept: tuple[int, int]) -> None:
        self._remove(node)
        node.kept_for = reservation
        node.kept = kept
        self._insert(node)

    def _insert(self, node: Node) -> None:
        cores = len(node.free_cores)
        gpus = len(node.free_gpus)
        if node.kept_for is not None:
            gpus, cores = node.available()
            row = self._used[gpus]
        else:
            row = (self._idle if cores == node.total_cores else self._used)[gpus]
        bucket = row.buckets[cores]
        if not bucket:
            row.mask |= 1 << cores
        node.row = row
        node.column = cores
        node.position = len(bucket)
        bucket.append(node)

    def _remove(self, node: Node) -> None:
        row = node.row
        assert row is not None
        bucket = row.buckets[node.column]
        last = bucket.pop()
        if last is not node:
            bucket[node.position] = last
            last.position = node.position
        elif not bucket:
            row.mask ^= 1 << node.column


def spread_over(nodes: Ledger, resources: Resources, subject: str, what: str, advice: str) -> Demand:
    """Decide what a call takes of the nodes, after making sure that they can ever hold it.

    Args:
        nodes: All nodes.
        resources: What the call needs.
        subject: Who needs the resources, for the error text.
        what: Whose nodes they are, for the error text.
        advice: What to do, for the error text.

    Raises:
        ValueError: They cannot hold it, or it has fewer ranks than nodes.
    """
    check_ranks_of_nodes(resources, subject)
    spread = nodes.spread(resources)
    if spread is None:
        demand = resources.demand
        cores = max((node.total_cores for node in nodes.nodes), default=0)
        gpus = max((node.total_gpus for node in nodes.nodes), default=0)
        on = "" if resources.num_nodes is None else f" on num_nodes={resources.num_nodes}"
        raise ValueError(
            f"{subject} needs {demand.cores} cores and {demand.gpus} GPUs{on} (cores={resources.cores}, "
            f"threads_per_core={resources.threads_per_core}, gpus_per_core={resources.gpus_per_core}), but {what} has "
            f"{len(nodes.nodes)} nodes of at most {cores} cores and {gpus} GPUs. {advice}"
        )
    return spread


class Unlimited(Ledger):
    """Resources that something else counts, such as a cluster's scheduler: there is always room.

    Args:
        name: Name of the node that stands for all of them.
    """

    def __init__(self, name: str) -> None:
        super().__init__([Node(name, ())])

    def could_hold(self, demand: Demand) -> bool:
        """Always true."""
        return True

    def allocate(self, demand: Demand) -> Allocation:
        """Always succeeds; the allocation names no cores."""
        return Allocation(self.nodes[0], [], [])

    def release(self, allocation: Allocation) -> None:
        """Nothing was taken, so nothing is given back."""


def _choose(
    shares: list[tuple[int, int]],
    chosen: dict[Node, tuple[int, int]],
    fitting: Callable[[tuple[int, int]], Iterator[Node]],
) -> dict[Node, tuple[int, int]] | None:
    """Choose a node for each share, in addition to those already chosen; None if there are not enough.

    Args:
        shares: Cores and GPUs, the larger first.
        chosen: Nodes with their shares; the new ones are added.
        fitting: Gives the nodes for a share, in the order in which to take them.
    """
    size: tuple[int, int] | None = None
    nodes: Iterator[Node] = iter(())
    for share in shares:
        if share != size:
            size = share
            nodes = fitting(share)
        node = next((node for node in nodes if node not in chosen), None)
        if node is None:
            return None
        chosen[node] = share
    return chosen


def _pop(stack: list[int] | list[str], count: int) -> list:  # type: ignore[type-arg]
    if count == 1:
        return [stack.pop()]
    # Neighbouring cores share caches, and neighbouring GPUs links, so several are taken in order.
    stack.sort(reverse=True)
    taken = stack[-count:][::-1]
    del stack[-count:]
    return taken
