"""The data room: tokens a second, memory of a stream, and how long steps wait for data.

    python scripts/bench/data.py rate TOKENIZER FILE             tokens a second on one core
    python scripts/bench/data.py stream TOKENIZER [--gb 2]       memory while a large file streams
    python scripts/bench/data.py wait TOKENIZER FILE             share of SFT steps spent on data

TOKENIZER is a folder with a tokenizer and chat template, FILE rows of conversations (gsm8k's
train.jsonl in the figures of docs/results/data.jsonl). Each prints one JSON line, and appends it to
--out. `rate` holds itself and the tokenizer's threads to one core. `stream` writes its file into a
temporary folder first; at some 300,000 tokens a second 2 GB take half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import random
import tempfile
import time
from typing import Any


def rate(tokenizer: str, file: str, length: int = 1024, repeats: int = 3) -> dict[str, Any]:
    """Read, render, tokenise, mask, pack and lay out all rows, on one core; the best of a few."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["RAYON_NUM_THREADS"] = "1"
    from transformers import AutoTokenizer

    from jaxalign.data import sft_batches

    tok = AutoTokenizer.from_pretrained(tokenizer)
    figures = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        batches = sft_batches(file, tok, rows=16, length=length)
        for _ in batches:
            pass
        figures.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = min(figures)
    stats = batches.stats
    return {
        "rows": stats["read"],
        "tokens": stats["tokens"],
        "fill": round(stats["fill"], 4),
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "tokens_per_second": round(stats["tokens"] / wall),
        "tokens_per_cpu_second": round(stats["tokens"] / cpu),
    }


def stream(tokenizer: str, gigabytes: float, length: int = 1024) -> dict[str, Any]:
    """Resident memory while a generated file of conversations streams through once."""
    from transformers import AutoTokenizer

    from jaxalign.data import sft_batches

    tok = AutoTokenizer.from_pretrained(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.jsonl"
        size = int(gigabytes * 1e9)
        _write_rows(path, size)
        batches = sft_batches(str(path), tok, rows=16, length=length, streaming=True)
        began = told = time.perf_counter()
        samples: list[float] = []
        for _ in batches:
            now = time.perf_counter()
            if now - told > 2:
                told = now
                samples.append(_resident())
        seconds = time.perf_counter() - began
        batches.close()
        stats = batches.stats
    # The first tenth warms up: caches of the tokenizer and of templates, buffers of the allocator.
    steady = samples[len(samples) // 10 :]
    return {
        "gigabytes": gigabytes,
        "rows": stats["read"],
        "tokens": stats["tokens"],
        "seconds": round(seconds, 1),
        "tokens_per_second": round(stats["tokens"] / seconds),
        "rss_mib_after_a_tenth": round(steady[0]) if steady else None,
        "rss_mib_end": round(samples[-1]) if samples else None,
        "rss_mib_most": round(max(samples)) if samples else None,
        "samples": len(samples),
    }


def wait(tokenizer: str, file: str, steps: int = 40) -> dict[str, Any]:
    """SFT of a small model from YAML: `time/data` of `time/step`, after the first step."""
    import jax
    from transformers import AutoTokenizer

    import jaxalign as ja
    from jaxalign.models.base import DecoderConfig
    from jaxalign.run.config.runs import load_config
    from jaxalign.run.loop import train

    tok = AutoTokenizer.from_pretrained(tokenizer)
    shape = DecoderConfig(
        vocab_size=len(tok),
        hidden_size=256,
        intermediate_size=688,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        tie_embeddings=True,
    )
    model = ja.Decoder(shape)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(
        lambda leaf: 0.02 * jax.random.normal(next(keys), leaf.shape, leaf.dtype), model.shapes
    )
    figures: dict[str, Any] = {"steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        ja.save_pretrained(model, params, f"{folder}/model", tokenizer=tok)
        for name, options in (("in_memory", {}), ("streaming", {"streaming": True})):
            data = {"train": [file], "rows": 8, "length": 256, "packing": True, "epochs": None}
            run = {"folder": f"{folder}/{name}", "steps": steps, "export": False}
            values = {
                "model": {"source": f"{folder}/model"},
                "data": data | options,
                "run": run | {"checkpoint": False, "log_every": steps},
            }
            train(load_config("sft", values))
            lines = pathlib.Path(f"{folder}/{name}/metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines][1:]
            step, data_time = (sum(r[key] for r in rows) for key in ("time/step", "time/data"))
            figures[name] = {
                "seconds_a_step": round(step / len(rows), 4),
                "waiting": round(data_time / step, 5),
                "longest_wait": round(max(r["time/data"] for r in rows), 4),
            }
    return figures


def _write_rows(path: pathlib.Path, size: int) -> None:
    """Conversations of random words, some 2 KB each, none twice."""
    rng = random.Random(0)
    words = [
        "".join(
            rng.choice(["ba", "con", "di", "er", "ful", "ing", "lo", "st"])
            for _ in range(n % 4 + 1)
        )
        for n in range(5000)
    ]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            turns = [
                {"role": role, "content": " ".join(rng.choices(words, k=rng.randint(20, 140)))}
                for role in ("user", "assistant") * 2
            ]
            line = json.dumps({"id": number, "messages": turns}) + "\n"
            written += file.write(line)
            number += 1


def _resident() -> float:
    """MiB of this process in memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["rate", "stream", "wait"])
    parser.add_argument("tokenizer")
    parser.add_argument("file", nargs="?")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the streamed file")
    parser.add_argument("--steps", type=int, default=40, help="SFT steps of `wait`")
    parser.add_argument("--out", help="JSON lines are appended to this file")
    given = parser.parse_args()
    if given.what != "stream" and given.file is None:
        parser.error(f"{given.what} wants a FILE of rows")
    cores = len(os.sched_getaffinity(0))
    if given.what == "rate":
        found = rate(given.tokenizer, given.file)
    elif given.what == "stream":
        found = stream(given.tokenizer, given.gb)
    else:
        found = wait(given.tokenizer, given.file, given.steps)
    facts = {"what": given.what, "cores": cores, "load": round(os.getloadavg()[0], 1)}
    line = json.dumps(facts | {"python": platform.python_version()} | found)
    print(line)
    if given.out:
        with pathlib.Path(given.out).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
