"""Typical mistakes: the message names the thing and the remedy; nothing on disk has changed."""

import hashlib
import json
import types

import chatmodel
import jax
import pytest
import yaml

import jaxalign as ja
from jaxalign.commands import cli

pytestmark = pytest.mark.usefixtures("kept_programs")

REWARD = "def fn(prompt, answer):\n    return 1.0\n"


@pytest.fixture(scope="module")
def run_folder(chat_models, tmp_path_factory):
    """A finished run with a checkpoint, which tests copy nothing from and write nothing to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = chatmodel.settings("sft", chat_models, folder, steps=1)
    path = folder.parent / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert cli.main(["sft", str(path)]) == 0
    return folder


@pytest.fixture
def place(chat_models, run_folder, tmp_path, monkeypatch):
    """A folder with a YAML for each algorithm, and what people put beside it."""
    for algorithm in ("sft", "reward", "dpo", "kto", "ppo"):
        values = chatmodel.settings(algorithm, chat_models, tmp_path / "out", checkpoint=False)
        values["run"]["log_every"] = 1
        (tmp_path / f"{algorithm}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    files = {
        "latin1.yaml": "model: {source: x}  # \xfcber\n".encode("latin-1"),
        "empty.yaml": b"",
        "list.yaml": b"- a\n- b\n",
        "tab.yaml": b"model:\n\tsource: x\n",
        "twice.yaml": b"run:\n  steps: 1\n  steps: 2\n",
        "nothing.jsonl": b"",
        "notes.md": b"# notes\n",
        "broken.jsonl": b'{"prompt": "hi", "completion": "ok"}\n{"prompt"\n',
        "latin1.jsonl": '{"prompt": "\xfc", "completion": "ok"}\n'.encode("latin-1"),
        "columns.jsonl": b'{"frage": "hi", "antwort": "ok"}\n',
        "sft.jsonl": b'{"prompt": "hi", "completion": "ok"}\n',
        "pairs.jsonl": b'{"prompt": "hi", "chosen": "yes", "rejected": "no"}\n',
        "rewards.py": REWARD.encode(),
        "stages.yaml": b"folder: x\nstages:\n  - {algorithm: sft}\n",
        "one_stage.yaml": b"folder: x\nstages:\n  - {name: only, algorithm: sft}\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    chatmodel.make_tokenizer(chat_template=None).save_pretrained(tmp_path / "plain")
    values = yaml.safe_load((tmp_path / "sft.yaml").read_text())
    values["data"]["packing"] = "true"
    (tmp_path / "quoted.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {"CHAT": chat_models / "chat", "SCORER": chat_models / "scorer", "RUN": run_folder}
    return types.SimpleNamespace(folder=tmp_path, run=run_folder, names=names)


def on_disk(*folders):
    """Path → checksum of every file, None for folders."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


