"""Calls on real NVIDIA GPUs, checked through their driver: a call sees and can use exactly the GPUs that it holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from contract.functions import Gate
from executorlib import machine

WAIT = 60
pytestmark = [pytest.mark.gpu, pytest.mark.rows(single_node=True)]

ONE = {"gpus_per_core": 1}


def _driver() -> Any:
    """NVIDIA's driver, initialised."""
    import ctypes

    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuInit(0) == 0
    return driver


def devices() -> list[str]:
    """The PCI addresses of the devices that this process sees."""
    import ctypes

    driver = _driver()
    count = ctypes.c_int()
    assert driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    found = []
    for index in range(count.value):
        device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
        assert driver.cuDeviceGet(ctypes.byref(device), index) == 0
        assert driver.cuDeviceGetPCIBusId(text, len(text), device) == 0
        found.append(text.value.decode())
    return found


def occupy(bytes_: int) -> int:
    """Take device memory, give back nothing, and tell how much was free before."""
    import ctypes

    driver = _driver()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    assert driver.cuDeviceGet(ctypes.byref(device), 0) == 0
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    assert driver.cuCtxSetCurrent(context) == 0
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    before = free.value
    taken = ctypes.c_void_p()
    assert driver.cuMemAlloc_v2(ctypes.byref(taken), ctypes.c_size_t(min(bytes_, before * 9 // 10))) == 0
    return before


def copy_to_device_and_back(data: bytes) -> bytes:
    import ctypes

    driver = _driver()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    assert driver.cuDeviceGet(ctypes.byref(device), 0) == 0
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    assert driver.cuCtxSetCurrent(context) == 0
    memory, result = ctypes.c_void_p(), ctypes.create_string_buffer(len(data))
    assert driver.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(len(data))) == 0
    assert driver.cuMemcpyHtoD_v2(memory, data, ctypes.c_size_t(len(data))) == 0
    assert driver.cuMemcpyDtoH_v2(result, memory, ctypes.c_size_t(len(data))) == 0
    return result.raw


def options(row: Any) -> dict[str, Any]:
    """Constructor and submit arguments of a call with one GPU."""
    return {"max_workers": 1, "resource_dict": ONE} if row.block else {}


def more(row: Any) -> dict[str, Any]:
    return {} if row.block else {"resource_dict": ONE}


def test_a_call_sees_what_it_holds(make_executor: Callable[..., Any], row: Any) -> None:
    with make_executor(**options(row)) as executor:
        seen = executor.submit(devices, **more(row)).result(WAIT)
        assert len(seen) == 1
        data = os.urandom(1 << 20)
        assert executor.submit(copy_to_device_and_back, data, **more(row)).result(WAIT) == data


@pytest.mark.rows(block=False)
def test_calls_that_need_all_gpus_take_turns(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    count = len(machine.visible_gpus())
    with make_executor(max_workers=4) as executor:
        first = executor.submit(held, 1, resource_dict={"gpus_per_core": count})
        held.pid()
        second = executor.submit(devices, resource_dict={"gpus_per_core": count})
        # One without GPUs goes on meanwhile.
        assert executor.submit(abs, -1).result(WAIT) == 1
        assert not second.running()
        held.open()
        assert first.result(WAIT) == 1
        assert len(second.result(WAIT)) == count


@pytest.mark.rows(block=False)
def test_device_memory_is_free_for_the_next_call(make_executor: Callable[..., Any]) -> None:
    """A call's memory is free before the next call starts, although the function did not free it."""
    with make_executor(max_workers=4) as executor:
        every = {"gpus_per_core": len(machine.visible_gpus())}
        futures = [executor.submit(occupy, 1 << 40, resource_dict=every) for _ in range(4)]
        free = [future.result(WAIT) for future in futures]
    assert min(free) > 0.95 * max(free)


@pytest.mark.rows(block=False)
def test_more_gpus_than_there_are(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor, pytest.raises(ValueError, match="GPUs"):
        executor.submit(devices, resource_dict={"gpus_per_core": len(machine.visible_gpus()) + 1})


@pytest.mark.rows(block=True)
def test_workers_of_a_block_have_a_gpu_each(make_executor: Callable[..., Any]) -> None:
    count = len(machine.visible_gpus())
    with make_executor(max_workers=count, resource_dict=ONE) as executor:
        seen = {executor.submit(devices).result(WAIT)[0] for _ in range(4 * count)}
        assert len(seen) <= count
    with pytest.raises(ValueError, match="GPUs"):
        make_executor(max_workers=count + 1, resource_dict=ONE)
