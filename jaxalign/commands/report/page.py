"""HTML pages without other files: style, frame and tables. `charts` has the charts.

Light or dark follows the reader's setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxalign.commands.report.charts import text

_STYLE = """
:root{color-scheme:light dark;--bg:#fcfcfb;--ink:#0b0b0b;--mute:#52514e;--grid:#e1e0d9;
--s0:#2a78d6;--s1:#c2410c;--s2:#15803d;--s3:#7e22ce;--s4:#a16207}
@media (prefers-color-scheme:dark){:root{--bg:#1a1a19;--ink:#fff;--mute:#c3c2b7;--grid:#383835;
--s0:#5598e7;--s1:#f0894f;--s2:#4fb974;--s3:#b98af0;--s4:#d9b44a}}
body{background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;margin:2rem auto;
max-width:1180px;padding:0 1rem}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}
th,td{border-bottom:1px solid var(--grid);padding:.3rem .8rem .3rem 0;text-align:left;
vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
td.a{white-space:pre-wrap;min-width:9rem}
.wide{overflow-x:auto}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:1rem}
figure{margin:0}
figcaption{font-weight:600}
figcaption span{font-weight:400;color:var(--mute)}
figcaption i{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 .6em}
i.s0{background:var(--s0)} i.s1{background:var(--s1)}
svg{width:100%;height:auto} svg text{fill:var(--mute);font-size:11px}
.mid{text-anchor:middle} .end{text-anchor:end}
.grid{stroke:var(--grid)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
polyline.s0{stroke:var(--s0)} polyline.s1{stroke:var(--s1)}
circle.s0{fill:var(--s0)} circle.s1{fill:var(--s1)}
polyline.s2,polyline.s3,polyline.s4{stroke:var(--s0);opacity:.5} circle.s2,circle.s3{fill:none}
rect.s0{fill:var(--s0)} rect.s1{fill:var(--s1)} rect.s2{fill:var(--s2)} rect.s3{fill:var(--s3)}
rect.s4{fill:var(--s4)} i.s2{background:var(--s2)} i.s3{background:var(--s3)}
i.s4{background:var(--s4)}
summary{cursor:pointer;margin:.8rem 0}
pre{overflow-x:auto} pre.doc{white-space:pre-wrap;border-left:3px solid var(--grid);
padding-left:.8rem}
mark{background:none;color:var(--s0);font-weight:600}
.note{color:var(--mute)}
"""


def page(title: str, body: Sequence[str], style: str = "") -> str:
    """A page of ready parts under its title; well-formed as HTML and as XML.

    Args:
      title: of the page.
      body: its parts.
      style: further rules, which must not need escaping.
    """
    name = text(title)
    head = (
        f'<meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>'
        f"<title>{name} – jaxalign</title><style>{_STYLE}{style}</style>"
    )
    inner = "\n".join([f"<h1>{name}</h1>", *body])
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{inner}\n</body></html>\n'
    )


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = (), kind: str = ""
) -> str:
    """A table.

    Args:
      heads: of the columns.
      rows: cells, in the order of the columns.
      numbers: which columns hold numbers.
      kind: the class of all other cells.
    """

    def cell(tag: str, i: int, value: Any) -> str:
        name = "n" if i in numbers else kind
        attribute = f' class="{name}"' if name else ""
        return f"<{tag}{attribute}>{text(value)}</{tag}>"

    lines = [
        "<tr>" + "".join(cell(tag, i, value) for i, value in enumerate(row)) + "</tr>"
        for tag, row in [("th", heads), *(("td", row) for row in rows)]
    ]
    return f"<table>{''.join(lines)}</table>"
