"""From the `rewards:` of a configuration to one reward function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.parallel.sharding import local_rows, mesh_of
from jaxalign.rewards.cases import Rows
from jaxalign.rewards.combine import combine_rewards
from jaxalign.rewards.model_spec import LoadModel
from jaxalign.rewards.specs import BuildContext, RewardFunction, RewardSpec
from jaxalign.rewards.text import TextReward
from jaxalign.types import PromptBatch, Scores, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_reward(
    specs: Sequence[RewardSpec],
    tok: PreTrainedTokenizerBase,
    *,
    rows: Any = None,
    load: LoadModel | None = None,
) -> Callable[[TokenBatch, PromptBatch], Scores]:
    """The reward function that a configuration describes: the weighted sum of all of `specs`.

    Whatever a reward needs of a row (a right answer, known instructions) is checked here, for all
    rows, before training starts.

    Args:
      specs: at least one; their names (by default their kinds) must differ.
      tok: the policy's tokenizer.
      rows: see `jaxalign.rewards.text_reward`.
      load: loads reward models; None: onto the default device.

    Raises:
      ValueError: no specs, two with one name, a function that does not exist, a reward model with
        another tokenizer than the policy's, or a row that lacks what a reward needs.
    """
    rewards: dict[str, RewardFunction] = {}
    weights: dict[str, float] = {}
    for spec in specs:
        name = spec.kind if spec.name is None else spec.name
        if name in rewards:
            raise ValueError(f"two rewards are called {name!r}; give them names: name: …")
        weights[name] = spec.weight
        reward = spec.build(BuildContext(tok=tok, rows=rows, name=name, load=load))
        rewards[name] = reward if spec.where is None else _restrict(reward, spec, rows, name)
    return combine_rewards(rewards, weights)


def _make(
    spec: RewardSpec, tok: PreTrainedTokenizerBase, rows: Any, name: str, load: Load
) -> Callable[[TokenBatch, PromptBatch], Any]:
    match spec:
        case ModelReward():
            return _model(spec, tok, rows, name, load)
        case FunctionReward():
            make = text_reward if spec.calls == "row" else batch_reward
            return make(import_function(spec.path), tok, rows=rows, name=name)
        case Gsm8kReward():
            _check_rows(rows, spec.where, name, lambda row: right_number(row, spec.column))
            function = gsm8k_answer(
                extract=spec.extract, column=spec.column, format_score=spec.format_score
            )
            return text_reward(function, tok, rows=rows, name=name)
        case IfevalReward():
            _check_rows(rows, spec.where, name, instructions)
            function = ifeval_constraints(mode=spec.mode, per=spec.per)
            return text_reward(function, tok, rows=rows, name=name)
        case RegexReward():
            function = regex_match(spec.pattern, how=spec.how, column=spec.column)
            return text_reward(function, tok, rows=rows, name=name)
        case LengthReward():
            return length_reward(
                longest=spec.longest, cache=spec.cache, target=spec.target, width=spec.width
            )
        case HttpReward():
            return http_reward(
                spec.url,
                tok,
                rows=rows,
                name=name,
                timeout=spec.timeout,
                max_failures=spec.max_failures,
                backoff=spec.backoff,
                batch=spec.batch,
                concurrency=spec.concurrency,
                seed=spec.seed,
                key_variable=spec.key_variable,
            )


def _model(
    spec: ModelReward, tok: PreTrainedTokenizerBase, rows: Any, name: str, load: Load
) -> Callable[[TokenBatch, PromptBatch], Any]:
    scorer, params = load(spec)
    if spec.tokenizer == "policy":
        check_same_tokens(tok, spec.source)
        return model_reward(scorer, params, shift=spec.shift, scale=spec.scale)
    from jaxalign.hf import load_tokenizer

    return retokenised_reward(
        scorer,
        params,
        load_tokenizer(spec.source),
        tok,
        rows=rows,
        chat_template=spec.chat_template,
        length=spec.length,
        batch=spec.batch,
        shift=spec.shift,
        scale=spec.scale,
        name=name,
    )


def _load(spec: ModelReward) -> tuple[Scorer, Params]:
    from jaxalign.hf import load_reward_model

    return load_reward_model(spec.source, spec.attributes)


def check_same_tokens(tok: PreTrainedTokenizerBase, source: str) -> None:
    """Refuses a reward model whose tokenizer means other texts by the policy's ids.

    Only what is there is looked at: without a tokenizer of its own, a reward model is believed.

    Raises:
      ValueError: a token has another id, or an ordinary one is not there.
    """
    from jaxalign.hf import load_tokenizer

    try:
        theirs = load_tokenizer(source).get_vocab()
    except ValueError:
        return
    special = set(tok.all_special_tokens)
    for token, number in tok.get_vocab().items():
        other = theirs.get(token)
        if other != number and (other is not None or token not in special):
            raise ValueError(
                f"the reward model {source!r} has another tokenizer than the policy: {token!r} is "
                f"{number} here and {other} there; let it read texts: rewards: [{{kind: model, "
                f"source: {source}, tokenizer: own}}]"
            )


def import_function(path: str) -> Callable[..., Any]:
    """A function by `module:name` or `file.py:name`.

    Raises:
      ValueError: no such module, file or function.
    """
    where, _, name = path.rpartition(":")
    if where.endswith(".py"):
        file = pathlib.Path(where)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise ValueError(f"reward path={path!r}: no such file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        # A command does not look for modules where it is called; last, so that none is hidden.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{where}.".startswith(f"{error.name}."):
                raise  # the module is there, but not what it imports
            raise ValueError(
                f"reward path={path!r}: no module {where!r}; it is looked for among what is "
                "installed and in the current folder"
            ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward path={path!r}: {where!r} has no function {name!r}")
    return function


def _check_rows(
    rows: Any, where: Mapping[str, str] | None, name: str, check: Callable[[Any], Any]
) -> None:
    """Looks at what a reward needs of each row that it applies to."""
    for origin, row in Rows(rows).all():
        if _fits(row, where):
            try:
                check(row)
            except ValueError as error:
                raise ValueError(f"{origin}: reward {name!r}: {error}") from None


def _only_where(
    reward: Callable[[TokenBatch, PromptBatch], Any],
    where: Mapping[str, str] | None,
    rows: Any,
    name: str,
) -> Callable[[TokenBatch, PromptBatch], Any]:
    """The reward, for rows with given columns only."""
    if where is None:
        return reward
    if rows is None:
        raise ValueError(f"reward {name!r} where={spec.where}: there are no rows to look at")
    applies = np.array([spec.applies_to(row) for _, row in Rows(rows).all()], np.bool_)
    if not applies.any():
        raise ValueError(f"reward {name!r} where={spec.where}: no row has these")
    if isinstance(reward, TextReward):
        return reward.only(lambda case: spec.applies_to(case.row))

    def restricted(tokens: TokenBatch, prompts: PromptBatch) -> Scores:
        mesh = mesh_of((tokens, prompts))
        index = np.asarray(local_rows(prompts.index, mesh))  # [B], -1 for padding rows
        scores = local_rows(reward(tokens, prompts), mesh)
        return Scores(scores, applies[np.maximum(index, 0)] & (index >= 0))

    return restricted
