"""Nodes, cores and GPUs: what there is, what is free, and who holds which.

Pure bookkeeping: no I/O, no clock. Finding room costs the same for one node and for ten thousand, because
nodes are kept in buckets by what is free on them, and a bit mask says which buckets hold any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from executorlib.resources import Demand, Resources, check_ranks_of_nodes

if TYPE_CHECKING:
    from executorlib.machine import NodeShape


class _Row:
    """Nodes with the same number of GPUs available, in buckets by their available cores."""

    __slots__ = ("buckets", "mask")

    def __init__(self, most_cores: int) -> None:
        self.buckets: list[list[Node]] = [[] for _ in range(most_cores + 1)]
        self.mask = 0  # bit c: bucket c holds any

    def nodes(self, cores: int) -> Iterator[Node]:
        """Nodes with at least so many cores available, the fullest first."""
        mask = self.mask >> cores
        while mask:
            lowest = mask & -mask
            mask ^= lowest
            yield from reversed(self.buckets[cores + lowest.bit_length() - 1])


class Node:
    """A machine's share in the ledger.

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
        # Used as stacks from the end; reversed so that the lowest numbers go first.
        self.free_cores = list(cores)[::-1]
        self.free_gpus = list(gpus)[::-1]
        self.total_cores = len(self.free_cores)
        self.total_gpus = len(self.free_gpus)
        self.kept_for: Reservation | None = None
        self.kept = (0, 0)  # cores and GPUs
        # Where the ledger's index has it; not in any row once the node is lost.
        self.row: _Row | None = None
        self.column = 0
        self.position = 0

    @classmethod
    def of(cls, shape: NodeShape) -> Node:
        """A node with all that an allocation or an instance has there."""
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
        """Whether the node was removed from its ledger."""
        return self.row is None

    @property
    def idle(self) -> bool:
        """Whether nobody is on the node, and it is not kept for a call."""
        return len(self.free_cores) == self.total_cores and self.kept_for is None

    @property
    def keeps_all(self) -> bool:
        """Whether all that is kept for a call is there."""
        cores, gpus = self.kept
        return len(self.free_cores) >= cores and len(self.free_gpus) >= gpus


class Share(NamedTuple):
    """What is held on one node.

    Attributes:
        node: The node.
        cores: Core numbers.
        gpus: GPU device names.
    """

    node: Node
    cores: list[int]
    gpus: list[str]


