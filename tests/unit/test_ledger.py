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

from executorlib import ledger as module
from executorlib.ledger import Allocation, Ledger, Node
from executorlib.resources import Demand
from unit import repeatable

demands = st.builds(Demand, cores=st.integers(1, 6), gpus=st.integers(0, 3), exclusive=st.booleans() | st.just(False))


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
        self.reserved: dict[Node, Demand] = {}

    def free_cores(self, node: Node) -> set[int]:
        held = {core for each in self.held if each.node is node for core in each.cores}
        return self.all_cores[node] - held

    def free_gpus(self, node: Node) -> set[str]:
        held = {gpu for each in self.held if each.node is node for gpu in each.gpus}
        return self.all_gpus[node] - held

    def fits(self, demand: Demand, node: Node) -> bool:
        if demand.exclusive and self.free_cores(node) != self.all_cores[node]:
            return False
        return len(self.free_cores(node)) >= demand.cores and len(self.free_gpus(node)) >= demand.gpus

    def available(self, node: Node) -> tuple[int, int]:
        """GPUs and cores for anybody: what is kept for a call is for that call alone."""
        kept = self.reserved.get(node, Demand(0))
        cores = len(self.all_cores[node]) if kept.exclusive else kept.cores
        return max(0, len(self.free_gpus(node)) - kept.gpus), max(0, len(self.free_cores(node)) - cores)

    def fits_anybody(self, demand: Demand, node: Node) -> bool:
        gpus, cores = self.available(node)
        if demand.exclusive and node in self.reserved:
            return False
        return self.fits(demand, node) and demand.cores <= cores and demand.gpus <= gpus

    def check_taken(self, taken: Allocation, demand: Demand) -> None:
        """What was taken was free, and is as much as was asked for; the ledger lists neighbours in order."""
        node = taken.node
        assert set(taken.cores) <= self.free_cores(node)
        assert set(taken.gpus) <= self.free_gpus(node)
        assert len(set(taken.cores)) == len(taken.cores)
        assert len(set(taken.gpus)) == len(taken.gpus) == demand.gpus
        assert len(taken.cores) == (len(self.all_cores[node]) if demand.exclusive else demand.cores)
        assert taken.cores == sorted(taken.cores)
        self.held.append(taken)

    @rule(demand=demands)
    def allocate(self, demand: Demand) -> None:
        fitting = [node for node in self.nodes if self.fits_anybody(demand, node)]
        fullest = min((self.available(node) for node in fitting), default=None)
        taken = self.ledger.allocate(demand)
        assert (taken is None) == (not fitting)
        if taken is not None:
            assert taken.node in fitting
            if not demand.exclusive:  # best fit: the fullest, and those with few GPUs first
                assert self.available(taken.node) == fullest
            self.check_taken(taken, demand)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1), label="index")
        self.ledger.release(self.held.pop(index))

    @rule(demand=demands)
    def reserve(self, demand: Demand) -> None:
        able = [
            node
            for node in self.nodes
            if node not in self.reserved
            and len(self.all_cores[node]) >= demand.cores
            and len(self.all_gpus[node]) >= demand.gpus
        ]
        node = self.ledger.reserve(demand)
        assert (node is None) == (not able)
        if node is not None:
            assert node in able
            self.reserved[node] = demand

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def allocate_reserved(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(self.reserved, key=lambda each: each.name)), label="node")
        demand = self.reserved[node]
        fits = self.fits(demand, node)
        taken = self.ledger.allocate_reserved(node, demand)
        assert (taken is not None) == fits
        if taken is not None:
            assert taken.node is node
            self.check_taken(taken, demand)
            del self.reserved[node]

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def unreserve(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(self.reserved, key=lambda each: each.name)), label="node")
        self.ledger.unreserve(node)
        del self.reserved[node]

    @rule(data=st.data(), count=st.integers(0, 3))
    def grow(self, data: st.DataObject, count: int) -> None:
        node = data.draw(st.sampled_from(self.nodes), label="node")
        first = max(self.all_cores[node]) + 1
        self.ledger.grow(node, range(first, first + count))
        self.all_cores[node] |= set(range(first, first + count))

    @rule(demand=demands)
    def could_hold(self, demand: Demand) -> None:
        assert self.ledger.could_hold(demand) == any(
            len(self.all_cores[node]) >= demand.cores and len(self.all_gpus[node]) >= demand.gpus for node in self.nodes
        )

    @invariant()
    def agrees(self) -> None:
        self.ledger.check_invariants()
        for node in self.nodes:
            assert set(node.free_cores) == self.free_cores(node)
            assert set(node.free_gpus) == self.free_gpus(node)
            assert (node.kept_for is not None) == (node in self.reserved)
        assert self.ledger.free() == (
            sum(len(self.free_cores(node)) for node in self.nodes),
            sum(len(self.free_gpus(node)) for node in self.nodes),
        )

    def teardown(self) -> None:
        """Whatever came before: once all is given back, all is there."""
        if not hasattr(self, "ledger"):
            return
        for node in list(self.reserved):
            self.ledger.unreserve(node)
        for allocation in self.held:
            self.ledger.release(allocation)
        self.held.clear()
        self.reserved.clear()
        self.agrees()


AgainstModel.TestCase.settings = settings(repeatable, max_examples=60, stateful_step_count=40)
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
    """So that whole nodes stay free for those that need whole ones."""
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
    node = ledger.reserve(Demand(2))
    assert running is not None
    assert node is not None
    assert ledger.allocate(Demand(1)) is None
    assert ledger.reserve(Demand(1)) is None
    assert ledger.allocate_reserved(node, Demand(2)) is None
    ledger.release(running)
    assert ledger.allocate(Demand(1)) is None
    assert ledger.allocate_reserved(node, Demand(2)) is not None
    assert node.kept_for is None


def test_reserves_where_most_is_free() -> None:
    ledger = Ledger([Node(name, range(4)) for name in "abc"])
    for cores in (4, 2, 3):  # in this order on a, b and c
        assert ledger.allocate(Demand(cores)) is not None
    node = ledger.reserve(Demand(4))
    assert node is not None
    assert node.name == "b"


def test_what_can_never_be() -> None:
    ledger = Ledger([Node("many-cores", range(8)), Node("gpus", range(2), ["0", "1"])])
    assert ledger.could_hold(Demand(8))
    assert ledger.could_hold(Demand(2, 2))
    for demand in (Demand(9), Demand(1, 3), Demand(3, 1), Demand(9, exclusive=True)):
        assert not ledger.could_hold(demand)
        assert ledger.allocate(demand) is None
        assert ledger.reserve(demand) is None


# What it costs, counted in lines of the module that are run: the same on every machine.


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


@pytest.mark.parametrize("demand", [Demand(1), Demand(3), Demand(2, 1), Demand(4, exclusive=True)], ids=str)
def test_cost_does_not_depend_on_the_number_of_nodes(demand: Demand) -> None:
    """Neither to find room, nor to find that there is none, nor to give back."""

    def cost(nodes: int) -> list[int]:
        ledger = Ledger([Node(f"node{index}", range(8), ["0", "1"]) for index in range(nodes)])
        first = ledger.allocate(demand)
        assert first is not None
        costs = [lines_run(lambda: ledger.allocate(demand)), lines_run(lambda: ledger.release(first))]
        while ledger.allocate(demand) is not None:
            pass
        return [*costs, lines_run(lambda: ledger.allocate(demand))]

    assert min(cost(4)) > 0
    assert cost(1_000) == cost(4)
