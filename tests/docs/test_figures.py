"""README's figures are those of docs/results, for the processor that it names."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def row(start):
    """The numbers of a row of README's first table: TRL, jaxalign, speed, memory."""
    (line,) = re.findall(rf"^\| {start}.*$", README, re.MULTILINE)
    numbers = re.findall(r"[\d,]+(?:\.\d+)?(?= \||| ×)", line.partition("|")[2])
    return [float(number.replace(",", "")) for number in numbers if number.strip(",")]


def newest(name, **wanted):
    """The last record of a benchmark that fits, since later ones replace earlier ones."""
    lines = (ROOT / f"docs/results/{name}.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    record = [r for r in found if all(r[key] == value for key, value in wanted.items())][-1]
    assert (record["processor"], record["cores"]) == ("AMD EPYC", 2)
    return record


def test_memory_of_four_models():
    """The memory pages quote the first and last row of plan.md's table."""
    plan = (ROOT / "docs/plan.md").read_text("utf-8")
    plan = plan.partition("## Four 7B models")[2].partition("\n## ")[0]
    totals = re.findall(r"\| (\d+\.\d) \((?:prefill|update)\) \|", plan)
    for page in ("docs/memory.md", "docs/zh/memory.md"):
        text = (ROOT / page).read_text("utf-8")
        assert re.findall(r"(\d+\.\d) GB", text) == [totals[0], totals[-1]]


def test_the_processor_is_named():
    assert "two cores of an AMD EPYC" in README.split("## Start")[0].replace("\n", " ")


def test_sft():
    record = newest("sft_speed", size="M", rows="full")
    median, ratios = record["median"], record["ratios"]["trl_padded"]
    peer, ours, speed, memory = row("SFT, full")
    assert peer == pytest.approx(median["trl_padded"]["tokens_a_second"], abs=0.5)
    assert ours == pytest.approx(median["sft_ours"]["tokens_a_second"], abs=0.5)
    assert (speed, memory) == pytest.approx((ratios["speed"], ratios["memory"]), abs=0.005)


def test_dpo():
    record = newest("preference_speed", size="S", algorithm="dpo", rows="ragged")
    assert record["job"]["shared"]  # prompts once: --shared
    peer, ours, speed, memory = row("DPO, ragged")
    assert peer == pytest.approx(record["median"]["trl"]["tokens_a_second"], abs=0.5)
    assert ours == pytest.approx(record["median"]["ours"]["tokens_a_second"], abs=0.5)
    assert speed == pytest.approx(record["speed_ratio"], abs=0.005)
    assert memory == pytest.approx(record["memory_ratio"], abs=0.005)


def test_ppo():
    record = newest("ppo_speed", what="ppo", size="S", answers="full")
    peer, ours, speed, memory = row("PPO, seconds")
    assert peer == pytest.approx(record["median"]["ppo_trl"]["seconds"], abs=0.005)
    assert ours == pytest.approx(record["median"]["ppo_ours"]["seconds"], abs=0.005)
    assert speed == pytest.approx(record["speed_ratio"], abs=0.005)
    assert memory == pytest.approx(record["memory_ratio"], abs=0.005)