class Allocation:
    """What one call or worker holds, until it is given back with `Ledger.release`.

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
        """What is held on each node; nodes with more ranks come first."""
        return [Share(self.node, self.cores, self.gpus), *self.further]

    def __repr__(self) -> str:
        held = "; ".join(f"{node.name}: cores {cores}, gpus {gpus}" for node, cores, gpus in self.shares)
        return f"<allocation on {held}>"


class Reservation:
    """Parts of nodes that are withheld from everybody but one call.

    Attributes:
        demand: What the call needs.
        nodes: The nodes, in the order of the demand's shares.
        lacking: On how many of them the call's share is not free yet.
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
        # By available GPUs. Idle nodes are apart: they are for those that need whole ones, as long as others will do.
        self._used = [_Row(most_cores) for _ in range(most_gpus + 1)]
        self._idle = [_Row(most_cores) for _ in range(most_gpus + 1)]
        for node in reversed(self.nodes):  # buckets are stacks: the first node is to go first
            self._insert(node)

    def could_hold(self, demand: Demand) -> bool:
        """Whether the demand can be met at all, once enough is free."""
        shares = demand.shares()
        largest, smallest = shares[0], shares[-1]
        return self._able(largest) >= shares.count(largest) and self._able(smallest) >= len(shares)

    def _able(self, share: tuple[int, int]) -> int:
        """How many nodes could hold the share when they are empty."""
        cores, gpus = share
        return sum(count for (most, devices), count in self._shapes.items() if most >= cores and devices >= gpus)

    def room_for(self, demand: Demand) -> int:
        """How many of a demand fit at once when all is free; where their shares differ, at most so many."""
        cores, gpus = demand.shares()[-1]
        places = []
        for (most, devices), count in self._shapes.items():
            fitting = min(total // need for total, need in ((most, cores), (devices, gpus)) if need)
            places.append((min(fitting, 1) if demand.exclusive else fitting, count))
        room = sum(each * count for each, count in places)
        # One takes no two places of a node.
        while room * demand.nodes > (usable := sum(min(each, room) * count for each, count in places)):
            room = usable // demand.nodes
        totals = [sum(node.total_cores for node in self.nodes), sum(node.total_gpus for node in self.nodes)]
        return min([room, *(total // need for total, need in zip(totals, demand, strict=False) if need)])

    def spread(self, resources: Resources) -> Demand | None:
        """What a call takes here: on ``num_nodes`` nodes or, where that is not given, on as few as can hold it.

        Returns:
            The demand; None where it can never be met.
        """
        if resources.num_nodes is not None:
            counts = range(resources.num_nodes, min(resources.num_nodes, resources.cores) + 1)
        else:
            most_cores = max((node.total_cores for node in self.nodes), default=0)
            fewest = -(-resources.cores // max(1, most_cores // resources.threads_per_core))
            counts = range(fewest, min(resources.cores, len(self.nodes)) + 1)
        return next((demand for demand in map(resources.demand_over, counts) if self.could_hold(demand)), None)

    def allocate(self, demand: Demand) -> Allocation | None:
        """Take what the demand needs, from the fullest nodes that have it; None where there are not enough.

        Nodes with few free GPUs come first, so that calls without GPUs leave the others to those that need them,
        and idle nodes last, so that they are left to those that need whole nodes.
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
        """Withhold what the demand needs from everybody else, on the nodes where it will fit soonest (most is free).

        Returns:
            The reservation, for `allocate_reserved` and `unreserve`; None where the demand could never be met by nodes
            that are not reserved already.
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
        """Take what was reserved if it is there by now, or in part on other nodes; the reservation ends with that."""
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
        """End a reservation."""
        for node in reservation.nodes:
            self._keep(node, None, (0, 0))

    def release(self, allocation: Allocation) -> None:
        """Give back what was taken, except on nodes that were removed meanwhile."""
        self._give_back(allocation.node, allocation.cores, allocation.gpus)
        for share in allocation.further:
            self._give_back(*share)

    def grow(self, node: Node, cores: Iterable[int]) -> None:
        """Add cores to a node of which nothing is reserved."""
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
        """Take a node out that is lost; a reservation that it is part of has to be ended before."""
        self._remove(node)
        node.row = None
        self.nodes.remove(node)
        self._shapes[node.total_cores, node.total_gpus] -= 1

    def free(self) -> tuple[int, int]:
        """Cores and GPUs that are free now, over all nodes."""
        return sum(len(node.free_cores) for node in self.nodes), sum(len(node.free_gpus) for node in self.nodes)

    def check_invariants(self) -> None:
        """Raise AssertionError where the index and the nodes disagree."""
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
        """The idle ones of these."""
        cores, gpus = share
        for row in self._idle[gpus:]:
            yield from row.nodes(cores)

    def _emptiest_first(self, share: tuple[int, int]) -> Iterator[Node]:
        """Nodes of which nothing is kept and that have the share when they are empty."""
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
    """What a call takes of nodes, after making sure that they can ever hold it.

    Args:
        nodes: All there are.
        resources: What the call needs.
        subject: Whose that is, for the error text.
        what: Whose the nodes are, likewise.
        advice: What to do, likewise.

    Raises:
        ValueError: They cannot, or it has no rank for each of its nodes.
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


def _choose(
    shares: list[tuple[int, int]],
    chosen: dict[Node, tuple[int, int]],
    fitting: Callable[[tuple[int, int]], Iterator[Node]],
) -> dict[Node, tuple[int, int]] | None:
    """Add a node for each share to those that are chosen already; None where there are not enough.

    Args:
        shares: Cores and GPUs, the larger first.
        chosen: Nodes with their shares.
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
    # Neighbouring cores share caches, and GPUs links, so several are taken in order.
    stack.sort(reverse=True)
    taken = stack[-count:][::-1]
    del stack[-count:]
    return taken
