"""Peak memory of PPO with adapters on one base, and with whole models, on this machine.

    python scripts/bench/adapters_memory.py --work FOLDER --out docs/results/adapters_memory.jsonl

The stage PPO of the quickstart (SmolLM2-135M, its data, rows, lengths and updates), each time by
`jaxalign ppo CONFIG` in a process of its own; the figure is the most memory that the process had
resident (ru_maxrss), interpreter and compiler included:

- `quickstart`: as its recipe has it, with adapters on one projection, a critic on the policy's
  states and a reward model of the lower layers; `full`: the same with all weights trained.
- `four`: four models. With adapters, policy, critic, reference and reward model lie on one base;
  without, each of them is whole, and policy and critic are trained whole.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from _job import append, machine

ROOT = pathlib.Path(__file__).resolve().parents[2]


def prepare(work: pathlib.Path, source: str) -> None:
    """Reward models of random heads: the lower layers, an adapter, and the adapter merged."""
    import jax

    import jaxalign as ja
    from jaxalign.commands.quickstart.judge import lower_layers
    from jaxalign.models.base import combine

    tok = ja.load_tokenizer(source)
    model, params = ja.load_pretrained(source)
    lower = lower_layers(model, params, 0.4)
    scorer = ja.with_scalar_head(*lower, jax.random.key(1))
    ja.save_pretrained(*scorer, work / "lower", tokenizer=tok)
    config = ja.LoraConfig(rank=16, targets=("down",))
    adapted, trained, frozen = ja.add_lora(model, params, jax.random.key(0), config)
    trained = jax.tree.map(lambda x: x + 1e-3, trained)
    whole = ja.with_scalar_head(adapted, combine(trained, frozen), jax.random.key(2))
    ja.save_adapter(*whole, work / "adapter", base=source, tokenizer=tok)
    ja.save_pretrained(*ja.load_pretrained(work / "adapter"), work / "whole", tokenizer=tok)


def stage(source: str, steps: int) -> dict[str, Any]:
    """The quickstart's stage PPO as a configuration of its own."""
    import yaml

    recipe = ROOT / "jaxalign/commands/quickstart/recipes/quickstart.yaml"
    values = yaml.safe_load(recipe.read_text())
    (found,) = [s for s in values["stages"] if s["name"] == "ppo"]
    found = {key: value for key, value in found.items() if key not in ("name", "algorithm")}
    examples = ROOT / "jaxalign/commands/quickstart/example_data/en"
    text = json.dumps(found).replace("${examples}", str(examples))
    found = json.loads(text)
    found["model"] = values["defaults"]["model"] | {"source": source}
    found["run"] = values["defaults"]["run"] | {"steps": steps}
    return found


def cases(work: pathlib.Path, source: str, steps: int) -> dict[str, dict[str, Any]]:
    """Name → configuration."""
    found = {}
    for name in ("quickstart adapters", "quickstart full", "four adapters", "four full"):
        values = stage(source, steps)
        roles, kind = name.split()
        reward = work / "lower"
        if roles == "four":
            values["ppo"]["shared_critic"] = False
            values["critic"] = "adapter" if kind == "adapters" else "policy"
            reward = work / ("adapter" if kind == "adapters" else "whole")
        values.pop("reward_model")
        values["rewards"] = [{"kind": "model", "source": str(reward), "chat_template": "policy"}]
        if kind == "full":
            values["model"]["lora"] = None
            values["optimizer"]["learning_rate"] = 1e-6
            values["critic_optimizer"]["learning_rate"] = 1e-6
        values["run"]["folder"] = str(work / name.replace(" ", "-"))
        found[name] = values
    return found


def measure(work: pathlib.Path, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Runs a case; gives its peak of resident memory."""
    path = work / f"{name.replace(' ', '-')}.yaml"
    path.write_text(json.dumps(values))
    env = os.environ | {"JAXALIGN_CACHE": ""}
    env["PYTHONPATH"] = os.pathsep.join(x for x in (str(ROOT), env.get("PYTHONPATH")) if x)
    command = [sys.executable, "-m", "jaxalign", "ppo", str(path)]
    began = time.perf_counter()
    with (work / f"{name.replace(' ', '-')}.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit((work / f"{name.replace(' ', '-')}.log").read_text())
    return {"peak_bytes": usage.ru_maxrss * 1024, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=pathlib.Path, required=True, help="empty folder to work in")
    parser.add_argument("--model", help="by default the example model")
    parser.add_argument("--steps", type=int, default=2, help="iterations")
    parser.add_argument("--only", action="append", help="cases, such as 'four adapters'")
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if arguments.model is None:
        from jaxalign.commands.quickstart.example_model import find_example_model

        arguments.model = find_example_model()
    if arguments.prepare:
        prepare(work, arguments.model)
        return
    if not (work / "whole").exists():
        command = [sys.executable, __file__, "--work", str(work), "--model", arguments.model]
        subprocess.run([*command, "--prepare"], check=True)
    peaks: dict[str, int] = {}
    for name, values in cases(work, arguments.model, arguments.steps).items():
        if arguments.only and name not in arguments.only:
            continue
        row = {"benchmark": "adapters_memory", "what": name, "steps": arguments.steps}
        row |= measure(work, name, values)
        peaks[name] = row["peak_bytes"]
        print(json.dumps(row), flush=True)
        if arguments.out is not None:
            append(arguments.out, row | machine())
    for roles in ("quickstart", "four"):
        if {f"{roles} full", f"{roles} adapters"} <= peaks.keys():
            ratio = peaks[f"{roles} full"] / peaks[f"{roles} adapters"]
            print(f"{roles}: {ratio:.2f} times less with adapters")


if __name__ == "__main__":
    main()
