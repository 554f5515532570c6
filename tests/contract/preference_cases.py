"""Preference steps beyond plain DPO as the battery sees them: options, shared prompts, KTO.

Pairs of the shared form are laid by hand as `SharedPairBatch` says: prompt but for its last token,
then that token with the chosen answer, then that token with the rejected one.
"""

import cases
import numpy as np
import tiny
from cases import LENGTHS, Case

from jaxalign.algorithms import dpo, kto
from jaxalign.types import PairBatch, SharedPairBatch, TokenBatch, UnpairedBatch

READS = ("ref_chosen_logps", "ref_rejected_logps")


def pairs(rng):
    """Pairs that share their prompts, with what a reference says of them."""
    made = []
    for chosen, rejected in zip(LENGTHS, reversed(LENGTHS), strict=True):
        prompt = int(rng.integers(1, min(chosen, rejected)))
        sides = [tiny.document(rng, length, prompt) for length in (chosen, rejected)]
        sides[1]["inputs"][:prompt] = sides[0]["inputs"][:prompt]
        sides[1]["targets"][: prompt - 1] = sides[0]["inputs"][1:prompt]
        made.append(
            {
                "chosen": sides[0],
                "rejected": sides[1],
                "prompt": prompt,
                "ref_chosen_logps": -4.5 * (chosen - prompt) + rng.normal(),
                "ref_rejected_logps": -4.5 * (rejected - prompt) + rng.normal(),
            }
        )
    return made


def _per_pair(examples, groups):
    # As many slots as any packing here has, so that all layouts are of one shape.
    mask = np.zeros((len(groups), 3), bool)
    extra = {name: np.zeros(mask.shape, np.float32) for name in READS}
    for row, group in enumerate(groups):
        mask[row, : len(group)] = True
        for slot, which in enumerate(group):
            for name in READS:
                extra[name][row, slot] = examples[which][name]
    return mask, extra


def _documents_of(pair):
    """One pair as a document with branches."""
    p, both = pair["prompt"], (pair["chosen"], pair["rejected"])
    parts = [{name: value[: p - 1] for name, value in both[0].items()}]
    parts += [{name: value[p - 1 :] for name, value in side.items()} for side in both]
    sizes = [len(part["inputs"]) for part in parts]
    positions = [np.arange(p - 1), *(np.arange(p - 1, p - 1 + size) for size in sizes[1:])]
    document = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return document | {
        "positions": np.concatenate(positions).astype(np.int32),
        "branch_ids": np.repeat(np.arange(3, dtype=np.int32), sizes),
    }


def shared_batch(examples, groups, length, left=False):
    """Both answers after their prompt; a row is twice as long, so that what fits as pairs fits."""
    length = 2 * length
    documents = [_documents_of(pair) for pair in examples]
    names = ("inputs", "targets", "positions", "loss_mask", "branch_ids")
    rows = {name: np.zeros((len(groups), length), documents[0][name].dtype) for name in names}
    rows["segment_ids"] = np.zeros((len(groups), length), np.int32)
    for row, group in enumerate(groups):
        size = sum(len(documents[which]["inputs"]) for which in group)
        start = length - size if left else 0
        for segment, which in enumerate(group, start=1):
            end = start + len(documents[which]["inputs"])
            for name in names:
                rows[name][row, start:end] = documents[which][name]
            rows["segment_ids"][row, start:end] = segment
            start = end
    mask, extra = _per_pair(examples, groups)
    return SharedPairBatch(TokenBatch(**rows), **extra, mask=mask)


def plain_batch(examples, groups, length, left=False):
    """Chosen and rejected side by side, always with `[B, S]` arrays."""
    mask, extra = _per_pair(examples, groups)
    sides = {
        side: tiny.token_batch(
            tiny.lay([pair[side] for pair in examples], groups, length, left=left)
        )
        for side in ("chosen", "rejected")
    }
    return PairBatch(**sides, **extra, mask=mask)


def _spoil_refs(batch):
    nan = np.float32(np.nan)
    return {name: np.where(batch.mask, getattr(batch, name), nan) for name in READS}


def _spoil_plain(batch, rng):
    sides = {name: tiny.spoil(getattr(batch, name), rng) for name in ("chosen", "rejected")}
    return batch._replace(**sides, **_spoil_refs(batch))


def _spoil_shared(batch, rng):
    return batch._replace(tokens=tiny.spoil(batch.tokens, rng), **_spoil_refs(batch))


# KTO: each row with an answer of its own and one of another row; the last has no other.


def _unpaired(rng):
    rows = []
    for row, length in enumerate(LENGTHS):
        prompt = int(rng.integers(1, length))
        rows.append(
            {
                "own": tiny.document(rng, length, prompt),
                "other": tiny.document(rng, LENGTHS[-row - 1], 1),
                "desirable": row % 3 != 0,
                "ref_logps": np.float32(-4.5 * (length - prompt) + rng.normal()),
            }
        )
    return rows


def _unpaired_batch(rows, groups, length, left=False):
    def lay(name):
        return tiny.token_batch(tiny.lay([x[name] for x in rows], groups, length, left=left))

    def column(name, dtype):
        return np.array([rows[g[0]][name] if g else 0 for g in groups], dtype)

    kl = np.full(len(groups), 0.7, np.float32)
    desirable = column("desirable", bool)
    return UnpairedBatch(lay("own"), desirable, lay("other"), column("ref_logps", np.float32), kl)


def _spoil_unpaired(batch, rng):
    exists = batch.tokens.loss_mask.any(axis=1)
    return batch._replace(
        tokens=tiny.spoil(batch.tokens, rng),
        ref_logps=np.where(exists, batch.ref_logps, np.float32(np.nan)),
        kl=np.where(exists, batch.kl, np.float32(np.nan)),
    )


def _case(name, module, config, documents, batch, spoil, decoder=tiny.DECODER):
    return Case(
        name,
        decoder.axes,
        decoder.shapes,
        lambda tx, **kw: module.make_step(decoder, tx, config, **kw),
        cases.make_optimizer(cases._OPTIMIZER),
        documents,
        batch,
        spoil,
    )


EVERYTHING = dpo.Config(
    loss_type=("sigmoid", "ipo", "sft"),
    loss_weights=(1.0, 0.01, 0.3),
    label_smoothing=0.1,
    f_divergence="js_divergence",
    ld_alpha=0.5,
    wpo_weighting=True,
)


def kto_case(decoder):
    """KTO with this model."""
    config = kto.Config(undesirable_weight=2.0)
    return _case("kto", kto, config, _unpaired, _unpaired_batch, _spoil_unpaired, decoder)


PREFERENCE_CASES = (
    _case("everything", dpo, EVERYTHING, pairs, plain_batch, _spoil_plain),
    _case("aot", dpo, dpo.Config(loss_type="aot_unpaired"), pairs, plain_batch, _spoil_plain),
    _case("shared", dpo, EVERYTHING, pairs, shared_batch, _spoil_shared),
    kto_case(tiny.DECODER),
)

PACKS = {"everything": True, "aot": True, "shared": True, "kto": False}
MESHES = {"everything": "2x2x2", "aot": "rows4", "shared": "2x2x2", "kto": "2x2x2"}
