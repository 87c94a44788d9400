"""Quantized checkpoints of tiny models, in the formats that quantizing tools write.

Each function takes the folder of a model in float32 and makes the same model with quantized linear layers of it; the
embedding and the last layer stay as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

#: Inputs that share a scale in four bits.
GROUP = 64
#: In which order AWQ packs the eight values of 32 bits.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def compress(folder: str, scheme: str) -> None:
    """compressed-tensors' own compression by one of its preset schemes: "W8A8", "W4A16", "FP8_DYNAMIC"."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    preset = preset_name_to_scheme(scheme, ["Linear"])
    if preset.weights.group_size:
        preset.weights.group_size = GROUP
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": preset}, ignore=["lm_head"]))
    for layer in model.modules():
        if hasattr(layer, "quantization_scheme"):
            groups = layer.weight.detach().unflatten(-1, (-1, preset.weights.group_size or layer.weight.shape[-1]))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), preset.weights)
            layer.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def to_awq(folder: str) -> None:
    """AutoAWQ's "gemm" checkpoint: four bits with a scale and a zero point for each ``GROUP`` inputs.

    The format (AutoAWQ, awq/modules/linear/gemm.py): ``qweight`` int32 [inputs, outputs / 8], ``qzeros`` int32
    [inputs / GROUP, outputs / 8] and ``scales`` float16 [inputs / GROUP, outputs], each int32 with eight outputs,
    ``AWQ_ORDER``[i] in bits 4 * i and up; a weight is (value - zero) * scale.
    """
    from safetensors.torch import load_file, save_file

    path, made = Path(folder) / "model.safetensors", {}
    for name, weight in load_file(path).items():
        if not name.endswith("_proj.weight"):
            made[name] = weight.half()
            continue
        layer = name.removesuffix(".weight")
        groups = weight.t().unflatten(0, (-1, GROUP))  # [inputs / GROUP, GROUP, outputs]
        low, high = groups.amin(1), groups.amax(1)
        scale = ((high - low) / 15).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
        values = (groups / scale.float()[:, None] + zero[:, None]).round().clamp(0, 15)
        made[f"{layer}.qweight"] = _packed_by_eight(values.flatten(0, 1))
        made[f"{layer}.qzeros"] = _packed_by_eight(zero)
        made[f"{layer}.scales"] = scale
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, path, metadata={"format": "pt"})
    quantization = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    _configure(folder, quantization_config=quantization, torch_dtype="float16", dtype="float16")


def _packed_by_eight(values: torch.Tensor) -> torch.Tensor:
    """Values of four bits, [rows, columns], as int32 [rows, columns / 8]."""
    eights = values.to(torch.int64).unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)]
    words = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _configure(folder: str, **changes: Any) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
