"""Makes golden/families.npz: logits of transformers for weights that numpy draws by their names.

Run `python tests/models/golden_families.py` where torch and transformers are installed; the file
was made with transformers 5.23. It holds the tokens and, for each family of `KINDS`, the logits and
the names and shapes of its checkpoint's tensors.
"""

import json
import pathlib
import sys
import tempfile
import zlib

import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import families

KINDS = ("gemma3_text", "phi3", "gpt2", "qwen3_moe")
FILE = pathlib.Path(__file__).parent / "golden/families.npz"


def draw(kind, shapes):
    """A checkpoint's tensors; each depends on its own name and shape only."""
    made = {}
    for name, shape in shapes.items():
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if ("norm" in name or "ln_" in name) and not name.endswith("bias"):
            value = (0 if kind.startswith("gemma") else 1) + 0.2 * noise
        elif len(shape) == 1:
            value = 0.15 * noise
        else:
            value = noise * (0.3 if "embed" in name or "wte" in name else shape[-1] ** -0.5)
        made[name] = value.astype(np.float32)
    return made


def write(folder, kind, shapes):
    """A checkpoint in a folder."""
    save_file(draw(kind, shapes), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **families.keys(kind)}))


def main():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = np.random.default_rng(0).integers(3, 48, (1, 14))
    arrays, shapes = {"tokens": tokens}, {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            config = AutoConfig.for_model(kind, **json.loads(json.dumps(families.keys(kind))))
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            found = load_file(folder / "model.safetensors")
            shapes[kind] = {key: list(value.shape) for key, value in found.items()}
            write(folder, kind, shapes[kind])
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
            with torch.no_grad():
                arrays[kind] = model.eval()(input_ids=torch.tensor(tokens)).logits.numpy()
    arrays["shapes"] = np.array(json.dumps(shapes))
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
