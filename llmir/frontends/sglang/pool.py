"""SGLang's pool of keys and values, kept in the pages that llmir's kernels read.

SGLang addresses a cache by slot. Here a slot is a place in a page ``[KV heads, keys then values]``, laid out as the
plan says, so every method that touches the storage is overridden: it works on rows of tokens as before, or it refuses.

On a GPU, SGLang's models may write keys themselves, in the kernel that turns them by their position, into the buffers
they ask the pool for. Those would be SGLang's layout; ``gpu_backend.py`` keeps models from it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_server_args

from llmir.errors import LlmirError
from llmir.frontends.common.support import UnsupportedFeatureError
from llmir.frontends.sglang.planning import plan_of
from llmir.runtime.pages import key_and_value_rows
from llmir.targets.registry import is_gpu


class _Unreadable:
    """A buffer, or an address of one, that SGLang's pool has and llmir's has not: whoever reads it is refused.

    SGLang's own code sets it and deletes it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, pool: Any, owner: type | None = None) -> NoReturn:
        raise UnsupportedFeatureError(
            f"llmir's KV pool has no {self._name}: its rows are pages and not tokens, and whoever reads it knows "
            f"SGLang's layout; leave out what copies the KV cache, or --attention-backend llmir"
        )

    def __set__(self, pool: Any, value: Any) -> None: ...

    def __delete__(self, pool: Any) -> None: ...


class LlmirKVPool(MHATokenToKVPool):
    """One tensor of pages a layer; keys and values of a page lie together."""

    k_buffer = _Unreadable()
    v_buffer = _Unreadable()
    k_data_ptrs = _Unreadable()
    v_data_ptrs = _Unreadable()
    data_ptrs = _Unreadable()
    data_strides = _Unreadable()

    def __init__(self, *args: Any, **kwargs: Any):
        if kwargs.get("post_capture_active"):
            raise UnsupportedFeatureError(
                "llmir's KV pool has its size before graphs are captured: "
                "leave out SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
            )
        # The label keeps SGLang's own layouts, which an environment variable can ask for, out.
        super().__init__(*args, **{**kwargs, "kv_cache_layout": "llmir"})

    def _create_buffers_normal(self) -> None:
        """Allocate the pages; slot 0's page takes what SGLang writes for padding, as in its own pools."""
        plan = plan_of(get_server_args())
        attention = plan.kernels[0].spec.attention
        found = (self.page_size, self.head_num, self.head_dim, self.v_head_dim)
        planned = (plan.block_size, attention.num_kv_heads, attention.head_size, attention.head_size)
        if found != planned:
            raise LlmirError(
                f"SGLang's KV pool has page size, heads, key size, value size {found}, and the plan was made for "
                f"{planned}: one pool of one shape is what llmir serves; start again without a plan of your own"
            )
        isa = plan.kernels[0].spec.isa
        self._on_gpu = is_gpu(isa)
        blocks = -(-(self.size + self.page_size) // self.page_size)
        shape = (blocks, self.head_num, 2, self.page_size * self.head_dim)
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            #: Per layer [blocks, KV heads, 2, page_size * head_dim]; of uint8 where it is quantized.
            self.pages = [torch.zeros(shape, dtype=self.store_dtype, device=self.device) for _ in range(self.layer_num)]
        rows = [key_and_value_rows(pages, attention.cache, isa) for pages in self.pages]
        self._keys, self._values = [keys for keys, _ in rows], [values for _, values in rows]

    @property
    def is_fp8(self) -> bool:
        """Whether keys and values are eight-bit floats, divided by scales."""
        return bool(self.dtype == torch.float8_e4m3fn)

    def _kv_tokens_per_row(self) -> int:
        return self.page_size

    def _build_kv_buffer_descs(self) -> list[Any]:
        return []  # they describe buffers for transfer to another engine, which is refused

    def _init_data_ptrs_and_strides(self) -> None: ...

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of keys, and of values."""
        half = sum(pages.nbytes for pages in self.pages) // 2
        return half, half

    def _clear_buffers(self) -> None:
        super()._clear_buffers()
        del self.pages, self._keys, self._values

    def _get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """The keys, for looking at; see :meth:`_shown`."""
        return self._shown(layer_id - self.start_layer, 0)

    def _get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """The values, for looking at; see :meth:`_shown`."""
        return self._shown(layer_id - self.start_layer, 1)

    def _shown(self, layer: int, half: int) -> torch.Tensor:
        """Keys (``half`` 0) or values (1) of a layer; nothing of SGLang's that serves reads them.

        On a CPU a copy ``[slots, heads, head_dim]``. On a GPU, where a copy may not fit, a view ``[blocks, page_size,
        heads, head_dim]``: of four dimensions, so that no kernel takes it for SGLang's layout.
        """
        if self._on_gpu:
            pages = self.pages[layer].view(self.dtype)
            return pages.unflatten(3, (self.page_size, self.head_dim))[:, :, half].transpose(1, 2)
        rows = (self._keys, self._values)[half][layer]
        return rows.read(torch.arange(self.size + self.page_size, device=self.device))

    def _store_kv_layer(self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        """Keys and values ``[tokens, heads, head_dim]`` into slots ``loc``; attention appends by itself, faster."""
        self._keys[layer_idx].write(loc, cache_k)
        self._values[layer_idx].write(loc, cache_v)

    def _move_kv_cache_impl(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        for rows in (*self._keys, *self._values):
            rows.write(tgt_loc, rows.read(src_loc))

    def get_cpu_copy(self, indices: torch.Tensor, mamba_indices: Any = None, req_pool_index: Any = None) -> Any:
        """Rows of the slots ``indices`` in host memory, for :meth:`load_cpu_copy`: a pair (keys, values) a layer."""
        layers = zip(self._keys, self._values, strict=True)
        return [(keys.read(indices).cpu(), values.read(indices).cpu()) for keys, values in layers]

    def load_cpu_copy(
        self, kv_cache_cpu: Any, indices: torch.Tensor, mamba_indices: Any = None, req_pool_index: Any = None
    ) -> None:
        """Put a copy back, into slots ``indices``, which may be others than it came from."""
        for layer, (keys, values) in enumerate(kv_cache_cpu):
            self._store_kv_layer(layer, indices, keys.to(self.device), values.to(self.device))

    def get_contiguous_buf_infos(self) -> NoReturn:
        """Refused: another engine would read SGLang's layout."""
        raise UnsupportedFeatureError("llmir's KV pool cannot be sent to another engine, which knows SGLang's layout")

    def get_device_pool_infos(self) -> NoReturn:
        """Refused: a host pool would copy SGLang's layout."""
        raise UnsupportedFeatureError("llmir's KV pool has no copy in a host pool, which knows SGLang's layout")
