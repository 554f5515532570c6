"""`jaxalign export --to`: formats at once, and files that are not what the trainer has."""

import dataclasses
import json
import re

import chatmodel
import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.commands import cli
from jaxalign.run import export_as, formats, verify
from jaxalign.run.config.runs import load_config
from jaxalign.run.loop import train
from jaxalign.types import Params

pytestmark = pytest.mark.usefixtures("kept_programs")

FORMATS = ("hf", "gguf", "orbax")
OTHER_TEMPLATE = chatmodel.CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")


@pytest.fixture(scope="module")
def adapted(chat_models, tmp_path_factory):
    """A finished run with adapters that changed what the model says."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    values = chatmodel.settings("sft", chat_models, folder, steps=2, checkpoint=True, export=False)
    values["model"]["lora"] = {"rank": 2, "alpha": 16, "targets": ["query", "up"]}
    values["optimizer"]["learning_rate"] = 0.1
    train(load_config("sft", values))
    return folder


def record(out):
    return json.loads((out / "export.json").read_text("utf-8"))


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_several_formats_hold_the_merged_model(adapted, chat_models, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", str(adapted), "--out", str(out), "--to", *FORMATS, "--gguf-dtype", "F32"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    noted = record(out)
    assert (noted["source"], noted["step"]) == ("run", 2)
    # What the trainer has: the base and α/r · A·B, added here in numpy.
    loaded = export_as.load_run(str(adapted))
    block = loaded.params["blocks"]
    _, base = jaxalign.load_pretrained(chat_models / "chat")
    expected = chatmodel.leaves(base)
    for name, part in (("query", "attention"), ("up", "mlp")):
        a, b = (np.asarray(block[part][name][f"lora_{side}"], np.float64) for side in "ab")
        assert np.abs(b).max() > 1e-3
        expected[f"['blocks']['{part}']['{name}']['kernel']"] = (
            expected[f"['blocks']['{part}']['{name}']['kernel']"] + 16 / 2 * a @ b
        )
    for name in FORMATS:
        place = out / name
        assert f"{name}, read by jaxalign: largest difference" in printed.out
        verified = noted["formats"][name]["verified"]["jaxalign"]
        assert verified["largest"] < noted["formats"][name]["bound"] == verify.FLOOR
        assert verified["tokens"] > 500
        _, params = jaxalign.load_pretrained(place / "model-F32.gguf" if name == "gguf" else place)
        for path, value in chatmodel.leaves(params).items():
            np.testing.assert_allclose(value, expected[path], atol=1e-5, err_msg=path)
        tok = jaxalign.load_tokenizer(place / "model-F32.gguf" if name == "gguf" else place)
        assert tok.chat_template == chatmodel.CHATML
    # Nothing that is there is written over, and what may be replaced is.
    assert cli.main(command) == 2
    assert "holds hf, gguf, orbax, export.json; give another path" in capsys.readouterr().err
    (out / "notes.txt").write_text("mine")
    assert cli.main([*command[:4], "--to", "gguf", "hf", "--overwrite"]) == 0
    assert set(record(out)["formats"]) == {"gguf", "hf"}
    assert names(out / "gguf") == ["model-F16.gguf", "model-F32.gguf"]
    assert (out / "notes.txt").read_text() == "mine"


def test_the_adapters_alone_are_written_for_peft(adapted, chat_models, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", str(adapted), "--out", str(out), "--to", "hf", "peft"]
    assert cli.main(command) == 0
    assert "peft, read by jaxalign: largest difference" in capsys.readouterr().out
    place = out / "peft"
    config = json.loads((place / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(chat_models / "chat")
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    noted = record(out)["formats"]["peft"]
    # A and B of rank 2 in 2 layers: query 32 → 32, up 32 → 48.
    assert noted["weights"] == {"float32": 2 * 2 * (32 + 32 + 32 + 48)}
    assert noted["verified"]["jaxalign"]["largest"] < noted["bound"] == verify.FLOOR
    # The run's own adapters lie there, to be trained on or put beside others.
    trained = chatmodel.leaves(export_as.load_run(str(adapted)).params)
    model, params = jaxalign.load_pretrained(chat_models / "chat")
    _, read, _ = jaxalign.load_adapter(model, params, place)
    for path, value in chatmodel.leaves(read).items():
        np.testing.assert_array_equal(value, trained[path], path)
    assert jaxalign.load_tokenizer(place).chat_template == chatmodel.CHATML
    # Alone it lies in the folder itself, and is replaced where that is asked for.
    alone = [*command[:3], str(place), "--to", "peft"]
    assert cli.main(alone) == 2
    assert cli.main([*alone, "--overwrite"]) == 0
    assert cli.main([*alone, "--overwrite"]) == 0  # over `export.json` too


def test_the_adapters_alone_are_written_for_llama_cpp(adapted, chat_models, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", str(adapted), "--out", str(out), "--to", "gguf-lora"]
    assert cli.main(command) == 0
    assert "gguf-lora, read by jaxalign: largest difference" in capsys.readouterr().out
    assert names(out) == ["adapter.gguf", "export.json"]
    noted = record(out)["formats"]["gguf-lora"]
    assert noted["weights"] == {"float32": 2 * 2 * (32 + 32 + 32 + 48)}
    assert noted["verified"]["jaxalign"]["largest"] < noted["bound"] == verify.FLOOR
    trained = chatmodel.leaves(export_as.load_run(str(adapted)).params)
    model, params = jaxalign.load_pretrained(chat_models / "chat")
    _, read, _ = jaxalign.load_adapter(model, params, out / "adapter.gguf")
    for path, value in chatmodel.leaves(read).items():
        np.testing.assert_array_equal(value, trained[path], path)
    # The model's own folder is untouched beside it, and it is replaced where that is asked for.
    (out / "notes.txt").write_text("mine")
    assert cli.main(command) == 2
    assert cli.main([*command, "--overwrite"]) == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_what_peft_cannot_hold_is_refused_before_anything_is_written(
    adapted, chat_models, tmp_path, monkeypatch, capsys
):
    out, chat = str(tmp_path / "out"), str(chat_models / "chat")
    assert cli.main(["export", chat, "--out", out, "--to", "hf", "peft"]) == 2
    assert "wanted a run with adapters (model.lora), and there are none" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda *_: False)
    command = ["export", str(adapted), "--out", out, "--to", "peft", "--push", "me/mine"]
    assert cli.main(command) == 2
    assert "a folder of this machine, which nobody else can load" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plain_export_writes_what_it_always_did(adapted, tmp_path, capsys):
    out = tmp_path / "plain"
    assert cli.main(["export", str(adapted), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"checkpoint 2 of {adapted} → {out}"
    assert "hf, read by jaxalign: largest difference" in printed.err
    export_as.load_run(str(adapted))
    from jaxalign.run.export import export_run

    export_run(str(adapted), str(tmp_path / "function"))
    assert names(out) == names(tmp_path / "function")
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "function" / path.name).read_bytes()


def test_a_model_is_written_in_another_format(chat_models, tmp_path, monkeypatch, capsys):
    half, back = tmp_path / "half", tmp_path / "back"
    chat = str(chat_models / "chat")
    command = ["export", chat, "--out", str(half), "--to", "gguf", "--gguf-dtype", "q8_0"]
    assert cli.main(command) == 0
    assert names(half) == ["export.json", "model-Q8_0.gguf"]
    noted = record(half)["formats"]["gguf"]
    assert noted["rounding"] > 0
    assert noted["weights"].keys() == {"Q8_0", "float16", "float32"}
    assert 0 < noted["verified"]["jaxalign"]["largest"] <= noted["bound"]
    monkeypatch.setattr(verify, "measure", None)  # is not called
    source = str(half / "model-Q8_0.gguf")
    assert cli.main(["export", source, "--out", str(back), "--to", "hf", "--no-verify"]) == 0
    assert "verified" not in record(back)["formats"]["hf"]
    _, params = jaxalign.load_pretrained(back)
    _, expected = jaxalign.load_pretrained(source)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert jaxalign.load_tokenizer(back)("hi").input_ids == (
        jaxalign.load_tokenizer(source)("hi").input_ids
    )


def test_adapters_on_a_bfloat16_base_are_merged_with_its_rounding(
    chat_models, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    values = chatmodel.settings("sft", chat_models, folder, steps=1, checkpoint=True, export=False)
    values["model"] |= {"dtype": "bfloat16", "lora": {"rank": 2, "alpha": 64}}
    values["optimizer"]["learning_rate"] = 0.1
    train(load_config("sft", values))
    command = ["export", str(folder), "--dtype", "bfloat16", "--to", "hf"]
    assert cli.main([*command, "peft", "--out", str(tmp_path / "out")]) == 0
    noted = record(tmp_path / "out")["formats"]["hf"]
    # The sum of base and adapters is rounded to bfloat16, which the bound knows.
    assert noted["weights"].keys() == {"bfloat16"}
    assert noted["rounding"] > verify.FLOOR
    forgotten(monkeypatch)
    assert cli.main([*command, "--out", str(tmp_path / "wrong")]) == 2
    assert "model.safetensors.rejected" in names(tmp_path / "wrong")


# --- wrong exports -------------------------------------------------------------------------------


def with_query(adapted, change):
    """A model with adapters in which those of the queries are others."""
    blocks = adapted.params["blocks"]
    query = blocks["attention"]["query"]
    attention = blocks["attention"] | {"query": query | change(query)}
    return adapted._replace(params=adapted.params | {"blocks": blocks | {"attention": attention}})


def transposed(monkeypatch):
    """The queries of every file are the transpose of what they should be: of the same shape."""

    def turned(query):  # (A·B)ᵀ = Bᵀ·Aᵀ
        a, b = (query[f"lora_{side}"].swapaxes(-1, -2) for side in "ba")
        return {"lora_a": a, "lora_b": b}

    def turn(write):
        def broken(whole, folder):
            if whole.adapted is not None:
                return write(whole._replace(adapted=with_query(whole.adapted, turned)), folder)
            attention = whole.params["blocks"]["attention"]
            kernel = attention["query"]["kernel"]
            wrong = {"query": {"kernel": kernel.swapaxes(-1, -2)}}
            blocks = whole.params["blocks"] | {"attention": attention | wrong}
            return write(whole._replace(params=whole.params | {"blocks": blocks}), folder)

        return broken

    table = {name: f._replace(write=turn(f.write)) for name, f in formats.FORMATS.items()}
    monkeypatch.setattr(export_as, "FORMATS", table)


def forgotten(monkeypatch):
    """The adapters are left out instead of merged."""

    def without(node: Params):
        return {
            name: without(value) if isinstance(value, dict) else value
            for name, value in node.items()
            if not name.startswith("lora_")
        }

    monkeypatch.setattr(
        export_as,
        "whole_model",
        lambda model, params: (dataclasses.replace(model, lora=None), without(params)),
    )

    def nothing(query):
        return {"lora_b": query["lora_b"] * 0}

    def lose(write):
        return lambda whole, folder: write(
            whole._replace(adapted=with_query(whole.adapted, nothing)), folder
        )

    alone = {n: f._replace(write=lose(f.write)) for n, f in formats.FORMATS.items() if f.counts}
    monkeypatch.setattr(export_as, "FORMATS", dict(formats.FORMATS) | alone)


def another_template(monkeypatch):
    """The tokenizer in the files renders turns in another way."""
    load = export_as._load

    def loaded(*arguments):
        made = load(*arguments)
        made.exported.chat_template = OTHER_TEMPLATE
        tok = chatmodel.make_tokenizer()
        return made._replace(tokenizer=tok)

    monkeypatch.setattr(export_as, "_load", loaded)


WEIGHTS = {
    "hf": "model.safetensors",
    "gguf": "model-F32.gguf",
    "orbax": "params",
    "peft": "adapter_model.safetensors",
    "gguf-lora": "adapter.gguf",
}
WRONG = {
    "transposed": (transposed, r"largest difference \S+ nats of \d+ tokens in 16 prompts"),
    "adapter": (forgotten, r"largest difference \S+ nats of \d+ tokens in 16 prompts"),
    "template": (another_template, r"its tokenizer or chat template makes other ids of prompt 1"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_export_is_found_in_every_format(
    adapted, tmp_path, monkeypatch, capsys, spoil, message
):
    spoil(monkeypatch)
    out = tmp_path / "out"
    command = ["export", str(adapted), "--out", str(out), "--to", *WEIGHTS, "--gguf-dtype", "F32"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    for name, weights in WEIGHTS.items():
        if name == "gguf-lora" and spoil is another_template:
            assert (out / name / weights).exists()  # it holds no tokenizer
            continue
        pattern = rf"the {name} export in {re.escape(str(out / name))} is wrong: .*{message}.*"
        assert re.search(pattern + rf"{weights}\.rejected must not be used", error), error
        assert not (out / name / weights).exists()
        assert (out / name / f"{weights}.rejected").exists()
        assert record(out)["formats"][name]["verified"]["jaxalign"]["rejected"] is True
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        jaxalign.load_pretrained(out / "hf")


def test_a_wrong_export_is_replaced_by_a_right_one(adapted, tmp_path, monkeypatch):
    command = ["export", str(adapted), "--out", str(tmp_path / "out"), "--to", "hf"]
    with monkeypatch.context() as patch:
        transposed(patch)
        assert cli.main(command) == 2
    assert cli.main([*command, "--overwrite"]) == 0
    assert "model.safetensors.rejected" not in names(tmp_path / "out")
    assert "export.json" in names(tmp_path / "out")


def test_what_is_not_a_number_is_wrong(adapted, tmp_path, monkeypatch, capsys):
    measure = verify.read_back
    monkeypatch.setattr(
        verify, "read_back", lambda *arguments: measure(*arguments) * np.float32("nan")
    )
    assert cli.main(["export", str(adapted), "--out", str(tmp_path / "out")]) == 2
    assert "largest difference nan nats" in capsys.readouterr().err


# --- what is refused before anything is written --------------------------------------------------

REFUSED = {
    "--to hf hf": "wanted one or more of hf, peft, gguf, orbax, each once",
    "--to onnx": "wanted one or more of hf, peft, gguf, orbax",
    "--to gguf --step 7": "no checkpoint 7",
}


@pytest.mark.parametrize(("options", "message"), REFUSED.items())
def test_wrong_requests_write_nothing(adapted, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert cli.main(["export", str(adapted), "--out", str(out), *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_requests_about_models_write_nothing(chat_models, tmp_path, capsys):
    out, chat, scorer = str(tmp_path / "out"), chat_models / "chat", str(chat_models / "scorer")
    for command, message in (
        (
            ["export", str(chat), "--out", out, "--step", "2"],
            "--step, --best and --part",
        ),
        (["export", scorer, "--out", out, "--to", "hf", "gguf"], "a reward model or critic has no"),
        (
            ["export", str(chat), "--out", out + ".gguf", "--to", "gguf"],
            "wanted a folder; the file",
        ),
        (["export", str(chat), "--out", str(chat), "--overwrite"], "is read from there"),
    ):
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- reading by transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chat", "scorer"])
def test_transformers_reads_the_folder_where_torch_is_there(chat_models, tmp_path, kind):
    pytest.importorskip("torch")
    out = tmp_path / "out"
    command = ["export", str(chat_models / kind), "--out", str(out), "--to", "hf", "--verify"]
    assert cli.main(command) == 0
    noted = record(out)["formats"]["hf"]
    assert noted["unit"] == ("nats" if kind == "chat" else "score")
    assert noted["verified"]["transformers"]["largest"] < 1e-4
    assert noted["verified"]["transformers"]["tokens"] == noted["verified"]["jaxalign"]["tokens"]
