"""vLLM's block tables on the host, which GPU kernels need for one thing: to find out who shares a prefix.

The table that comes with a step is the device's, and reading it would stop the host until the device is done. Both of
vLLM's model runners write it from the host, each in its own way:

- the first (``v1/worker/gpu_model_runner.py``) keeps the whole table on the host, as ``BlockTable.block_table.np``,
  and copies it to the device each step; its rows are the step's requests;
- the second (``v1/worker/gpu/model_runner.py``) sends only what is new in a table of all running requests, whose rows
  a kernel then picks for each step. What it sends is written down here a second time; the step's rows are in the
  batch that ``prepare_attn`` gets.

So the methods that hand out a step's tables are wrapped, on the classes and at run time: they note which table on the
host belongs to the tensor they gave. A tensor that nobody noted, or one of a step of invented requests (profiling,
graph capture, ranks without work), has none, and its step shares nothing.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
#: Columns of a table are asked for in steps of so many, so that a request that grows rarely changes their number.
COLUMN_STEP = 64

FIRST_RUNNER = "vllm.v1.worker.block_table"
SECOND_RUNNER = "vllm.v1.worker.gpu.model_runner"

#: What gives a table's rows on the host, [requests, columns] of the arguments, by the address of the device's table.
_tables: dict[int, Callable[[int, int], Int32 | None]] = {}


def watch() -> None:
    """Note tables from now on; called before vLLM sets up its caches, any number of times."""
    first, second = sys.modules.get(FIRST_RUNNER), sys.modules.get(SECOND_RUNNER)
    if first is not None:
        _wrap(first.BlockTable, "get_device_tensor", _note_first)
    if second is not None:
        _wrap(second.BlockTables, "__init__", _mirror_writes)
        _wrap(second.GPUModelRunner, "prepare_attn", _note_second)
        _wrap(second.GPUModelRunner, "prepare_dummy_attn", _note_invented)


def on_host(table: torch.Tensor, requests: int, tokens: int, block_size: int) -> Int32 | None:
    """The rows of a step's block table, int32 [requests, columns]; None where they are not known on the host.

    ``tokens``: the longest request of the step, which must lie in the columns.
    """
    rows = _tables.get(_address(table))
    if rows is None:
        return None
    blocks = -(-tokens // block_size)
    return rows(requests, -(-blocks // COLUMN_STEP) * COLUMN_STEP)


def is_invented(table: torch.Tensor) -> bool:
    """Whether a step's block table is one of requests that vLLM invented, of whose answers nobody hears."""
    return _tables.get(_address(table)) is _nothing


def _address(table: torch.Tensor) -> int:
    """Where the first row of a table lies."""
    return table.data_ptr()


def _wrap(owner: type[Any], name: str, after: Callable[..., None]) -> None:
    """Call ``after`` with what a method gave and got, each time it is done; once a class."""
    method = getattr(owner, name)
    if hasattr(method, "_llmir_wrapped"):
        return

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        after(result, self, *args, **kwargs)
        return result

    wrapped._llmir_wrapped = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _note_first(table: torch.Tensor, owner: Any, *args: Any, **kwargs: Any) -> None:
    """The first runner's ``BlockTable`` gave the device's table for a step."""
    reference = weakref.ref(owner)

    def rows(requests: int, columns: int) -> Int32 | None:
        buffer = getattr(reference(), "block_table", None)
        if buffer is None or buffer.gpu.data_ptr() != address:
            return None
        return buffer.np[:requests, :columns]

    address = _address(table)
    _tables[address] = rows


def _mirror_writes(_: None, owner: Any, *args: Any, **kwargs: Any) -> None:
    """The second runner's ``BlockTables`` was made: all that goes into its tables goes into arrays on the host too."""
    owner._llmir_mirrors = []
    for staged in owner.block_tables:
        mirror = np.zeros(tuple(staged.gpu.shape), np.int32)
        staged.stage_write = functools.partial(_write, mirror, staged.stage_write)
        owner._llmir_mirrors.append(mirror)


def _write(mirror: Int32, stage_write: Callable[..., None], index: int, start: int, x: Any) -> None:
    """What ``StagedWriteTensor.stage_write`` does, on the host as well."""
    content = list(x)
    mirror[index, start : start + len(content)] = content
    stage_write(index, start, content)


def _note_second(given: tuple[Any, Any], runner: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """The second runner gave the device's tables for a step: tables of all requests, and which are the step's."""
    owner = weakref.ref(runner.block_tables)
    for group, table in enumerate(given[0]):
        _tables[_address(table)] = functools.partial(_picked, owner, group, batch.idx_mapping_np)


def _picked(reference: weakref.ref[Any], group: int, step: Int32, requests: int, columns: int) -> Int32 | None:
    """The rows of a step's requests, which are ``step`` of all rows."""
    mirrors = getattr(reference(), "_llmir_mirrors", None)
    if mirrors is None or len(step) < requests:
        return None
    rows: Int32 = mirrors[group][step[:requests], :columns]
    return rows


def _note_invented(given: tuple[Any, Any], runner: Any, *args: Any, **kwargs: Any) -> None:
    """The second runner gave tables for requests that there are not."""
    for table in given[0]:
        _tables[_address(table)] = _nothing


def _nothing(requests: int, columns: int) -> None:
    """The rows of such requests."""
