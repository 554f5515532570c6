"""Explains what a folder without a loadable model holds, and what to do about it."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping

from jaxalign.hf.source import ADAPTER_CONFIG as _ADAPTER
from jaxalign.hf.source import read_json


def what_lies_there(folder: pathlib.Path) -> str | None:
    """A sentence about a folder without a whole model's weights: what it holds, and the remedy."""
    if (folder / _ADAPTER).is_file():
        return _adapter(folder)
    inner = folder / "model"
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        done = (inner / "config.json").is_file()
        return "it is the folder of a run" + (
            f"; give its model, {inner}" if done else "; write its weights by `jaxalign export`"
        )
    if (inner / "config.json").is_file():
        return f"the model lies one level down; give {inner}"
    if (folder / "model_index.json").is_file():
        return "it is a diffusion pipeline, no language model"
    pickles = sorted(p.name for kind in ("*.bin", "*.pt*", "*.ckpt") for p in folder.glob(kind))
    if pickles:
        return (
            f"it holds pickle weights only ({', '.join(pickles[:3])}), which are never read "
            "because loading them runs code; convert them to safetensors (transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out))"
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"to load {ggufs[0]}, give the path of that file"
    others = sorted(p.name for kind in ("*.h5", "*.msgpack", "*.onnx") for p in folder.glob(kind))
    if others:
        return f"it holds {', '.join(others[:3])}; convert the weights to safetensors"
    return None


def _adapter(folder: pathlib.Path) -> str:
    """The sentence for a folder that PEFT wrote."""
    try:
        base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
    except ValueError:
        base = None
    of = f" of {base!r}" if isinstance(base, str) and base else ""
    return (
        f"it holds an adapter{of} (PEFT), no whole model; merge it first (PEFT: "
        "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(out)) "
        "and give the merged folder"
    )


def prefix_hint(wanted: Mapping[str, object], found: Collection[str]) -> str:
    """The remedy for unexpected tensor names."""
    if any("lora_" in name for name in found):
        return "The file holds adapters (lora_…): merge them into their base first"
    if any(name.endswith((".qweight", ".scales", ".SCB", ".quant_state")) for name in found):
        return "The weights are quantised: give the unquantised model, or a .gguf file"
    lacking = [name for name in wanted if name not in found]
    if len(lacking) > len(wanted) // 2:
        for name in lacking:
            longer = [other for other in found if other.endswith(f".{name}")]
            if longer:
                prefix = longer[0].removesuffix(name)
                return f"The names in the file begin with {prefix!r}: remove that from them"
            shorter = [other for other in found if other and name.endswith(f".{other}")]
            if shorter:
                prefix = name.removesuffix(shorter[0])
                return f"The names in the file lack {prefix!r} at their start: add it to them"
    return "Check that config and weights belong together"
