"""vLLM's own block table classes, and what llmir knows of them on the host."""

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker import block_table as first_runner
from vllm.v1.worker.gpu import block_table as second_runner
from vllm.v1.worker.gpu import buffer_utils, model_runner

from llmir.frontends.vllm import block_tables

CPU, BLOCK, REQUESTS, COLUMNS = torch.device("cpu"), 16, 8, 256


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's classes are watched within a test alone, and kernels that fill device tables do nothing."""
    monkeypatch.setattr(block_tables, "_tables", {})
    monkeypatch.setattr(buffer_utils, "UvaBufferPool", HostPool)
    monkeypatch.setattr(second_runner, "_gather_block_tables_kernel", _Kernel())
    monkeypatch.setattr(second_runner, "_compute_slot_mappings_kernel", _Kernel())
    for owner, method in (
        (first_runner.BlockTable, "get_device_tensor"),
        (second_runner.BlockTables, "__init__"),
        (model_runner.GPUModelRunner, "prepare_attn"),
        (model_runner.GPUModelRunner, "prepare_dummy_attn"),
    ):
        monkeypatch.setattr(owner, method, getattr(owner, method))  # put back afterwards
    block_tables.watch()


class HostPool:
    """Instead of pinned memory that the device reads."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def copy_to_uva(self, numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers)


class _Kernel:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def made(owner: type[Any], *arguments: Any, **older: Any) -> Any:
    """An object of a class of vLLM's; ``older``: arguments that it had in versions before 0.32."""
    known = inspect.signature(vars(owner)["__init__"]).parameters
    return owner(*arguments, **{name: value for name, value in older.items() if name in known})


def first_table() -> first_runner.BlockTable:
    arguments = {"kernel_block_size": BLOCK, "cp_kv_cache_interleave_size": 1}
    table = made(first_runner.BlockTable, BLOCK, REQUESTS, COLUMNS, 64, False, CPU, **arguments)
    table.add_row([7, 8, 9], 0)
    table.add_row([7, 8, 5], 1)
    return table


class SecondRunner:
    """What vLLM's second model runner has when it prepares block tables; two groups of caches."""

    def __init__(self) -> None:
        self.pcp_manager = None
        blocks, columns = [BLOCK, BLOCK], [COLUMNS, COLUMNS]
        self.block_tables = made(
            second_runner.BlockTables, blocks, REQUESTS, 64, columns, CPU, kernel_block_sizes=blocks
        )

    def step(self, rows: list[int]) -> tuple[torch.Tensor, ...]:
        """The tables of a step of these rows of the runner's, as ``prepare_attn`` gives them."""
        batch = SimpleNamespace(
            idx_mapping=torch.tensor(rows),
            idx_mapping_np=np.array(rows),
            num_reqs_after_padding=len(rows),
            query_start_loc=None,
            positions=None,
            num_tokens_after_padding=len(rows),
        )
        return model_runner.GPUModelRunner.prepare_attn(self, batch)[0]


def second_tables() -> SecondRunner:
    runner = SecondRunner()
    runner.block_tables.append_block_ids(3, ([7, 8], [20]), overwrite=True)
    runner.block_tables.append_block_ids(5, ([7, 8, 5], [21]), overwrite=True)
    runner.block_tables.append_block_ids(3, ([9], []), overwrite=False)
    return runner


def test_the_first_runner_keeps_rows_on_the_host() -> None:
    table = first_table()
    rows = block_tables.on_host(table.get_device_tensor(2), 2, 3 * BLOCK, BLOCK)
    assert rows is not None
    assert rows[:, :3].tolist() == [[7, 8, 9], [7, 8, 5]]


def test_a_table_is_forgotten_with_its_owner() -> None:
    given = first_table().get_device_tensor(2)
    assert block_tables.on_host(given, 2, 40, BLOCK) is None


def test_padding_rows_are_left_out() -> None:
    table = first_table()
    rows = block_tables.on_host(table.get_device_tensor(4), 2, 40, BLOCK)
    assert rows is not None and len(rows) == 2


def test_only_the_columns_of_the_longest_request_are_asked_for() -> None:
    table = first_table()
    given = table.get_device_tensor(2)
    widths = [block_tables.on_host(given, 2, tokens, BLOCK).shape[1] for tokens in (1, 64 * BLOCK, 64 * BLOCK + 1)]
    assert widths == [64, 64, 128]


def test_the_second_runners_writes_are_kept_on_the_host() -> None:
    runner = second_tables()
    first, second = runner.step([5, 3])
    assert block_tables.on_host(first, 2, 48, BLOCK)[:, :3].tolist() == [[7, 8, 5], [7, 8, 9]]
    assert block_tables.on_host(second, 2, 16, BLOCK)[:, :1].tolist() == [[21], [20]]


def test_the_rows_are_those_of_the_last_step() -> None:
    runner = second_tables()
    runner.step([5, 3])
    [table, _] = runner.step([3])
    assert block_tables.on_host(table, 1, 48, BLOCK)[:, :3].tolist() == [[7, 8, 9]]


def test_a_row_that_is_used_again_has_its_new_blocks() -> None:
    runner = second_tables()
    runner.block_tables.append_block_ids(3, ([1, 2], [3]), overwrite=True)
    [table, _] = runner.step([3])
    assert block_tables.on_host(table, 1, 32, BLOCK)[:, :2].tolist() == [[1, 2]]


def test_writes_still_reach_the_device() -> None:
    staged = second_tables().block_tables.block_tables[0]
    assert staged._staged_write_contents == [7, 8, 7, 8, 5, 9]
    assert staged._staged_write_indices == [3, 5, 3]


def test_invented_requests_share_nothing() -> None:
    runner = second_tables()
    runner.step([5, 3])
    tables, _ = model_runner.GPUModelRunner.prepare_dummy_attn(runner, SimpleNamespace(num_reqs=2, num_tokens=2))
    assert block_tables.on_host(tables[0], 2, 48, BLOCK) is None
    assert block_tables.is_invented(tables[0])
    [table, _] = runner.step([5, 3])
    assert not block_tables.is_invented(table)


def test_tables_made_before_anybody_watched_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = second_tables()
    del runner.block_tables._llmir_mirrors
    [table, _] = runner.step([5, 3])
    assert block_tables.on_host(table, 2, 48, BLOCK) is None
    assert not block_tables.is_invented(table)


def test_a_tensor_nobody_gave_is_unknown() -> None:
    assert block_tables.on_host(torch.zeros(2, 4, dtype=torch.int32), 2, 48, BLOCK) is None


def test_a_copy_of_a_table_is_unknown() -> None:
    table = first_table()
    copy = table.get_device_tensor(2).clone()
    assert block_tables.on_host(copy, 2, 48, BLOCK) is None


def test_watching_again_changes_nothing() -> None:
    method = first_runner.BlockTable.get_device_tensor
    block_tables.watch()
    assert first_runner.BlockTable.get_device_tensor is method
