"""SGLang's pool of keys and values, kept in the pages that llmir's kernels read.

SGLang addresses a cache by slot. Here a slot is a place in a page ``[KV heads, keys then values]``, laid out as the
plan says, so every method that touches the storage is overridden: it works on rows of tokens as before, or it refuses.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_server_args

from llmir.errors import LlmirError
from llmir.frontends.common.support import UnsupportedFeatureError
from llmir.frontends.sglang.planning import plan_of
from llmir.runtime.pages import key_and_value_rows


class LlmirKVPool(MHATokenToKVPool):
    """One tensor of pages a layer; keys and values of a page lie together."""

    def __init__(self, *args: Any, **kwargs: Any):
        # The label keeps SGLang's own layouts, which an environment variable can ask for, out.
        super().__init__(*args, **{**kwargs, "kv_cache_layout": "llmir"})

    def _create_buffers_normal(self) -> None:
        """Allocate the pages; slot 0's page takes what SGLang writes for padding, as in its own pools."""
        plan = plan_of(get_server_args())
        signature = plan.kernels[0].spec.signature
        found = (self.page_size, self.head_num, self.head_dim, self.v_head_dim)
        planned = (plan.block_size, signature.num_kv_heads, signature.head_size, signature.head_size)
        if found != planned:
            raise LlmirError(
                f"SGLang's KV pool has page size, heads, key size, value size {found}, and the plan was made for "
                f"{planned}: one pool of one shape is what llmir serves; start again without a plan of your own"
            )
        blocks = -(-(self.size + self.page_size) // self.page_size)
        shape = (blocks, self.head_num, 2, self.page_size * self.head_dim)
        #: Per layer [blocks, KV heads, 2, page_size * head_dim].
        self.pages = [torch.zeros(shape, dtype=self.store_dtype, device=self.device) for _ in range(self.layer_num)]
        rows = [key_and_value_rows(pages, signature, plan.kernels[0].spec.isa) for pages in self.pages]
        self._keys, self._values = [keys for keys, _ in rows], [values for _, values in rows]
        # What SGLang counts bytes of. Nothing reads keys or values through these.
        self.k_buffer = [pages[:, :, 0] for pages in self.pages]
        self.v_buffer = [pages[:, :, 1] for pages in self.pages]

    def _kv_tokens_per_row(self) -> int:
        return self.page_size

    def _build_kv_buffer_descs(self) -> list[Any]:
        return []  # they describe buffers for transfer to another engine, which is refused

    def _clear_buffers(self) -> None:
        super()._clear_buffers()
        del self.pages, self._keys, self._values

    def _get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """A copy ``[slots, heads, head_dim]``: for looking at, writing to it changes nothing."""
        return self._keys[layer_id - self.start_layer].read(self._all_slots())

    def _get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """A copy ``[slots, heads, head_dim]``: for looking at, writing to it changes nothing."""
        return self._values[layer_id - self.start_layer].read(self._all_slots())

    def _all_slots(self) -> torch.Tensor:
        return torch.arange(self.size + self.page_size, device=self.device)

    def _store_kv_layer(self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        """Keys and values ``[tokens, heads, head_dim]`` into slots ``loc``; attention appends by itself, faster."""
        self._keys[layer_idx].write(loc, cache_k)
        self._values[layer_idx].write(loc, cache_v)

    def _move_kv_cache_impl(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        for rows in (*self._keys, *self._values):
            rows.write(tgt_loc, rows.read(src_loc))

    def get_cpu_copy(self, indices: torch.Tensor, mamba_indices: Any = None, req_pool_index: Any = None) -> Any:
        """Rows of the slots ``indices``, for :meth:`load_cpu_copy`: a pair (keys, values) a layer."""
        layers = zip(self._keys, self._values, strict=True)
        return [(keys.read(indices), values.read(indices)) for keys, values in layers]

    def load_cpu_copy(
        self, kv_cache_cpu: Any, indices: torch.Tensor, mamba_indices: Any = None, req_pool_index: Any = None
    ) -> None:
        """Put a copy back, into slots ``indices``, which may be others than it came from."""
        for layer, (keys, values) in enumerate(kv_cache_cpu):
            self._store_kv_layer(layer, indices, keys, values)

    def get_contiguous_buf_infos(self) -> NoReturn:
        """Refused: another engine would read SGLang's layout."""
        raise UnsupportedFeatureError("llmir's KV pool cannot be sent to another engine, which knows SGLang's layout")

    def get_device_pool_infos(self) -> NoReturn:
        """Refused: a host pool would copy SGLang's layout."""
        raise UnsupportedFeatureError("llmir's KV pool has no copy in a host pool, which knows SGLang's layout")
