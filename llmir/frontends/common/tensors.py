"""What an attention layer is handed while it serves, held against what its kernel reads it as.

A kernel gets addresses and reads what lies there as what it was compiled for. Frameworks pass on whatever a model's
code computed, in any element type, so each call's tensors are compared: by attributes alone, about a
microsecond each.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.support import dtype_name
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.dtypes import DTYPES
from llmir.runtime.layers import side_by_side


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype by its name in the IR."""
    found: torch.dtype = getattr(torch, str(DTYPES[name].torch))
    return found


def address_of(numbers: torch.Tensor | None) -> int:
    """Of what a layer may have; 0: it has none."""
    return 0 if numbers is None else numbers.data_ptr()


class LayerTensors:
    """What the kernel of one attention layer takes its tensors to be."""

    def __init__(self, layer: str, attention: AttentionSpec, device: torch.device):
        """``device``: where the layer's cache is."""
        self.dtype = torch_dtype(attention.dtype)
        self._layer = layer
        self._device = device
        self._size = attention.head_size
        self._has_sinks = attention.sinks
        self._query = (attention.num_heads, attention.head_size)
        self._key = (attention.num_kv_heads, attention.head_size)

    def converted(self, tensor: torch.Tensor) -> torch.Tensor:
        """A query, key or value [tokens, heads * head_size] as [tokens, heads, head_size], of the kernel's type.

        The tensor itself where it is so already, as a rule.
        """
        rows = tensor.reshape(tensor.shape[0], -1, self._size)
        if rows.dtype is not self.dtype:
            rows = rows.to(self.dtype)
        return rows if side_by_side(rows, self._size) else rows.contiguous()

    def sinks(self, sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """The layer's sinks [heads], if it has any, as its kernel reads them: in ``dtype``, contiguous.

        Raises UnsupportedLayerError where there are others than the plan says.
        """
        if (sinks is not None) != self._has_sinks:
            how = "without" if sinks is None else "with"
            raise UnsupportedLayerError(self._layer, f"it is called {how} sinks, unlike its plan")
        if sinks is None:
            return None
        if sinks.shape != self._query[:1] or sinks.device != self._device:
            self._refuse("sinks", sinks, f"{self._query[0]} numbers, one a head,")
        return sinks.to(dtype).contiguous()

    def check(self, query: torch.Tensor, output: torch.Tensor, tokens: int) -> None:
        """Raise UnsupportedLayerError unless both are ``tokens`` rows or more of what the kernel takes."""
        self._check("query", query, self._query, tokens)
        self._check("output", output, self._query, tokens)

    def check_new(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, tokens: int) -> None:
        """The same for keys and values that are appended to the cache, with their ``slots`` int64 [tokens]."""
        self._check("key", key, self._key, tokens)
        self._check("value", value, self._key, tokens)
        if slots.dtype is not torch.int64 or slots.shape[0] < tokens or slots.device != self._device:
            self._refuse("slots", slots, f"{tokens} numbers of int64")

    def _check(self, name: str, tensor: torch.Tensor, heads: tuple[int, int], tokens: int) -> None:
        if tensor is None:
            self._refuse(name, tensor, "one")
        shape = tensor.shape
        if (
            tensor.dtype is not self.dtype
            or tensor.device != self._device
            or len(shape) != 3
            or shape[0] < tokens
            or shape[1] != heads[0]
            or shape[2] != heads[1]
        ):
            self._refuse(name, tensor, f"{tokens} tokens of {list(heads)} in {dtype_name(self.dtype)}")

    def _refuse(self, name: str, tensor: torch.Tensor | None, expected: str) -> NoReturn:
        if tensor is None:
            raise UnsupportedLayerError(self._layer, f"it is called without a {name}")
        found = f"{list(tensor.shape)} in {dtype_name(tensor.dtype)} on {tensor.device}"
        its = f"its {name} {'are' if name.endswith('s') else 'is'} {found}"
        raise UnsupportedLayerError(self._layer, f"{its}, and its kernel reads {expected} on {self._device}")
