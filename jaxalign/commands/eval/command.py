"""The command `jaxalign eval`: the evaluations, their files, and where results go."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxalign.commands.command import Command
from jaxalign.commands.going_on import overwrite_argument

if TYPE_CHECKING:
    from jaxalign.commands.eval.win_rate import Judge
    from jaxalign.run.evaluation.figures import Measured
    from jaxalign.run.evaluation.language_model import EvalOptions, EvaluatedModel

_MEASURES = {
    "loss": "conversations or texts: loss a token of the answers, and perplexity",
    "kl": "prompts: distance to --reference, on sampled answers",
    "reward": "pairs: accuracy of MODEL, a reward model, also by source",
    "win-rate": "prompts: how often MODEL's answers beat those of --versus, by a judge",
    "gsm8k": "questions with answers that end in '#### number'",
    "ifeval": "prompts with instruction_id_list and kwargs",
    "choice": "questions with choices and an answer: multiple choice",
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub id")
    for name, text in _MEASURES.items():
        parser.add_argument(f"--{name}", nargs="+", metavar="FILE", default=[], help=text)
    parser.add_argument("--tasks", metavar="NAME,…", help="tasks of lm-eval (extra `eval`)")
    parser.add_argument("--include-path", metavar="DIR", help="folder of further tasks for --tasks")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples in --tasks")
    parser.add_argument("--apply-chat-template", action="store_true", help="to prompts of --tasks")
    parser.add_argument("--train-on", default="all", metavar="WHICH",
                        help='tokens of --loss: "all" answers, "last", "everything"')  # fmt: skip
    parser.add_argument("--by", metavar="COLUMN", help='source of a row of --reward, or "subset"')
    parser.add_argument("--reference", metavar="MODEL", help="for --kl")
    parser.add_argument("--versus", metavar="MODEL", help="the other model, for --win-rate")
    parser.add_argument("--reward-model", metavar="MODEL", help="judge of --win-rate")
    parser.add_argument("--reward-chat-template", metavar="NAME", help="template of that model")
    parser.add_argument("--judge", metavar="NAME", help="judge of --win-rate, at a server")
    parser.add_argument("--judge-url", metavar="URL",
                        help="of the server, such as http://localhost:8000/v1; its key is in "
                        "OPENAI_API_KEY")  # fmt: skip
    parser.add_argument("--max-undecided", type=float, default=0.1, metavar="SHARE",
                        help="replies of the judge that may name neither answer")  # fmt: skip
    parser.add_argument("--batch", type=int, default=16, help="rows computed at a time")
    parser.add_argument("--length", type=int, default=2048, help="longest document, tokens")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer, tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="of answers; 0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--limit", type=int, metavar="N", help="rows of each measure")
    parser.add_argument("--chat-template", metavar="NAME", help='"chatml", "none", a jinja file')
    parser.add_argument("--thinking", default="auto", help='"on", "off" or "auto"')
    parser.add_argument("--out", metavar="FILE", help="results as JSON, with each row's")
    overwrite_argument(parser, "the file OUT")


def _run(parsed: argparse.Namespace) -> None:
    from jaxalign.data.paths import check_free
    from jaxalign.run.evaluation.figures import to_json, to_text
    from jaxalign.run.evaluation.language_model import EvalOptions

    given = {name: getattr(parsed, name.replace("-", "_")) for name in _MEASURES}
    _check(parsed, given)
    out = None
    if parsed.out is not None:
        sources = [parsed.model, *(file for files in given.values() for file in files)]
        out = check_free(parsed.out, "--out", overwrite=parsed.overwrite, sources=sources)
    names = ("batch", "length", "max_new_tokens", "temperature", "seed", "limit")
    options = EvalOptions(
        **{name: getattr(parsed, name) for name in (*names, "chat_template", "thinking")}
    )
    results = _measure(parsed, given, options)
    print(to_text(results))
    if out is not None:
        _write(out, parsed.model, to_json(results))


def _check(parsed: argparse.Namespace, given: dict[str, Sequence[str]]) -> None:
    """Checks, before loading anything, that options which need another one have it."""
    if not any(given.values()) and parsed.tasks is None:
        raise ValueError(
            f"nothing to measure: wanted one of {', '.join(f'--{name}' for name in _MEASURES)}, "
            "with files, or --tasks"
        )
    for option in ("include_path", "num_fewshot", "apply_chat_template"):
        if parsed.tasks is None and getattr(parsed, option):
            raise ValueError(f"--{option.replace('_', '-')}: wanted --tasks with it")
    needs = [("kl", "reference"), ("win-rate", "versus")]
    for measure, option in needs:
        has = getattr(parsed, option) is not None
        if bool(given[measure]) != has:
            lacking, other = (option, measure) if given[measure] else (measure, option)
            raise ValueError(f"--{other}: wanted --{lacking} with it")
    judges = [name for name in ("reward_model", "judge") if getattr(parsed, name) is not None]
    if given["win-rate"] and len(judges) != 1:
        raise ValueError(
            "--win-rate: wanted one judge, --reward-model MODEL or --judge NAME with --judge-url"
        )
    if judges and not given["win-rate"]:
        raise ValueError(f"--{judges[0].replace('_', '-')}: wanted --win-rate FILE with it")
    if given["reward"] and (parsed.tasks or any(f for n, f in given.items() if n != "reward")):
        raise ValueError("--reward: MODEL is a reward model there; measure the others apart")


def _measure(
    parsed: argparse.Namespace, given: dict[str, Sequence[str]], options: EvalOptions
) -> dict[str, Measured]:
    from jaxalign.commands.eval import measures
    from jaxalign.commands.eval.win_rate import measure_win_rate
    from jaxalign.run.evaluation.language_model import EvaluatedModel

    if given["reward"]:
        return {
            "reward": measures.measure_reward(parsed.model, given["reward"], options, parsed.by)
        }
    judge = _judge(parsed, options) if given["win-rate"] else None
    if parsed.tasks is not None:
        from jaxalign.run.evaluation.harness import check_harness

        check_harness()
    model = EvaluatedModel.load(parsed.model, options)
    results: dict[str, Any] = {}
    for name, run in (
        ("gsm8k", measures.measure_gsm8k),
        ("ifeval", measures.measure_ifeval),
        ("choice", measures.measure_choice),
    ):
        if given[name]:
            results[name] = run(model, given[name])
    if given["loss"]:
        results["loss"] = measures.measure_loss(model, given["loss"], parsed.train_on)
    if given["kl"]:
        reference = EvaluatedModel.load(parsed.reference, options, "--reference")
        results["kl"] = measures.measure_kl(model, reference, given["kl"])
    if judge is not None:
        other = EvaluatedModel.load(parsed.versus, options, "--versus")
        results["win-rate"] = measure_win_rate(model, other, given["win-rate"], judge)
    if parsed.tasks is not None:
        results |= _harness(parsed, model)
    return results


def _harness(parsed: argparse.Namespace, model: EvaluatedModel) -> dict[str, Measured]:
    from jaxalign.run.evaluation.harness import measure_tasks

    names = [name.strip() for name in parsed.tasks.split(",") if name.strip()]
    return measure_tasks(
        model,
        names,
        parsed.include_path,
        parsed.num_fewshot,
        apply_chat_template=parsed.apply_chat_template,
    )


def _judge(parsed: argparse.Namespace, options: EvalOptions) -> Judge:
    from jaxalign.commands.eval.judges import language_judge, reward_judge

    if parsed.reward_model is not None:
        return reward_judge(parsed.reward_model, options, parsed.reward_chat_template)
    from jaxalign.commands.synth.config import ServerConfig
    from jaxalign.commands.synth.server import ServerWriter

    server = ServerWriter(parsed.judge, ServerConfig(address=parsed.judge_url), options.batch)
    return language_judge(server, parsed.max_undecided)


def _write(path: pathlib.Path, model: str, results: dict[str, Any]) -> None:
    from jaxalign.data.paths import replace_text

    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model": model, "results": results}, ensure_ascii=False, indent=1)
    replace_text(path, text + "\n")


COMMAND = Command(
    "eval", "measure a model on files: loss, answers, preferences", _arguments, _run, compiles=True
)
