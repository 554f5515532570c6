"""Wrong input through the command line: exit status 2, one message that names the culprit.

Never a traceback, and never an error from inside JAX.
"""

import json
import shutil

import chatmodel
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from jaxalign.commands import cli
from jaxalign.run.config.yaml import merge

pytestmark = pytest.mark.usefixtures("kept_programs")


@pytest.fixture
def complain(chat_models, tmp_path, capsys):
    """Runs an algorithm with changed settings; gives the message of the one error."""

    def run(algorithm, changes, *overrides):
        values = chatmodel.settings(algorithm, chat_models, tmp_path / "run", checkpoint=False)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(merge(values, changes)), encoding="utf-8")
        status = cli.main([algorithm, str(path), *overrides])
        error = capsys.readouterr().err
        assert status == 2
        assert "Traceback" not in error
        assert error.count("error:") == 1
        assert error.startswith(f"jaxalign {algorithm}: error: ")
        assert not (tmp_path / "run" / "model").exists()
        return error

    return run


# Data

GOOD = {
    "sft": {"prompt": "hi", "completion": "ok"},
    "reward": {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    "ppo": {"prompt": "hi"},
}
GOOD["dpo"] = GOOD["reward"]


def data(tmp_path, *rows):
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return {"data": {"train": [str(path)]}}, path


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo"])
def test_malformed_json_names_file_and_line(complain, tmp_path, algorithm):
    good = GOOD[algorithm]
    changes, path = data(tmp_path, good, "", good, '{"prompt": "hi", "chosen', good)
    told = complain(algorithm, changes)
    assert f"{path}:4: malformed JSON" in told


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_named(complain, tmp_path, algorithm, text):
    changes, path = data(tmp_path)
    path.write_text(text)
    assert f"{path}: the file is empty" in complain(algorithm, changes)


@pytest.mark.parametrize(
    ("algorithm", "row", "field"),
    [
        ("sft", {"prompt": "hi"}, "completion"),
        ("sft", {"messages": [{"role": "user"}]}, "messages[0].content: missing"),
        ("sft", {"messages": [{"content": "hi"}]}, "messages[0].role: missing"),
        ("reward", {"prompt": "hi", "chosen": "yes"}, "'rejected'"),
        ("dpo", {"prompt": "hi", "rejected": "no"}, "'chosen'"),
        ("dpo", {"chosen": "yes", "rejected": "no"}, "prompt: missing"),
        ("ppo", {"question": "hi"}, "prompt"),
    ],
)
def test_a_missing_field_names_file_line_and_field(complain, tmp_path, algorithm, row, field):
    changes, path = data(tmp_path, GOOD[algorithm], row)
    told = complain(algorithm, changes)
    assert f"{path}:2: " in told
    assert field in told


def test_a_field_of_the_wrong_type_is_named(complain, tmp_path):
    changes, path = data(tmp_path, GOOD["sft"], {"prompt": "hi", "completion": 7})
    assert f"{path}:2: completion: got 7, wanted text" in complain("sft", changes)
    changes, path = data(tmp_path, GOOD["sft"], '["hi"]')
    assert f"{path}:2: got" in complain("sft", changes)


def test_rows_without_anything_to_train_are_an_error(complain, tmp_path):
    """The header of the answer ends beyond the length: no row keeps a trained token."""
    long = {"prompt": "x" * 40, "completion": "ok"}
    changes, _ = data(tmp_path, long, long)
    told = complain("sft", changes)
    assert "no row is left to train on (loss masks all False): 2 read" in told
    assert "length is 32; give a larger length" in told
    pair = {"prompt": "x" * 40, "chosen": "yes", "rejected": "no"}
    changes, _ = data(tmp_path, pair)
    assert "loss masks all False" in complain("dpo", changes)


def test_a_row_without_an_answer_is_an_error(complain, tmp_path):
    silent = {"messages": [{"role": "user", "content": "hi"}]}
    changes, path = data(tmp_path, GOOD["sft"], silent)
    assert f"{path}:2: messages: got no assistant turn" in complain("sft", changes)
    empty = {"prompt": "hi", "completion": "  "}
    changes, path = data(tmp_path, GOOD["sft"], empty)
    assert f"{path}:2: completion: got empty text" in complain("sft", changes)


def test_a_single_row_without_anything_to_train_is_counted(chat_models, tmp_path, capsys):
    """One bad row among good ones does not stop the run, and does not go unsaid."""
    changes, _ = data(tmp_path, *[GOOD["sft"]] * 8, {"prompt": "x" * 40, "completion": "ok"})
    values = chatmodel.settings("sft", chat_models, tmp_path / "run", checkpoint=False)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(merge(values, changes)), encoding="utf-8")
    assert cli.main(["sft", str(path), "run.steps=1", "run.export=false"]) == 0
    told = capsys.readouterr().out
    assert "9 rows read, 8 kept" in told
    assert "dropped 1: the answer begins beyond 32 tokens" in told


