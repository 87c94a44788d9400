"""Every option of this SGLang that has to do with the KV cache is one that somebody judged."""

import re

import msgspec
import pytest
from sglang.srt.server_args import ServerArgs

from llmir.frontends.sglang import stores

#: What options are called that have to do with the KV cache, and with who else may hold it.
ABOUT_CACHES = re.compile(
    r"kv|cache|offload|transfer|connector|disagg|store|sparse|host_|memory|mooncake|linker|pd_|pdmux|sleep|swap|radix"
    r"|page",
    re.IGNORECASE,
)
OPTIONS = {field.name for field in msgspec.structs.fields(ServerArgs)}


def test_every_option_about_caches_is_judged_once() -> None:
    found = {name for name in OPTIONS if ABOUT_CACHES.search(name)}
    assert found - set(stores.REFUSED) - stores.HARMLESS == set(), "judge these in llmir/frontends/sglang/stores.py"
    assert not set(stores.REFUSED) & stores.HARMLESS


def test_nothing_is_judged_that_there_is_not() -> None:
    assert set(stores.REFUSED) | stores.HARMLESS <= OPTIONS


@pytest.mark.parametrize("name", sorted(stores.REFUSED))
def test_what_is_served_is_what_sglang_does_by_itself(name: str) -> None:
    [default] = [field.default for field in msgspec.structs.fields(ServerArgs) if field.name == name]
    assert default == stores.REFUSED[name][0]
