"""One page about a model, with all of its pictures in it: no other file, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from jaxlm.pictures.style import Figure, svg

__all__ = ["Picture", "page"]

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1d20; --paper: #fdfdfb; --faint: #62676e; --line: #d9dadc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --paper: #17191c; --faint: #9aa0a7; --line: #34383d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; font: 1rem/1.5 system-ui, sans-serif;
       color: var(--ink); background: var(--paper); }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; color: var(--faint); max-width: 44rem; }
nav a { margin-right: 1rem; color: inherit; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: .75rem 0; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.wide:focus-visible { outline: 2px solid #0072B2; }
.wide svg { display: block; height: auto; max-width: 100%; min-width: 34rem; }
.wide.small svg { min-width: 20rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number, th.number { text-align: right; }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<nav aria-label="Sections">
{%- for picture in pictures %}
<a href="#s{{ loop.index }}">{{ picture.heading }}</a>
{%- endfor %}
<a href="#config">Configuration</a> <a href="#tensors">Tensors</a>
</nav>
{{ fields(summary) }}
</header>
<main>
{%- for picture in pictures %}
<section aria-labelledby="s{{ loop.index }}">
<h2 id="s{{ loop.index }}">{{ picture.heading }}</h2>
<p>{{ picture.note }}</p>
{%- for drawing in picture.drawings %}
<div class="wide{{ ' small' if drawing.small }}" tabindex="0">{{ drawing.svg }}</div>
{%- endfor %}
</section>
{%- endfor %}
<section aria-labelledby="config"><h2 id="config">Configuration</h2>
<p>Of a group of settings, what is not as usual.</p>
{{ fields(config) }}
</section>
<section aria-labelledby="tensors"><h2 id="tensors">Tensors</h2>
<div class="wide" tabindex="0"><table>
<thead><tr>
{%- for name, value in tensors[0].items() %}<th scope="col"{{ number(value) }}>{{ name }}</th>{% endfor -%}
</tr></thead>
<tbody>
{%- for row in tensors %}
<tr>{% for value in row.values() %}<td{{ number(value) }}>{{ shown(value) }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
</section>
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Picture:
    """A section of the page: its heading, a sentence on how to read it, and figures."""

    heading: str
    note: str
    figures: Sequence[Figure]


def page(
    title: str, summary: Mapping[str, Any], pictures: Sequence[Picture], config: Mapping[str, Any],
    tensors: Sequence[Mapping[str, Any]],
) -> str:
    """The page as HTML. ``tensors`` are the rows of a table, of at least one row."""
    drawn = [
        {"heading": each.heading, "note": each.note, "drawings": [
            {"svg": Markup(svg(figure, f"{each.heading} {i}")), "small": figure.get_figwidth() < 6}
            for i, figure in enumerate(each.figures, 1)
        ]}
        for each in pictures
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE)
    return template.render(
        title=title, summary=summary, pictures=drawn, config=config, tensors=tensors, shown=_shown,
        fields=_fields, number=_number,
    )


def _fields(values: Mapping[str, Any]) -> str:
    """``<dl>`` of names and values."""
    rows = [_row.format(name.replace("_", " "), _shown(value)) for name, value in values.items()]
    return Markup("<dl>{}</dl>").format(Markup("").join(rows))


_row = Markup("<dt>{}</dt><dd>{}</dd>")


def _number(value: Any) -> str:
    return Markup(' class="number"' if isinstance(value, int | float) else "")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_shown(each)}" for name, each in value.items()) or "as usual"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
