"""Whether what lies in a layer's cache may be read once for several requests, and from how much of it on that pays.

Requests with a common prefix have one copy of its keys and values. Reading it once for the queries of all of them gives
each what it would have got alone if the copy is the same for everybody who reads it: see :func:`obstacle`. Where the
module does not show how keys come about, what frameworks build their prefix caches on is taken for granted, and said:
see :func:`assumption`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

from llmir.costs.break_even import LENGTHS, BreakEven, costs_on
from llmir.costs.sharing import cached_key
from llmir.errors import LlmirError
from llmir.ir.attention import AppendKV, FusedAttention, LatentAttention, PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.attributes import Selection
from llmir.ir.bindings import ir
from llmir.ir.experts import MoE
from llmir.ir.kernel_spec import KernelVariant
from llmir.ir.module import STEP_INPUTS, decoder_of, ops_of
from llmir.ir.opaque import Opaque
from llmir.ir.ops import Embedding, Linear, Rope
from llmir.ir.remarks import Remark, add_remark, of_layers
from llmir.ir.types import PagedKVCache
from llmir.targets.machine import Target
from llmir.targets.registry import kernel_model

#: Step inputs that say where tokens are and not what they are.
_BOOKKEEPING = {name for name, _, _ in STEP_INPUTS} - {"input_ids"}
#: By these the run time finds the blocks that requests share: for all layers that a kernel serves at once.
_PLACES = ("slots", "block_table", "query_start", "sequence_lengths")
#: After these a value is another one, which nothing has turned yet.
_PROJECTIONS = (Embedding, Linear, MoE, FusedAttention, PagedAttention, LatentAttention)
#: The decision not to share.
ALONE = "read by each request for itself"


# -- whether it may


class DataFlow:
    """Where the values of a decoder come from, seen in one walk over its ops."""

    def __init__(self, module: ir.Operation):
        function = decoder_of(module)
        self.users: dict[ir.Value, list[Any]] = defaultdict(list)
        """Of a cache, which is an argument of the decoder: the ops that read or write its memory, in program order."""
        self.cache: dict[ir.Value, ir.Value] = {}
        """Of a value that is a cache: the argument whose memory it is."""
        self.names: dict[ir.Value, str] = {}
        """Of the arguments that have one."""
        self.contents: dict[ir.Value, frozenset[str]] = {}
        """Arguments from whose elements a value is computed, by name."""
        self.turned: set[ir.Value] = set()
        """Values that a rotary embedding has turned since a projection gave them."""
        self.unseen: dict[ir.Value, frozenset[str]] = defaultdict(frozenset)
        """What an opaque layer or operation has made since a projection gave it: by whose classes."""
        for number, (argument, labels) in enumerate(zip(function.arguments, function.arg_attrs, strict=True)):
            if "llm.name" in labels:
                self.names[argument] = labels["llm.name"].value
            name = self.names.get(argument, f"argument {number}")
            is_cache = isinstance(argument.type, PagedKVCache)
            self.contents[argument] = frozenset() if is_cache or name in _BOOKKEEPING else frozenset([name])
            if is_cache:
                self.cache[argument] = argument
        for op in function.entry_block.operations:
            self._see(op.operation.opview)

    def _see(self, op: Any) -> None:
        operands, results = list(op.operation.operands), list(op.operation.results)
        contents = frozenset[str]().union(*(self.contents[operand] for operand in operands))
        caches = [self.cache[operand] for operand in operands if operand in self.cache]
        if op.operation.name != "func.return":
            for cache in caches:
                self.users[cache].append(op)
        for result in results:
            self.contents[result] = contents
            if isinstance(result.type, PagedKVCache):
                self.cache[result] = caches[0] if caches else result
        if not isinstance(op, _PROJECTIONS):
            kinds = frozenset([op.kind.value]) if isinstance(op, Opaque) else frozenset[str]()
            unseen = kinds.union(*(self.unseen[operand] for operand in operands))
            self.unseen.update(dict.fromkeys(results, unseen))
        if isinstance(op, Rope) or (not isinstance(op, _PROJECTIONS) and self.turned.intersection(operands)):
            self.turned.update(results)


def obstacle(op: FusedAttention | PagedAttention, flow: DataFlow) -> str | None:
    """Why the cache of an attention op must not be read once for several requests; None: it may.

    It may where queries see a prefix (causal), found by the step's own block table; where all that is in the cache is
    the layer's own tokens, keys final when they are written; and where all layers that read it see it through one mask.
    """
    if not spec_of(op).mask.causal:
        return "its attention is not causal: a query sees more than the prefix that requests have in common"
    for name in _PLACES:
        found = flow.names.get(getattr(op, name, None), name)
        if found != name:
            return f"its pages are found by {found!r}, and prefixes are looked for in the step's own {name}"
    users = flow.users[flow.cache[op.cache]]
    return _masked_otherwise(op, users) or _written_by_others(op, users) or _not_final(op, users, flow)


def _masked_otherwise(op: Any, users: list[Any]) -> str | None:
    """Other layers that see the same cache through another mask."""
    for user in users:
        if not isinstance(user, FusedAttention | PagedAttention) or user.layer == op.layer:
            continue
        own, others = _mask_of(op), _mask_of(user)
        for name, other in others.items():
            if other != own[name]:
                return f"it shares its cache with {user.layer.value}, whose {name} is another: {other}, not {own[name]}"
    return None


def _mask_of(op: FusedAttention | PagedAttention) -> dict[str, Any]:
    """What decides which keys of a cache a query sees, and with what weight."""
    spec = spec_of(op)
    return {**asdict(spec.mask), "score stages": spec.score_stages, "sinks": op.sinks, "slopes": op.slopes}


def _written_by_others(op: Any, users: list[Any]) -> str | None:
    """Whether the layer writes its cache itself, and nothing else does."""
    writers = [user for user in users if isinstance(user, AppendKV | FusedAttention | LatentAttention)]
    others = [writer.layer.value for writer in writers if writer.layer != op.layer]
    if not writers:
        return "it does not write its cache: what lies there are another sequence's keys (cross-attention)"
    if others:
        return f"its cache is written by {', '.join(others)}"
    for user in users:
        if not isinstance(user, AppendKV | FusedAttention | PagedAttention | LatentAttention):
            return f"{user.operation.name} takes its cache too, and may change what is there"
    return None


def _not_final(op: Any, users: list[Any], flow: DataFlow) -> str | None:
    """Whether keys are written as queries see them, and are of the queries' own tokens."""
    key = _written_key(op, users)
    if not isinstance(key.owner, ir.Block) and not isinstance(op.query.owner, ir.Block):
        missing = flow.contents[op.query] - flow.contents[key]
        if missing:
            return f"its queries come from {', '.join(sorted(missing))} and its keys do not (cross-attention)"
    if op.query in flow.turned and key not in flow.turned and not flow.unseen[key]:
        return "its queries are turned by their positions and its keys are not before they are written: not final"
    return None


