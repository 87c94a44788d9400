"""What vLLM's code for CUDA does with and without llmir's flag, as JSON: a program for a process of its own.

Argument: a folder with folders of tiny models, by family. See ``fake_cuda.py``; nothing runs on a GPU.
"""

import fake_cuda
from cuda_cases import ENGINES, LAYERS, SELECTION

fake_cuda.become()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402

from llmir.errors import LlmirError  # noqa: E402
from llmir.frontends.vllm import plugin  # noqa: E402
from llmir.frontends.vllm.offline import import_model  # noqa: E402
from llmir.targets.machine import Target  # noqa: E402


def configure(folder: str, **arguments: Any) -> VllmConfig:
    return EngineArgs(
        model=folder, **{"skip_tokenizer_init": True, "max_model_len": 256, **arguments}
    ).create_engine_config()


def with_flag(folder: str, **arguments: Any) -> VllmConfig:
    return configure(folder, attention_backend="LLMIR", **arguments)


def said(ask: Any, *arguments: Any, **changes: Any) -> str:
    """What an error says, or an empty text."""
    try:
        ask(*arguments, **changes)
    except (LlmirError, ValueError) as error:
        return str(error)
    return ""


def chosen(backend: Any, config: VllmConfig, **changes: Any) -> str:
    """The path of the class that vLLM's platform gives a layer."""
    layer = AttentionSelectorConfig(**{**SELECTION, **changes})
    with set_current_vllm_config(config):
        return current_platform.get_attn_backend_cls(backend, attn_selector_config=layer, num_heads=4)


def summary(config: VllmConfig) -> list[Any]:
    """What llmir must leave alone where nobody asked for it."""
    return [
        config.cache_config.block_size,
        str(config.compilation_config.cudagraph_mode),
        config.scheduler_config.async_scheduling,
        config.use_v2_model_runner,
        sorted(config.additional_config),
    ]


def serving(config: VllmConfig) -> dict[str, Any]:
    """A model built as vLLM's worker builds it, on the meta device, and its caches as the engine lays them out."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
    from vllm.v1.worker.utils import AttentionGroup, allocate_kv_cache, prepare_kernel_block_sizes

    from llmir.frontends.vllm.description import check_cache, plan_of
    from llmir.frontends.vllm.importer import _one_rank

    plan = plan_of(config)
    with set_current_vllm_config(config), _one_rank(config, 0):
        with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            initialize_model(config)
        layers = config.compilation_config.static_forward_context
        if not config.cache_config.user_specified_block_size:
            config.cache_config.block_size = 2 * plan.block_size  # which is for the platform to put right
        current_platform.update_block_size_for_backend(config)
        specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
        backends = [layer.get_attn_backend() for layer in layers.values()]
        layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
        layout = resolve_kv_cache_layout(config, [layouts], specs.values())
        [caches] = get_kv_cache_configs(config, [specs], [1 << 26])
        groups = [
            [AttentionGroup(backends[0], group.layer_names, specs[group.layer_names[0]], number)]
            for number, group in enumerate(caches.kv_cache_groups)
        ]
        sizes = prepare_kernel_block_sizes(caches, groups)
        tensors = allocate_kv_cache(caches, torch.device("cpu"), layout, sizes)
    for name, tensor in tensors.items():
        check_cache(name, tensor, plan.kernel_for(name).spec.attention)
    return {
        "implementations": sorted({type(layer.impl).__name__ for layer in layers.values()}),
        "layout": layout.name,
        "groups": len(groups),
        "caches": len(tensors),
        "block size": [plan.block_size, config.cache_config.block_size, *sizes],
    }


def imported(folder: str) -> int:
    """Attention layers of a model that is read beside a GPU, where vLLM's layers are those for CUDA."""
    from llmir.ir.attention import PagedAttention
    from llmir.ir.module import ops_of

    module = import_model(folder, Target.named("cuda:sm_90"), skip_tokenizer_init=True, max_model_len=256)
    return len(ops_of(module, PagedAttention))


def main(models: Path) -> dict[str, Any]:
    llama, gemma = str(models / "llama"), str(models / "gemma2")
    before = summary(configure(llama, attention_backend="FLASH_ATTN"))
    own = chosen(AttentionBackendEnum.TRITON_ATTN, configure(llama))
    plugin.register()
    plain, config = configure(llama, attention_backend="FLASH_ATTN"), with_flag(llama)
    llmir = AttentionBackendEnum["LLMIR"]
    plan = config.additional_config["llmir_plan"]
    return {
        "untouched": [before, summary(plain)],
        "own": [own, chosen(AttentionBackendEnum.TRITON_ATTN, plain)],
        "chosen": [chosen(backend, config) for backend in (llmir, AttentionBackendEnum.CUSTOM)],
        "runner": summary(config)[1:4],
        "target": [plan["target"]["name"], plan["kernels"][0]["spec"]["isa"], plan["block_size"]],
        "llama": serving(config),
        "fp8": serving(with_flag(llama, kv_cache_dtype="fp8")),
        "gemma2": serving(with_flag(gemma, block_size=64)),
        "imported": {folder.name: imported(str(folder)) for folder in models.iterdir()},
        "engines": [said(with_flag, llama, **arguments) for arguments, _ in ENGINES],
        "layers": [said(chosen, llmir, config, **changes) for changes, _ in LAYERS],
    }


if __name__ == "__main__":
    print("FACTS" + json.dumps(main(Path(sys.argv[1]))))
