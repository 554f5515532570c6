"""Rollouts compile for accelerators that are not there, at the lengths of the default config."""

import importlib.util
import json
import os
import subprocess
import sys

import chatmodel
import pytest
import yaml

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (extra plan-tpu) is not installed"
)


@needs_libtpu
@pytest.mark.parametrize("new", [64, 128])
def test_answers_of_128_tokens_compile_for_tpus(new, chat_models, tmp_path):
    """At 128 columns a compiler aborted; hence a process of its own."""
    values = chatmodel.settings("ppo", chat_models, tmp_path / "run", steps=2)
    values["ppo"] = {"max_new_tokens": new, "stop_tokens": [2]}
    values["mesh"] = {"fsdp": 4}
    config = tmp_path / "ppo.yaml"
    config.write_text(yaml.safe_dump(values), "utf-8")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "jaxalign",
            "plan",
            "ppo",
            str(config),
            "--devices",
            "v5e:2x2",
            "--json",
        ],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "decode" in json.dumps(json.loads(done.stdout))