def _written_key(op: Any, users: list[Any]) -> ir.Value:
    """The keys that a layer writes into its cache."""
    return next(user.key for user in users if isinstance(user, AppendKV | FusedAttention) and user.layer == op.layer)


def assumption(op: FusedAttention | PagedAttention, flow: DataFlow) -> str | None:
    """What is taken for granted about a layer without an :func:`obstacle`, because the module does not show it.

    A framework's prefix cache gives one block to requests whose tokens up to its end are the same, and reads it for
    each of them with the same attention. So equal blocks hold equal keys and values, however these were computed.
    """
    key = _written_key(op, flow.users[flow.cache[op.cache]])
    if isinstance(key.owner, ir.Block):
        why = "where its keys come from was not seen"
    elif flow.unseen[key] and key not in flow.turned:
        why = f"its keys come through {', '.join(sorted(flow.unseen[key]))}, which the IR has no op for"
    else:
        return None
    return f"{why}, and that equal blocks hold equal keys, final when they are written, is what prefix caching rests on"


# -- the pass


class PrefixSharing:
    """Gives the selection of every attention op the costs by which a step decides what is read once, or none."""

    name = "prefix-sharing"

    def __init__(self, target: Target, *, allowed: bool = True):
        """``allowed``: whether the user wants it."""
        self.target = target
        self.allowed = allowed

    def __call__(self, module: ir.Operation, _pass: Any = None) -> None:
        flow = DataFlow(module)
        layers: dict[tuple[AttentionSpec, str | None, str | None], list[Any]] = defaultdict(list)
        for op in ops_of(module, FusedAttention, PagedAttention):
            if op.selection is None:
                raise LlmirError(f"layer {op.layer.value!r} has no kernel selected: run kernel-selection first")
            problem = obstacle(op, flow) if self.allowed else "switched off by the user"
            assumed = None if problem is not None else assumption(op, flow)
            layers[spec_of(op), problem, assumed].append(op)
        # Layers of one spec that differ in what they may get kernels of their own: outlining compares policies.
        for (attention, problem, assumed), ops in layers.items():
            add_remark(module, self._decide(attention, problem, assumed, ops))

    def _decide(self, attention: AttentionSpec, problem: str | None, assumed: str | None, ops: list[Any]) -> Remark:
        """Sets the selection of layers that are alike, and says why."""
        subject = of_layers([op.layer.value for op in ops])
        if problem is not None:
            return Remark(self.name, subject, ALONE, problem)
        variants = ops[0].selection.variants
        decode, prefill = (
            next(variant for variant in variants if variant.name == name) for name in ("decode", "prefill")
        )
        longest = max(op.cache.type.max_length for op in ops)
        if attention.mask.window:
            longest = min(longest, attention.mask.window - 1)  # the query's own token is in its window too
        costs = costs_on(self.target, attention, decode, prefill)
        even = BreakEven(attention, prefill.row_tile, costs, longest)
        if even.least_tokens is not None:
            costs = replace(costs, least_tokens=even.least_tokens)
            for op in ops:
                policy = replace(op.selection.policy, sharing=costs)
                op.attributes["selection"] = Selection.build(isa=op.selection.isa, variants=variants, policy=policy)
        return self._remark(subject, even, prefill, assumed)

    def _remark(self, subject: str, even: BreakEven, prefill: KernelVariant, assumed: str | None) -> Remark:
        costs, window = even.costs, even.attention.mask.window
        tile = kernel_model(self.target).describe_tile(prefill)
        reason = f"causal; {assumed}" if assumed else "causal, its own keys, final when they are written"
        if window:
            reason += f"; of a window of {window} tokens, what lies within that of every request"
        if even.least_tokens is None:
            decision = ALONE
            reason += f"; but that pays nowhere up to {even.longest} tokens"
        else:
            decision = f"read once for those who share it, from {even.least_tokens} tokens on, by tiles of {tile}"
            reason += f"; pays from {_described(even)}"
        length = min(4096, even.longest)
        return Remark(
            pass_name=self.name,
            subject=subject,
            decision=decision,
            reason=reason,
            numbers={
                "read_ns_per_key": costs.read_key,
                "cached_ns_per_key": {
                    f"of_{tokens}_tokens": float(cached_key(costs, tokens))
                    for tokens in LENGTHS
                    if tokens <= even.longest
                },
                "tile": tile,
                "tile_ns_per_key": costs.tile_key,
                "decode_ns_per_row_and_key": costs.decode_row_key,
                "row_ns": costs.row,
                "most_rows_of_a_request": costs.most_rows,
                "margin": costs.margin,
                "figures": self.target.figures.origin,
                "break_even": [even.point(requests) for requests in even.curve],
            },
            alternatives=[
                {"reading": reading, "requests": 16, "tokens": length, "us": nanoseconds / 1e3}
                for reading, nanoseconds in zip((ALONE, "read once"), even.nanoseconds(16, length), strict=True)
            ],
        )


def _described(even: BreakEven) -> str:
    """The curve in words, batches of one break-even together."""
    parts = []
    for tokens, batches in groupby(even.curve, key=lambda requests: even.curve[requests]):
        if tokens is not None:
            first, *others = batches
            requests = f"{first} to {others[-1]}" if others else str(first)
            parts.append(
                f"{tokens} tokens ({tokens * even.attention.cache.token_bytes / 1024:.0f} KB) for {requests} requests"
            )
    return ", ".join(parts)
