"""Imports every text-generation architecture that a framework builds from transformers' default configuration.

    python tools/sweep_architectures.py vllm
    python tools/sweep_architectures.py sglang --json sweep.json
    python tools/sweep_architectures.py vllm --only MixtralForCausalLM OPTForCausalLM

Run it with the Python of the framework's environment. Each architecture has four layers and no weights, and is
imported and planned in a process of its own. The table says at which level it was imported and what of it is opaque,
or the sentence that it is refused with; what the framework itself cannot configure or build is counted apart.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LAYERS = 4
#: Seconds for one architecture.
PATIENCE = 240.0
#: Lists in a configuration that have an entry for each layer, and so say how many there are.
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "attn_layer_indices", "no_rope_layers")
#: By model type: what else has to change for so few layers to hang together, with attention layers among them.
OVERRIDES = {
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
#: What stops a start without being a refusal of llmir's: the framework cannot configure or build the model.
NOT_BUILT, CRASHED = "not built", "traceback"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Row:
    """What became of one architecture."""

    architecture: str
    model_type: str
    outcome: str
    """The level of import, "refused", NOT_BUILT, or CRASHED."""
    opaque: dict[str, int] = field(default_factory=dict)
    """Layers and tensor operations that the dialect has no op for: how many of each class."""
    words: str = ""
    """What llmir says about it: the error's sentence, or the remark of the import."""


def architectures(framework: str) -> dict[str, str]:
    """Model type by architecture, of those that the framework has a class for."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    if framework == "vllm":
        from vllm.model_executor.models import registry

        known = {*registry._TEXT_GENERATION_MODELS, *registry._TRANSFORMERS_SUPPORTED_MODELS}
    else:
        from sglang.srt.models.registry import ModelRegistry

        known = set(ModelRegistry.get_supported_archs())
    found: dict[str, str] = {}
    for model_type, name in names.items():
        if name in known and model_type in CONFIG_MAPPING:
            found.setdefault(name, model_type)
    return dict(sorted(found.items()))


def configuration(model_type: str, architecture: str) -> dict[str, Any]:
    """transformers' default configuration of a model type, as config.json has it, with ``LAYERS`` layers."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    try:
        config = kind(num_hidden_layers=LAYERS)
    except Exception:  # it checks the lists of its layers against their number
        config = kind()
    values = {**config.to_dict(), "architectures": [architecture], "model_type": model_type}
    name = getattr(kind, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    values[name] = LAYERS
    for per_layer in PER_LAYER:
        if isinstance(values.get(per_layer), list):
            values[per_layer] = _of_each_kind(values[per_layer])
    return {"torch_dtype": "bfloat16", **values, "dtype": "bfloat16", **OVERRIDES.get(model_type, {})}


def _of_each_kind(layers: list[Any]) -> list[Any]:
    """``LAYERS`` of a model's layers in their order, of each kind one at least."""
    chosen = sorted({layers.index(kind) for kind in layers})[:LAYERS]
    others = (number for number in range(len(layers)) if number not in chosen)
    chosen += [number for number, _ in zip(others, range(LAYERS - len(chosen)), strict=False)]
    return [layers[number] for number in sorted(chosen)]


def how_imported(module: Any) -> tuple[str, dict[str, int], str]:
    """The level of an imported module, what of it is opaque, and the import's own words about it."""
    from llmir.ir.opaque import import_level, opaque_kinds
    from llmir.ir.remarks import remarks

    words = next(remark.reason for remark in remarks(module) if remark.pass_name == "import")
    return import_level(module), opaque_kinds(module), words


def imported(framework: str, model_type: str, architecture: str) -> Row:
    """Import and plan one architecture in this process."""
    from llmir import compiler
    from llmir.errors import LlmirError
    from llmir.frontends.common.building import ImportModelError
    from llmir.frontends.common.offline import ModelError
    from llmir.targets.machine import Target
    from llmir.workload import DEFAULT

    try:
        config = configuration(model_type, architecture)
    except Exception as error:
        return Row(architecture, model_type, NOT_BUILT, words=f"transformers has no default configuration: {error}")
    if framework == "vllm":
        from llmir.frontends.vllm.offline import import_model
    else:
        from llmir.frontends.sglang.offline import import_model  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config, default=str))
        target = Target.detect()
        try:
            module = import_model(folder, target, skip_tokenizer_init=True)
            level, opaque, words = how_imported(module)
            compiler.optimize(module, target, DEFAULT)
            return Row(architecture, model_type, level, opaque, words)
        except (ImportModelError, ModelError) as error:
            return Row(architecture, model_type, NOT_BUILT, words=str(error))
        except LlmirError as error:
            return Row(architecture, model_type, "refused", words=str(error))


class NoAnswer(Exception):
    """A child process ended, or was ended, before it had a result: says how."""


def _child(answer: Connection, log: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The process of one piece of work: its result goes to ``answer``, what libraries print to ``log``."""
    with open(log, "w") as printed:
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
    try:
        answer.send((work(*arguments), ""))
    except BaseException as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        answer.send((None, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"))


def answer_of_child(work: Callable[..., Any], *arguments: Any, patience: float, log: str = os.devnull) -> Any:
    """``work(*arguments)``, computed in a process of its own; raises NoAnswer, whatever becomes of it."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, log, work, arguments))
    child.start()
    sender.close()
    try:
        if not receiver.poll(patience):
            raise NoAnswer(f"no answer within {patience:.0f} s")
        result, failure = receiver.recv()
    except EOFError:
        child.join()
        raise NoAnswer(f"the process ended with status {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    if failure:
        raise NoAnswer(failure)
    return result


def preload(framework: str) -> None:
    """Import once, in the process that children are forked from, what each would take longest for."""
    modules = {
        "vllm": ["vllm.model_executor.models.llama", "llmir.frontends.vllm.layers"],
        "sglang": ["sglang.srt.models.registry", "llmir.frontends.sglang.layers"],
    }
    multiprocessing.get_context("forkserver").set_forkserver_preload([*modules[framework], "torch_mlir.ir"])


def in_a_child(framework: str, model_type: str, architecture: str) -> Row:
    """The row of one architecture, whatever becomes of the process that imports it."""
    try:
        return answer_of_child(imported, framework, model_type, architecture, patience=PATIENCE)
    except NoAnswer as error:
        return Row(architecture, model_type, CRASHED, words=str(error))


def sweep(framework: str, only: list[str], jobs: int) -> Iterator[Row]:
    """The rows of a framework's architectures, or of those in ``only``, by name."""
    preload(framework)
    with ThreadPoolExecutor(jobs) as pool:
        chosen = {name: kind for name, kind in architectures(framework).items() if not only or name in only}
        yield from pool.map(lambda item: in_a_child(framework, item[1], item[0]), chosen.items())


def main() -> None:
    """Print a row for each architecture, then how many there are of each outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=("vllm", "sglang"))
    parser.add_argument("--only", nargs="+", default=[], metavar="ARCHITECTURE")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at once (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    rows = []
    for row in sweep(arguments.framework, arguments.only, arguments.jobs):
        rows.append(row)
        opaque = ", ".join(f"{count} {name}" for name, count in row.opaque.items())
        print(f"{row.architecture:34} {row.outcome:10} {opaque or row.words}", flush=True)
    counts = Counter(row.outcome for row in rows)
    print(f"\n{len(rows)} architectures: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