def test_a_missing_file_is_named(complain, tmp_path):
    gone = str(tmp_path / "gone.jsonl")
    assert f"{gone}: no such file" in complain("sft", {"data": {"train": [gone]}})


def test_bad_held_out_data_is_found_before_training(complain, tmp_path):
    changes, path = data(tmp_path, "{")
    told = complain("sft", {"data": {"eval": changes["data"]["train"]}})
    assert f"{path}:1: malformed JSON" in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# Configuration


def test_an_unknown_key_names_the_nearest(complain):
    told = complain("sft", {"optimizer": {"learnin_rate": 1}}, "data.lenght=3")
    assert "optimizer.learnin_rate: unknown key; did you mean optimizer.learning_rate?" in told
    assert "data.lenght: unknown key; did you mean data.length?" in told


def test_broken_yaml_names_the_line(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  source: x\n data: [\n")
    assert cli.main(["sft", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert "line 3" in error
    assert "Traceback" not in error


# Models


@pytest.fixture
def broken(chat_models, tmp_path):
    """A copy of the language model with changed tensors or config."""

    def make(tensors=None, **config):
        folder = tmp_path / "broken"
        shutil.copytree(chat_models / "chat", folder)
        if tensors is not None:
            weights = load_file(folder / "model.safetensors")
            save_file(tensors(weights), folder / "model.safetensors")
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return {"model": {"source": str(folder)}}

    return make


NORM = "model.layers.1.post_attention_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo"])
def test_a_missing_weight_is_named(complain, broken, algorithm):
    changes = broken(lambda tensors: {k: v for k, v in tensors.items() if k != NORM})
    told = complain(algorithm, changes)
    assert f"missing: {NORM}" in told
    assert changes["model"]["source"] in told


def test_a_weight_of_the_wrong_shape_is_named(complain, broken):
    told = complain("sft", broken(lambda tensors: tensors | {UP: np.zeros((48, 31), np.float32)}))
    assert f"wrong shape: {UP} (48, 31), wanted (48, 32)" in told


def test_an_unexpected_weight_is_named(complain, broken):
    extra = {"model.layers.2.mlp.up_proj.weight": np.zeros((48, 32), np.float32)}
    told = complain("sft", broken(lambda tensors: tensors | extra))
    assert "unexpected: model.layers.2.mlp.up_proj.weight" in told


def test_a_damaged_weight_file_is_named(complain, broken):
    changes = broken()
    file = f"{changes['model']['source']}/model.safetensors"
    with open(file, "r+b") as handle:
        handle.truncate(1000)
    assert f"{file} is not a readable safetensors file" in complain("sft", changes)


def test_a_config_the_decoder_does_not_cover_is_named(complain, broken):
    told = complain("sft", broken(model_type="t5", architectures=["T5ForConditionalGeneration"]))
    assert "t5" in told


def test_no_model_there_is_told(complain, tmp_path):
    told = complain("sft", {"model": {"source": str(tmp_path / "nowhere")}})
    assert f"'{tmp_path / 'nowhere'}': no such folder" in told


def test_a_reward_model_with_another_vocabulary_is_named(complain, tmp_path):
    import dataclasses

    import tiny

    import jaxalign
    from jaxalign.models.decoder import Decoder
    from jaxalign.models.scorer import Scorer

    small = Scorer(Decoder(dataclasses.replace(chatmodel.DECODER.config, vocab_size=200)))
    jaxalign.save_pretrained(small, tiny.random_params(small), tmp_path / "small")
    told = complain("ppo", {"reward_model": str(tmp_path / "small")})
    assert "260 tokens" in told
    assert "200" in told


# Tokenizers


@pytest.fixture
def plain_tokenizer(tmp_path):
    chatmodel.make_tokenizer(chat_template=None).save_pretrained(tmp_path / "plain")
    return {"model": {"tokenizer": str(tmp_path / "plain")}}


@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_a_tokenizer_without_a_chat_template_is_told_what_to_set(
    complain, plain_tokenizer, algorithm
):
    told = complain(algorithm, plain_tokenizer)
    assert plain_tokenizer["model"]["tokenizer"] in told
    assert "has no chat template; pass as chat_template one of chatml, none" in told


def test_generate_says_the_same(chat_models, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(chat_models / "chat", folder)
    (folder / "chat_template.jinja").unlink()
    assert cli.main(["generate", str(folder), "hi"]) == 2
    error = capsys.readouterr().err
    assert "has no chat template" in error
    assert "Traceback" not in error


def test_a_template_whose_end_is_an_ordinary_token_is_refused(complain):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}!\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    told = complain("sft", {"model": {"chat_template": template}})
    assert "ends with the ordinary token '!'" in told


# Mesh


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ({"tensor": 3}, "3 does not divide the 8 devices"),
        ({"data": 2, "fsdp": 2, "tensor": 1}, "wants 4 devices, there are 8"),
        ({"data": -1}, "data and fsdp are both -1"),
        ({"data": 0}, "data=0: wanted a positive integer"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_told(complain, mesh, told):
    assert told in complain("sft", {"mesh": mesh})


def test_a_model_that_does_not_fit_the_mesh_is_told(complain, broken, chat_models):
    told = complain("sft", {"mesh": {"tensor": 8}})
    assert "axis 'heads' has 4 parts of 8" in told
    assert "sizes that would fit: [1, 2, 4]" in told
    assert "does not divide" in told


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo"])
def test_rows_that_do_not_fit_the_mesh_are_told(complain, algorithm):
    told = complain(algorithm, {}, "data.rows=6")
    assert "6 rows" in told
    assert "use a multiple of 8 rows" in told


@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_parts_of_a_batch_that_do_not_fit_the_mesh_are_told(complain, algorithm, tmp_path):
    told = complain(algorithm, {}, "run.micro_batches=2")
    assert "8 rows do not divide into data × fsdp = 8, run.micro_batches = 2" in told
    assert "use a multiple of 16 rows" in told
    if algorithm == "ppo":
        told = complain(algorithm, {}, "minibatches=2", "run.micro_batches=2")
        assert "minibatches = 2; use a multiple of 32 rows" in told
    assert not (tmp_path / "run").exists()  # found before anything was done


# Sampling


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--temperature", "-1"), "temperature=-1.0: wanted a value from 0"),
        (("--top-p", "0"), "top_p=0.0: wanted"),
        (("--top-k", "-5"), "top_k=-5: wanted"),
        (("--max-new-tokens", "0"), "max_new_tokens=0: wanted a positive integer"),
    ],
)
def test_sampling_options_out_of_range_are_named(chat_models, capsys, option, told):
    assert cli.main(["generate", str(chat_models / "chat"), "hi", *option]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_a_reward_model_does_not_answer(chat_models, capsys):
    assert cli.main(["generate", str(chat_models / "scorer"), "hi"]) == 2
    assert "is a reward model; wanted a language model" in capsys.readouterr().err


def test_exporting_what_is_no_run_is_told(chat_models, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["export", str(tmp_path), "--out", out]) == 2
    assert "no config.yaml in it; wanted a run's folder, or a model" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("model: {source: x}\n")
    assert cli.main(["export", str(tmp_path), "--out", out]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'config.yaml'}: no config of a run" in error
    assert "Traceback" not in error