# What is typed → what the message must hold. CHAT and SCORER are tiny models, RUN a finished run.
COMMANDS = [
    # the command line
    ("sftt sft.yaml", "invalid choice: 'sftt'", "'sft'"),
    ("sft", "required: CONFIG", "`jaxalign init` writes one"),
    ("sft sft.yaml --learning_rate 1e-3", "--learning_rate", "optimizer.learning_rate=1e-3"),
    ("sft sft.yaml --data.rows=8", "without dashes", "data.rows=8"),
    ("sft sft.yaml --batch-size 8", "--batch-size", "SECTION.batch_size=8"),
    ("sft sft.yaml data.rows 8", "override 'data.rows'", "wanted key=value"),
    ("init sft --out sft.yaml", "sft.yaml is there already", "--out"),
    ("init sfft", "recipe 'sfft': there is none", "did you mean sft"),
    ("init sft --out no/such/file.yaml", "there is no folder no/such", "make it first"),
    ("options beta", "'beta': no section and no option", "dpo.beta"),
    ("options optimiser", "'optimiser'", "optimizer"),
    # the file
    ("sft absent.yaml", "'absent.yaml': no such file", "`jaxalign init sft`"),
    ("sft configs/sft.yaml", "'configs/sft.yaml': no such file", "recipe:sft"),
    ("dpo configs/recipes/qwen3-8b/dpo.yaml", "no such file", "recipe:qwen3-8b/dpo"),
    ("dpo recipe:qwen3-7b/dpo", "recipe 'qwen3-7b/dpo'", "did you mean qwen3-8b/dpo"),
    ("sft folder", "'folder': this is a folder", "wanted a YAML file"),
    ("sft latin1.yaml", "latin1.yaml:1: invalid UTF-8 (byte 0xfc)", "save the file as UTF-8"),
    ("sft empty.yaml", "empty.yaml: the file is empty", "'key: value' lines"),
    ("sft list.yaml", "list.yaml: wanted 'key: value' lines", "got a list"),
    ("sft tab.yaml", "tab.yaml", "line 2"),
    ("sft twice.yaml", "'steps' is given twice", "line 3"),
    ("sft ppo.yaml", "ppo: unknown key", "looks like a configuration of `jaxalign ppo`"),
    ("sft one_stage.yaml", "stages: unknown key", "`jaxalign pipeline`"),
    ("pipeline sft.yaml", "wanted a list under 'stages'"),
    ("pipeline stages.yaml", "stages[0] wants a name"),
    ("pipeline one_stage.yaml onyl.run.steps=1", "starts with no stage", "only.data.rows=8"),
    # keys and types
    ("sft sft.yaml foo=1", "foo: unknown key", "known: model, data, run"),
    ("sft sft.yaml optimizer.learning_rat=1", "did you mean optimizer.learning_rate?"),
    ("sft sft.yaml data.max_length=512", "did you mean data.length?"),
    ("sft sft.yaml optimizer.learning_rate='1e-3'", "got '1e-3'", "without quotes"),
    ("sft sft.yaml data.rows='4'", "data.rows: wanted int, got '4'", "without quotes"),
    ("sft sft.yaml data.rows=4.0", "data.rows: wanted int, got 4.0"),
    ("sft quoted.yaml", "packing: got the text 'true'", "wanted true without quotes"),
    ("sft sft.yaml run.resume=1", "run.resume: wanted bool, got 1"),
    ("sft sft.yaml run.steps=None", "run.steps: wanted int", "write null"),
    ("sft sft.yaml model.lora=16", "model.lora: wanted a section, got 16"),
    # ranges, and what goes together
    ("sft sft.yaml optimizer.learning_rate=-1e-3", "learning_rate=-0.001: wanted 0 or more"),
    ("sft sft.yaml data.rows=0", "rows: got 0", "at least 1"),
    ("sft sft.yaml run.steps=0", "run.steps=0: wanted positive or null"),
    ("sft sft.yaml data.length=1", "length: got 1", "at least 2"),
    ("sft sft.yaml run.eval_every=5", "run.eval_every=5", "without data.eval"),
    ("sft sft.yaml model.dtype=bf16", "model.dtype='bf16'", "bfloat16"),
    ("sft sft.yaml model.remat=full", "model.remat='full'", "block"),
    ("sft sft.yaml model.lora.rank=0", "rank", "0"),
    ("sft sft.yaml model.lora.targets=[q_proj]", "q_proj", "query"),
    ("sft sft.yaml mesh.tensor=3", "3 does not divide the 8 devices"),
    ("sft sft.yaml data.rows=6", "6 rows", "use a multiple of 8 rows"),
    ("sft sft.yaml run.micro_batches=3", "run.micro_batches = 3", "use a multiple of 24 rows"),
    (
        "sft sft.yaml optimizer.schedule=cosine optimizer.warmup_steps=9",
        "warmup_steps=9: wanted fewer than the 4 updates",
        "lower warmup_steps",
    ),
    ("dpo dpo.yaml dpo.loss_type=dpo", "loss_type='dpo'", "sigmoid"),
    ("ppo ppo.yaml ppo.advantage_estimator=GRPO", "advantage_estimator='GRPO'", "grpo"),
    (
        "ppo ppo.yaml ppo.advantage_estimator=grpo ppo.samples=2 critic_optimizer.b1=0.5",
        "critic_optimizer={…}: wanted null",
        "leave it out",
    ),
    (
        "ppo ppo.yaml reward_model=null rewards=[{kind: function, path: 'rewards.py:fn'}]",
        "critic=null: there is no reward model",
        "set critic: policy",
        "advantage_estimator: rloo",
    ),
    (
        "ppo ppo.yaml critic=policy reward_model=null "
        "rewards=[{kind: function, path: 'rewards.py:nope'}]",
        "nope",
        "rewards.py",
    ),
    ("ppo ppo.yaml rewards=[{kind: regexp}]", "rewards[0].kind: wanted one of", "regex"),
    # data
    ("sft sft.yaml data.train=[gone.jsonl]", "gone.jsonl: no such file"),
    ("sft sft.yaml data.train=['*.csv']", "*.csv", "match"),
    ("sft sft.yaml data.train=[nothing.jsonl]", "nothing.jsonl: the file is empty"),
    ("sft sft.yaml data.train=[notes.md]", "notes.md", ".jsonl"),
    ("sft sft.yaml data.train=[broken.jsonl]", "broken.jsonl:2: malformed JSON"),
    ("sft sft.yaml data.train=[latin1.jsonl]", "latin1.jsonl:1: invalid UTF-8", "UTF-8"),
    ("sft sft.yaml data.train=[columns.jsonl]", "frage", "columns"),
    ("dpo dpo.yaml data.train=[sft.jsonl]", "sft.jsonl:1", "chosen"),
    ("sft sft.yaml data.train=[pairs.jsonl]", "pairs.jsonl:1", "chosen"),
    # models
    ("sft sft.yaml model.source=nowhere/at/all", "'nowhere/at/all': no such folder"),
    ("generate RUN hi", "is the folder of a run", "its model is RUN/model"),
    ("chat SCORER", "is a reward model", "wanted a language model"),
    ("score CHAT pairs.jsonl", "is a language model without a score"),
    ("generate CHAT hi --temperature -1", "temperature=-1.0: wanted a value from 0"),
    ("generate CHAT hi --best-of 2", "--best-of: wanted --reward-model"),
    ("score SCORER pairs.jsonl --weights helpful", "--weights: got 'helpful'", "name=number"),
    ("sft sft.yaml model.tokenizer=plain", "has no chat template", "chatml, none"),
    (
        "sft sft.yaml model.chat_template=turns.jinja",
        "ends with the ordinary token '!'",
        "chat_template='alpaca'",
    ),
    # runs
    ("sft sft.yaml run.folder=RUN run.checkpoint=true", "RUN", "run.resume=true"),
    (
        "sft sft.yaml run={folder: 'RUN', steps: 4, resume: true} optimizer.moments=bfloat16",
        "run.folder='RUN' was begun with something else",
        "optimizer.moments",
    ),
    ("export folder --out new", "no config.yaml in it; wanted a run's folder, or a model"),
    ("export nosuch --out new", "nosuch: no such folder; wanted a run's folder, or a model"),
    ("export RUN --out new --step 99", "no checkpoint 99", "there are: 1"),
    ("plan sft sft.yaml --search 2", "--search: wanted --topology"),
    ("report absent", "absent"),
]


