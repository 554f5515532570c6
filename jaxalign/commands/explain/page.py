"""An explained step as a self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxalign.commands.explain.explain import Explanation
from jaxalign.commands.explain.show import bits, cell, columns_of, figure
from jaxalign.commands.explain.units import Document
from jaxalign.commands.report.charts import text
from jaxalign.commands.report.page import page, table

_STYLE = """
.t0,.t1,.t2,.t3,.t4{border-bottom:2px solid var(--s0)}
.t1{background:rgba(194,65,12,.12)} .t2{background:rgba(194,65,12,.26)}
.t3{background:rgba(194,65,12,.42)} .t4{background:rgba(194,65,12,.6)}
.cl{border-bottom-color:var(--s3);border-bottom-style:double}
"""
_SHADES = 4
_SHADED_BY = ("loss", "gradient")
"""What a token's shade stands for: the first of these that the algorithm has, but in PPO."""


def make_page(explanation: Explanation) -> str:
    """The page as text, well-formed as HTML and as XML."""
    e = explanation
    body = [f'<p class="note">{text(e.algorithm)}</p>']
    body += [f"<p>{text(line)}</p>" for line in bits(e)]
    body.append("<h2>What stands out</h2>")
    items = "".join(f"<li>{text(finding.message)}</li>" for finding in e.findings)
    body.append(f"<ul>{items}</ul>" if items else "<p>Nothing.</p>")
    body.append(_against_before(e))
    if len(e.updates) > 1:
        names = list(e.updates[0])
        rows = [[str(n), *(figure(update.get(k)) for k in names)] for n, update in _numbered(e)]
        heads = ("update", *names)
        body += ["<h2>Updates</h2>", table(heads, rows, range(len(heads)))]
    if e.rows:
        body += ["<h2>Rows</h2>", _rows(e), *_texts(e)]
    else:
        body.append("<p>The rows of an algorithm of other code are not measured.</p>")
    return page(f"{e.run}, step {e.step}", body, style=_STYLE)


def _numbered(e: Explanation) -> Sequence[tuple[int, dict[str, float]]]:
    return list(enumerate(e.updates, start=1))


def _against_before(e: Explanation) -> str:
    if e.previous is None:
        head, heads = "<h2>Metrics</h2>", ("metric", f"step {e.step}")
        return head + table(heads, [(k, figure(now)) for k, (_, now) in e.changes.items()], (1,))
    rows = [
        (name, figure(before), figure(now), _change(before, now))
        for name, (before, now) in e.changes.items()
    ]
    note = ""
    if e.repeated is not None:
        note = f'<p class="note">{e.repeated} of its rows were in the batch before, too.</p>'
    heads = ("metric", f"step {e.previous}", f"step {e.step}", "change")
    return f"<h2>Against step {e.previous}</h2>{note}{table(heads, rows, (1, 2, 3))}"


def _change(before: float | str | None, now: float | str) -> str:
    if before is None:
        return "new"
    gap = float(now) - float(before)
    return f"{gap:+.3g}" if math.isfinite(gap) else "–"


def _rows(e: Explanation) -> str:
    names = columns_of(e)
    rows = [
        [e.rows[n].name, *(cell(k, e.rows[n].figures.get(k, math.nan)) for k in names)]
        for n in e.order
    ]
    return f'<div class="wide">{table(("row", *names), rows, range(1, len(names) + 1))}</div>'


def _texts(e: Explanation) -> list[str]:
    shade = "gradient" if e.algorithm == "ppo" else _SHADED_BY[0]
    documents = [(n, d) for n in e.texts for d in zip(e.rows[n].documents, e.texts[n], strict=True)]
    there = all(shade in document.values for _, (document, _) in documents)
    shade = shade if there else _SHADED_BY[1]
    values = [document.values[shade] for _, (document, _) in documents]
    known = np.concatenate([v[~np.isnan(v)] for v in values]) if values else np.zeros(0)
    most = float(known.max()) if known.size else 0.0
    body = [
        "<h2>Texts</h2>",
        f'<p class="note">Trained tokens are underlined; the darker, the larger their {shade}'
        f" (at most {most:.4g}). Point at a token for its values."
        + (" Clipped tokens have a double line." if e.algorithm == "ppo" else "")
        + "</p>",
    ]
    for number, (document, texts) in documents:
        name = f", {document.name}" if document.name else ""
        body.append(f'<p class="note">{text(e.rows[number].name + name)}</p>')
        body.append(f'<pre class="doc">{_tokens(document, texts, shade, most)}</pre>')
    return body


def _tokens(document: Document, texts: Sequence[str], shade: str, most: float) -> str:
    parts = []
    for at, piece in enumerate(texts):
        found = {name: float(v[at]) for name, v in document.values.items() if not np.isnan(v[at])}
        if not document.trained[at] and not found.get(shade):
            parts.append(text(piece))
            continue
        share = found.get(shade, 0.0) / most if most > 0 else 0.0
        level = min(_SHADES, math.ceil(_SHADES * share)) if math.isfinite(share) else _SHADES
        kind = f"t{max(0, level)}" + (" cl" if found.get("clipped") else "")
        tip = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        title = text(f"token {at}, id {document.ids[at]}: {tip}")
        parts.append(f'<span class="{kind}" title="{title}">{text(piece)}</span>')
    return "".join(parts)
