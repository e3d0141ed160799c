"""The ledger against a model that searches all nodes, and what its index costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from executorlib.core import ledger as module
from executorlib.core.ledger import Allocation, Ledger, Node, Reservation, spread_over
from executorlib.resources import Demand, Resources
from unit.properties import examples, repeatable


def spread(nodes: int, further: int, cores: int, gpus: int = 0, exclusive: bool = False) -> Demand:
    """A demand of several nodes: that many ranks and some more, each with these cores and GPUs."""
    ranks = nodes + further
    return Demand(ranks * cores, ranks * gpus, exclusive, nodes, ranks)


rarely = st.booleans() | st.just(False)
demands = st.one_of(
    st.builds(Demand, st.integers(1, 6), st.integers(0, 3), rarely, st.just(1), st.just(1)),
    st.builds(spread, st.integers(2, 3), st.integers(0, 4), st.integers(1, 2), st.integers(0, 1), rarely),
)


class AgainstModel(RuleBasedStateMachine):
    """Every operation, beside a model that knows only who holds what and looks at every node."""

    @initialize(shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=4))
    def set_up(self, shapes: list[tuple[int, int]]) -> None:
        self.nodes = [
            # Core numbers and GPU names as a cpuset and CUDA_VISIBLE_DEVICES may leave them.
            Node(f"node{index}", range(10, 10 + cores), [f"GPU-{gpu}" for gpu in range(gpus)])
            for index, (cores, gpus) in enumerate(shapes)
        ]
        self.ledger = Ledger(self.nodes)
        self.all_cores = {node: set(range(10, 10 + node.total_cores)) for node in self.nodes}
        self.all_gpus = {node: set(node.free_gpus) for node in self.nodes}
        self.held: list[Allocation] = []
        self.reserved: list[Reservation] = []
        self.kept: dict[Node, tuple[int, int]] = {}

    def free_cores(self, node: Node) -> set[int]:
        held = {core for each in self.held for share in each.shares if share.node is node for core in share.cores}
        return self.all_cores[node] - held

    def free_gpus(self, node: Node) -> set[str]:
        held = {gpu for each in self.held for share in each.shares if share.node is node for gpu in share.gpus}
        return self.all_gpus[node] - held

    def is_idle(self, node: Node) -> bool:
        return self.free_cores(node) == self.all_cores[node]

    def available(self, node: Node) -> tuple[int, int]:
        """GPUs and cores for anybody: what is kept for a call is for that call alone."""
        cores, gpus = self.kept.get(node, (0, 0))
        return max(0, len(self.free_gpus(node)) - gpus), max(0, len(self.free_cores(node)) - cores)

    def fits(self, demand: Demand, share: tuple[int, int], node: Node) -> bool:
        """Return whether anybody may have the share there."""
        gpus, cores = self.available(node)
        if demand.exclusive and (node in self.kept or not self.is_idle(node)):
            return False
        return cores >= share[0] and gpus >= share[1]

    def keeps_all(self, node: Node) -> bool:
        cores, gpus = self.kept[node]
        return len(self.free_cores(node)) >= cores and len(self.free_gpus(node)) >= gpus

    def could_hold(self, demand: Demand, nodes: list[Node]) -> bool:
        """Return whether enough empty nodes exist. One for a large share does for a small one, too."""
        shapes = [(len(self.all_cores[node]), len(self.all_gpus[node])) for node in nodes]
        return all(
            sum(most >= cores and devices >= gpus for most, devices in shapes) >= place
            for place, (cores, gpus) in enumerate(demand.shares(), 1)
        )

    def order(self, node: Node) -> tuple[int, bool, int]:
        """Who goes first: few GPUs, then in use, then few cores."""
        gpus, cores = self.available(node)
        return gpus, self.is_idle(node) and node not in self.kept, cores

    def check_taken(self, taken: Allocation, demand: Demand) -> None:
        """The taken resources were free and are those requested. The ledger lists neighbours in order."""
        assert len({share.node for share in taken.shares}) == demand.nodes
        assert taken.shares[0] == (taken.node, taken.cores, taken.gpus)
        for (node, cores, gpus), (need, devices) in zip(taken.shares, demand.shares(), strict=True):
            assert set(cores) <= self.free_cores(node)
            assert set(gpus) <= self.free_gpus(node)
            assert len(set(gpus)) == len(gpus) == devices
            assert len(set(cores)) == len(cores) == (len(self.all_cores[node]) if demand.exclusive else need)
            assert cores == sorted(cores)
        self.held.append(taken)

    @rule(demand=demands)
    def allocate(self, demand: Demand) -> None:
        shares = demand.shares()
        fitting = [[node for node in self.nodes if self.fits(demand, share, node)] for share in shares]
        room = all(len(nodes) >= place for place, nodes in enumerate(fitting, 1))
        best = min(map(self.order, fitting[0]), default=None)
        taken = self.ledger.allocate(demand)
        assert (taken is not None) == room
        if taken is not None:
            orders = [self.order(share.node) for share in taken.shares]
            assert best in orders
            self.check_taken(taken, demand)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1), label="index")
        self.ledger.release(self.held.pop(index))

    @rule(demand=demands)
    def reserve(self, demand: Demand) -> None:
        able = self.could_hold(demand, [node for node in self.nodes if node not in self.kept])
        reservation = self.ledger.reserve(demand)
        assert (reservation is not None) == able
        if reservation is not None:
            for node, (cores, gpus) in zip(reservation.nodes, demand.shares(), strict=True):
                assert node not in self.kept
                self.kept[node] = (len(self.all_cores[node]) if demand.exclusive else cores, gpus)
            self.reserved.append(reservation)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def allocate_reserved(self, data: st.DataObject) -> None:
        reservation = self.reserved[data.draw(st.integers(0, len(self.reserved) - 1), label="reservation")]
        demand = reservation.demand
        there = [node for node in reservation.nodes if self.keeps_all(node)]
        others = [share for node, share in zip(reservation.nodes, demand.shares(), strict=True) if node not in there]
        room = all(
            sum(self.fits(demand, share, node) for node in self.nodes if node not in there) >= place
            for place, share in enumerate(others, 1)
        )
        taken = self.ledger.allocate_reserved(reservation)
        assert (taken is not None) == room
        if taken is not None:
            assert set(there) <= {share.node for share in taken.shares}
            self.forget(reservation)
            self.check_taken(taken, demand)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def unreserve(self, data: st.DataObject) -> None:
        reservation = self.reserved[data.draw(st.integers(0, len(self.reserved) - 1), label="reservation")]
        self.ledger.unreserve(reservation)
        self.forget(reservation)

    def forget(self, reservation: Reservation) -> None:
        self.reserved.remove(reservation)
        for node in reservation.nodes:
            del self.kept[node]

    @precondition(lambda self: set(self.nodes) - set(self.kept))
    @rule(data=st.data(), count=st.integers(0, 3))
    def grow(self, data: st.DataObject, count: int) -> None:
        node = data.draw(st.sampled_from([node for node in self.nodes if node not in self.kept]), label="node")
        first = max(self.all_cores[node]) + 1
        self.ledger.grow(node, range(first, first + count))
        self.all_cores[node] |= set(range(first, first + count))

    @precondition(lambda self: set(self.nodes) - set(self.kept))
    @rule(data=st.data(), sure=st.sampled_from([True, False, False, False]))
    def remove(self, data: st.DataObject, sure: bool) -> None:
        """Resources that are held there stay held, and do not count once they are given back."""
        if not sure:
            return
        node = data.draw(st.sampled_from([node for node in self.nodes if node not in self.kept]), label="node")
        self.ledger.remove(node)
        assert node.lost
        self.nodes = [each for each in self.nodes if each is not node]

    @rule(demand=demands)
    def could_hold_at_all(self, demand: Demand) -> None:
        assert self.ledger.could_hold(demand) == self.could_hold(demand, self.nodes)

    @invariant()
    def agrees(self) -> None:
        self.ledger.check_invariants()
        assert self.ledger.nodes == self.nodes
        for node in self.nodes:
            assert set(node.free_cores) == self.free_cores(node)
            assert set(node.free_gpus) == self.free_gpus(node)
            assert (node.kept_for is not None) == (node in self.kept)
        for reservation in self.reserved:
            assert reservation.lacking == sum(not self.keeps_all(node) for node in reservation.nodes)
        assert self.ledger.free() == (
            sum(len(self.free_cores(node)) for node in self.nodes),
            sum(len(self.free_gpus(node)) for node in self.nodes),
        )

    def teardown(self) -> None:
        """Whatever came before: once all is given back, all is there."""
        if not hasattr(self, "ledger"):
            return
        for reservation in self.reserved:
            self.ledger.unreserve(reservation)
        for allocation in self.held:
            self.ledger.release(allocation)
        self.held.clear()
        self.reserved.clear()
        self.kept.clear()
        self.agrees()


AgainstModel.TestCase.settings = settings(repeatable, max_examples=examples(60), stateful_step_count=40)
test_against_model = AgainstModel.TestCase


def test_lowest_numbers_first_and_neighbours_together() -> None:
    ledger = Ledger([Node("localhost", [4, 5, 6, 7], ["0", "1"])])
    one, pair = ledger.allocate(Demand(1)), ledger.allocate(Demand(2, 1))
    assert one is not None
    assert pair is not None
    assert (one.cores, one.gpus) == ([4], [])
    assert (pair.cores, pair.gpus) == ([5, 6], ["0"])


def test_calls_without_gpus_leave_the_gpus_alone() -> None:
    ledger = Ledger([Node("with", range(2), ["0"]), Node("without", range(8))])
    taken = [ledger.allocate(Demand(1)) for _ in range(8)]
    assert [each and each.node.name for each in taken] == ["without"] * 8
    with_gpu = ledger.allocate(Demand(1, 1))
    assert with_gpu is not None
    assert with_gpu.node.name == "with"


def test_small_calls_fill_the_gaps_of_used_nodes() -> None:
    """Whole nodes stay free for calls that need them."""
    ledger = Ledger([Node(f"node{index}", range(4)) for index in range(3)])
    large = ledger.allocate(Demand(3))
    small = ledger.allocate(Demand(1))
    assert large is not None
    assert small is not None
    assert small.node is large.node
    assert ledger.allocate(Demand(4)) is not None
    assert ledger.allocate(Demand(4)) is not None


def test_exclusive_takes_all_cores_of_an_idle_node() -> None:
    ledger = Ledger([Node("a", range(4)), Node("b", range(8))])
    busy = ledger.allocate(Demand(1))
    exclusive = ledger.allocate(Demand(1, exclusive=True))
    assert busy is not None
    assert exclusive is not None
    assert busy.node is not exclusive.node
    assert len(exclusive.cores) == exclusive.node.total_cores
    assert ledger.allocate(Demand(1, exclusive=True)) is None
    ledger.release(busy)
    assert ledger.allocate(Demand(1, exclusive=True)) is not None


def test_a_reserved_node_is_for_its_call_alone() -> None:
    ledger = Ledger([Node("a", range(2))])
    running = ledger.allocate(Demand(1))
    reservation = ledger.reserve(Demand(2))
    assert running is not None
    assert reservation is not None
    assert ledger.allocate(Demand(1)) is None
    assert ledger.reserve(Demand(1)) is None
    assert ledger.allocate_reserved(reservation) is None
    ledger.release(running)
    assert ledger.allocate(Demand(1)) is None
    assert ledger.allocate_reserved(reservation) is not None
    [node] = reservation.nodes
    assert node.kept_for is None


def test_reserves_where_most_is_free() -> None:
    ledger = Ledger([Node(name, range(4)) for name in "abc"])
    for cores in (4, 2, 3):  # in this order on a, b and c
        assert ledger.allocate(Demand(cores)) is not None
    one = ledger.reserve(Demand(4))
    assert one is not None
    assert [node.name for node in one.nodes] == ["b"]
    ledger.unreserve(one)
    two = ledger.reserve(spread(2, 6, 1))
    assert two is not None
    assert [node.name for node in two.nodes] == ["b", "c"]


def test_shares_of_a_reservation_may_be_taken_elsewhere() -> None:
    """Each is taken as soon as it is free, because calls on a reserved node may take forever."""
    ledger = Ledger([Node(name, range(4)) for name in "abc"])
    first, second, third = (ledger.allocate(Demand(4)) for _ in "abc")
    assert first is not None
    assert second is not None
    assert third is not None
    reservation = ledger.reserve(spread(2, 6, 1))
    assert reservation is not None
    [kept, other] = [
        [each for each in (first, second, third) if (each.node in reservation.nodes) == wanted]
        for wanted in (True, False)
    ]
    ledger.release(other[0])
    assert ledger.allocate_reserved(reservation) is None
    ledger.release(kept[0])
    taken = ledger.allocate_reserved(reservation)
    assert taken is not None
    assert {share.node for share in taken.shares} == {other[0].node, kept[0].node}


def test_all_or_nothing() -> None:
    ledger = Ledger([Node(name, range(4)) for name in "abc"])
    small = ledger.allocate(Demand(1))
    assert small is not None
    assert ledger.allocate(spread(3, 9, 1)) is None
    assert ledger.free() == (11, 0)
    ledger.release(small)
    whole = ledger.allocate(spread(3, 9, 1))
    assert whole is not None
    assert sorted((share.node.name, share.cores) for share in whole.shares) == [(name, [0, 1, 2, 3]) for name in "abc"]
    ledger.release(whole)
    assert ledger.free() == (12, 0)


def test_ranks_are_spread_evenly_and_not_torn_apart() -> None:
    assert spread(3, 7, 1).shares() == [(4, 0), (3, 0), (3, 0)]
    assert spread(2, 1, 4, 1).shares() == [(8, 2), (4, 1)]
    assert Demand(6, 2).shares() == [(6, 2)]


def test_small_calls_of_several_nodes_leave_idle_nodes_alone() -> None:
    ledger = Ledger([Node(f"node{index}", range(4)) for index in range(4)])
    wide = ledger.allocate(spread(2, 0, 1))
    assert wide is not None
    for _ in range(3):
        next_one = ledger.allocate(spread(2, 0, 1))
        assert next_one is not None
        assert {share.node for share in next_one.shares} == {share.node for share in wide.shares}
    assert ledger.allocate(spread(2, 0, 1, exclusive=True)) is not None


@pytest.mark.parametrize(
    ("changes", "demand"),
    [
        ({"cores": 4}, Demand(4)),
        ({"cores": 10}, Demand(10, nodes=3, ranks=10)),
        ({"cores": 9, "gpus_per_core": 1}, None),
        ({"cores": 6, "gpus_per_core": 1}, Demand(6, 6, nodes=3, ranks=6)),
        ({"cores": 3, "threads_per_core": 3}, Demand(9, nodes=3, ranks=3)),
        ({"threads_per_core": 5}, None),
        ({"cores": 4, "num_nodes": 2}, Demand(4, nodes=2, ranks=4)),
        ({"cores": 3, "num_nodes": 3, "exclusive": True}, Demand(3, 0, True, 3, 3)),
        ({"num_nodes": 2}, None),
        ({"cores": 4, "num_nodes": 1}, Demand(4)),
        ({"cores": 5, "num_nodes": 1}, None),
        ({"cores": 5, "num_nodes": 5}, None),
        ({"cores": 17}, None),
    ],
    ids=str,
)
def test_spread(changes: dict[str, Any], demand: Demand | None) -> None:
    """On four nodes of four cores and two GPUs."""
    ledger = Ledger([Node(f"node{index}", range(4), ["0", "1"]) for index in range(4)])
    assert ledger.spread(Resources().updated(changes, "f")) == demand


def test_spread_over_nodes_of_different_sizes() -> None:
    ledger = Ledger([Node("large", range(8)), Node("a", range(4)), Node("b", range(4))])
    assert ledger.spread(Resources(cores=12)) == Demand(12, nodes=3, ranks=12)


@pytest.mark.parametrize(
    ("demand", "room"),
    [
        (Demand(1), 14),
        (Demand(2), 7),
        (Demand(3), 4),
        (Demand(2, 1), 4),
        (Demand(7), 0),
        (Demand(1, exclusive=True), 3),
        (spread(2, 0, 1), 7),
        (spread(2, 0, 2), 3),
        (spread(3, 0, 1), 4),
        (spread(2, 0, 5), 0),  # only one node has that many
        (spread(2, 2, 1, gpus=1), 1),
        (spread(2, 1, 1), 4),
    ],
    ids=str,
)
def test_room_for_many(demand: Demand, room: int) -> None:
    ledger = Ledger([Node("a", range(4), ["0", "1"]), Node("b", range(4), ["0", "1"]), Node("c", range(6))])
    assert ledger.room_for(demand) == room
    # Those of several nodes may be placed so that one fewer finds two nodes.
    assert len(list(iter(lambda: ledger.allocate(demand), None))) >= room - (demand.nodes > 1)


def test_error_names_the_largest_node() -> None:
    nodes = Ledger([Node("many-cores", range(8)), Node("gpus", range(2), ["0", "1"])])
    with pytest.raises(ValueError, match="but all has 2 nodes of at most 8 cores and 2 GPUs"):
        spread_over(nodes, Resources(cores=11), "f", "all", "Ask for less.")


def test_each_node_has_a_rank() -> None:
    nodes = Ledger([Node(name, range(2)) for name in "abc"])
    with pytest.raises(ValueError, match="num_nodes=3 with cores=2 cannot be honoured"):
        spread_over(nodes, Resources(cores=2, num_nodes=3), "f", "all", "Ask for less.")


def test_lost_node() -> None:
    nodes = [Node(name, range(4)) for name in "ab"]
    ledger = Ledger(nodes)
    both = ledger.allocate(spread(2, 6, 1))
    assert both is not None
    ledger.remove(nodes[0])
    ledger.release(both)
    assert ledger.free() == (4, 0)
    assert not ledger.could_hold(spread(2, 0, 1))
    taken = ledger.allocate(Demand(4))
    assert taken is not None
    assert taken.node is nodes[1]


def test_demands_that_can_never_be_met() -> None:
    ledger = Ledger([Node("many-cores", range(8)), Node("gpus", range(2), ["0", "1"])])
    assert ledger.could_hold(Demand(8))
    assert ledger.could_hold(Demand(2, 2))
    for demand in (Demand(9), Demand(1, 3), Demand(3, 1), Demand(9, exclusive=True)):
        assert not ledger.could_hold(demand)
        assert ledger.allocate(demand) is None
        assert ledger.reserve(demand) is None


# The cost, counted in executed lines of the module, which is the same on every machine.


def lines_run(function: Callable[[], Any]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != module.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "demand",
    [Demand(1), Demand(3), Demand(2, 1), Demand(4, exclusive=True), spread(2, 2, 2), spread(3, 0, 1, exclusive=True)],
    ids=str,
)
def test_cost_does_not_depend_on_the_number_of_nodes(demand: Demand) -> None:
    """That holds for finding room, for finding that there is none, and for giving back."""

    def cost(nodes: int) -> list[int]:
        ledger = Ledger([Node(f"node{index}", range(8), ["0", "1"]) for index in range(nodes)])
        first = ledger.allocate(demand)
        assert first is not None
        costs = [lines_run(lambda: ledger.allocate(demand)), lines_run(lambda: ledger.release(first))]
        while ledger.allocate(demand) is not None:
            pass
        return [*costs, lines_run(lambda: ledger.allocate(demand))]

    assert min(cost(12)) > 0
    assert cost(1_200) == cost(12)