def typed(line, names):
    """A line of the table as arguments; `[…]` and quotes hold spaces."""
    words, depth, quote = [""], 0, False
    for char in line:
        depth += (char in "[{") - (char in "]}")
        quote ^= char == "'"
        if char == " " and not depth and not quote:
            words.append("")
        else:
            words[-1] += char
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    return words


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case[0])
def test_a_command(place, case, capsys):
    line, *parts = case
    (place.folder / "turns.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}!\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    before = on_disk(place.folder, place.run)
    try:
        status = cli.main(typed(line, place.names))
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in told
    assert told.count("error:") == 1
    for part in parts:
        assert part.replace("RUN", str(place.run)) in told
    assert on_disk(place.folder, place.run) == before


def generate(prompts):
    model, params = ja.load_pretrained(PYTHON["models"] / "chat")
    return ja.generate(model, params, ja.load_tokenizer(PYTHON["models"] / "chat"), prompts)


class Mine:
    """A model of one's own: what SFT and DPO take, and sampling does not."""

    def apply(self, params, inputs, positions=None, segment_ids=None):
        return inputs

    def head(self, params):
        return params


PYTHON = {}

CALLS = [
    (lambda: generate("Hello"), "got one text, 'Hello'", "[text]"),
    (lambda: generate([{"role": "user", "content": "a"}]), "got one conversation", "[messages]"),
    (lambda: ja.generate(Mine(), {}, None, ["a"]), "type Mine, wanted a Decoder"),
    (lambda: ja.save_pretrained(Mine(), {}, "new"), "type Mine", "Orbax"),
    (lambda: ja.make_optimizer(1e-5), "got 1e-05", "OptimizerConfig(learning_rate=1e-05)"),
    (
        lambda: ja.sft_batches(["sft.jsonl"], chatmodel.make_tokenizer(), packing="true"),
        "packing: got the text 'true'",
    ),
    (
        lambda: ja.losses.dpo.preference_loss(1.0, 2.0, 1.0, 2.0, beta=0),
        "beta=0: wanted a number > 0",
    ),
    (
        lambda: ja.losses.dpo.preference_loss(1.0, 2.0, 1.0, 2.0, simpo_gama=1.0),
        "simpo_gama=1.0",
        "did you mean simpo_gamma?",
    ),
    (
        lambda: ja.ppo.Config(missing_eos_penalty=1.0).check_stop_tokens(),
        "missing_eos_penalty=1.0 without stop_tokens",
    ),
    (lambda: ja.load_pretrained("runs"), "'runs': no such folder"),
]


@pytest.mark.parametrize("case", CALLS, ids=lambda case: case[1])
def test_a_call(place, case, chat_models, monkeypatch):
    call, *parts = case
    monkeypatch.setitem(PYTHON, "models", chat_models)
    before = on_disk(place.folder)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the parts are looked for below)
        call()
    for part in parts:
        assert part in str(caught.value)
    assert on_disk(place.folder) == before


