"""Makes golden/peft.npz: logits of PEFT for bases and adapters that numpy draws by their names.

Run `python tests/hf/golden_peft.py` where torch, transformers and peft are installed; the file was
made with peft 0.21 and transformers 5.24. It holds the tokens and, for each family of `KINDS`, the
logits, `adapter_config.json`, and the names and shapes of the adapter's tensors.
"""

import json
import pathlib
import sys
import tempfile
import zlib

import numpy as np
from safetensors.numpy import load_file, save_file

sys.path[:0] = [str(pathlib.Path(__file__).parents[1] / part) for part in (".", "models")]
import golden_families  # noqa: E402

KINDS = {
    "gemma3_text": {"target_modules": ["q_proj", "up_proj", "embed_tokens"], "use_rslora": True},
    "phi3": {
        "target_modules": ["qkv_proj", "gate_up_proj"],
        "rank_pattern": {"layers.1.self_attn.qkv_proj": 6},
        "alpha_pattern": {"gate_up_proj": 9},
    },
    "gpt2": {
        "target_modules": ["c_attn", "mlp.c_proj"],
        "use_dora": True,
        "fan_in_fan_out": True,
        "modules_to_save": ["ln_f"],
    },
    "qwen3_moe": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2]},
}
"""Family → options of PEFT beside r = 4 and lora_alpha = 7."""
FILE = pathlib.Path(__file__).parent / "golden/peft.npz"


def draw(shapes):
    """An adapter's tensors; each depends on its own name and shape only."""
    made = {}
    for name, shape in shapes.items():
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if "magnitude" in name:
            value = 1 + 0.2 * noise
        elif "lora_" in name:
            value = 0.15 * noise
        else:
            value = (1 if name.endswith("weight") else 0) + 0.2 * noise
        made[name] = value.astype(np.float32)
    return made


def write(folder, config, shapes):
    """An adapter in a folder."""
    folder.mkdir()
    save_file(draw(shapes), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main():
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    bases = json.loads(str(np.load(golden_families.FILE)["shapes"]))
    tokens = np.random.default_rng(1).integers(3, 48, (1, 10))
    arrays, shapes, configs = {"tokens": tokens}, {}, {}
    for kind, options in KINDS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name) / "base"
            folder.mkdir()
            golden_families.write(folder, kind, bases[kind])

            def base(folder=folder):
                return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")

            config = peft.LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **options)
            made = folder.parent / "made"
            peft.get_peft_model(base(), config).save_pretrained(made, save_embedding_layers=False)
            found = load_file(made / "adapter_model.safetensors")
            shapes[kind] = {key: list(value.shape) for key, value in found.items()}
            configs[kind] = json.loads((made / "adapter_config.json").read_text())
            configs[kind]["base_model_name_or_path"] = None
            write(folder.parent / "adapter", configs[kind], shapes[kind])
            model = peft.PeftModel.from_pretrained(base(), folder.parent / "adapter")
            with torch.no_grad():
                arrays[kind] = model.eval()(input_ids=torch.tensor(tokens)).logits.numpy()
    arrays["shapes"] = np.array(json.dumps(shapes))
    arrays["configs"] = np.array(json.dumps(configs))
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