def test_there_are_sixty():
    assert len({case[0] for case in COMMANDS}) + len(CALLS) >= 60


def test_a_run_without_a_model_is_told_apart(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {}\n")
    assert cli.main(["generate", str(tmp_path), "hi"]) == 2
    assert f"jaxalign export {tmp_path} --out DIR" in capsys.readouterr().err


def test_ppo_says_that_no_answer_ends(chat_models, capsys):
    """Without stop tokens all answers are as long as they may be: said, since a run may want it."""
    from jaxalign import ppo

    model, _ = ja.load_pretrained(chat_models / "chat")
    config = ppo.Config(advantage_estimator="rloo", samples=2, max_new_tokens=7)
    ppo.make_prepare(model, None, lambda *_: None, config)
    assert "no stop_tokens, so every answer has max_new_tokens=7" in capsys.readouterr().err


def test_options_may_be_traced():
    """The losses take a traced β: a schedule of it compiles once."""
    pairs = [jax.numpy.array([-x]) for x in (1.0, 2.0, 1.5, 1.6)]

    def loss(beta):
        return ja.losses.dpo.preference_loss(*pairs, beta=beta)[0][0]

    betas = jax.numpy.array([0.1, 0.5, 2.0])
    # −log σ(β · 0.9), by hand: (−1 + 1.5) − (−2 + 1.6) = 0.9
    expected = [0.6491, 0.4932, 0.1530]
    for got in (jax.vmap(loss)(betas), jax.numpy.stack([jax.jit(loss)(b) for b in betas])):
        assert got == pytest.approx(expected, abs=1e-4)
    assert json.dumps(float(jax.grad(loss)(0.5))) != "0.0"
