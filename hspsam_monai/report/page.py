"""The fixed parts of the HTML gallery: frame, style and script; `html.py` fills in what differs."""

#: ``{title}`` and ``{body}`` are HTML already; ``{style}`` and ``{script}`` are below.
FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""  # noqa: E501 - the policy is one attribute

STYLE = """
:root {
  --paper: #f6f7f9; --card: #fff; --ink: #1c1e24; --faint: #5d6472; --rule: #e1e4ea; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1d2026; --ink: #e9ebf0; --faint: #9aa2b1; --rule: #30343d; --accent: #56b4e9;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 24px 28px 64px;
  background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 10px; }
section { margin: 0 0 24px; padding: 18px 20px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
section.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px;
  padding: 0; border: 0; background: none; }
.card { padding: 14px 18px; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.card.main { border-left: 5px solid var(--accent); }
.card h2 { margin: 0; font-size: 14px; font-weight: 500; color: var(--faint); }
.card p { margin: 0; font-size: 13px; color: var(--faint); }
.card .value { font-size: 32px; line-height: 1.25; font-weight: 650; color: var(--ink);
  font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; max-width: 760px; height: auto; }
svg .bar { fill: var(--accent); }
svg .axis { stroke: var(--faint); }
svg text { fill: var(--faint); font-size: 11px; text-anchor: middle; }
.note { margin: 0 0 10px; color: var(--faint); }
.key { display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 0 0 12px; font-size: 13px; }
.key i { display: inline-block; width: 14px; height: 14px; margin-right: 7px; vertical-align: -2px;
  border: 1px solid var(--ink); border-radius: 3px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.controls { display: flex; flex-wrap: wrap; gap: 10px 22px; align-items: center; margin: 0 0 10px; }
.controls input { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--rule);
  border-radius: 6px; padding: 5px 9px; margin-left: 5px; }
#count { color: var(--faint); }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 9px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-size: 13px; color: var(--faint); white-space: nowrap; }
#cases th { position: sticky; top: 0; background: var(--card); z-index: 1; }
table.plain { width: auto; }
table.plain td:last-child { width: auto; }
td.name { min-width: 130px; overflow-wrap: anywhere; font-weight: 600; }
.number { width: 1%; font-variant-numeric: tabular-nums; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; }
th button:hover, th button:focus-visible { color: var(--accent); }
th button::after { content: " \\2195"; opacity: .45; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
td:last-child { width: 99%; }
td > div { display: flex; gap: 8px; }
figure { margin: 0; flex: 0 1 auto; min-width: 0; }
@media screen and (max-width: 900px) { td > div { flex-wrap: wrap; } }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; background: #000; }
figcaption { font-size: 12px; color: var(--faint); }
@media print {
  :root {
    --paper: #fff; --card: #fff; --ink: #000; --faint: #444; --rule: #bbb; --accent: #0072b2;
    color-scheme: light;
  }
  body { max-width: none; padding: 0; font-size: 11px; }
  .controls, th button::after { display: none; }
  #cases th { position: static; }
  tr, .card, figure { break-inside: avoid; }
  figure img { width: 100%; }
  td.name { min-width: 80px; }
  svg .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = """
"use strict";
(() => {
  const table = document.getElementById("cases");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const find = document.getElementById("find");
  const below = document.getElementById("below");
  const count = document.getElementById("count");

  // A row without a number sorts last in both directions.
  const compare = (column, number, sign) => (a, b) => {
    const x = a.cells[column].dataset.value, y = b.cells[column].dataset.value;
    if (!number) return sign * x.localeCompare(y, undefined, { numeric: true });
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (Number(x) - Number(y));
  };

  for (const button of table.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = compare(Number(button.dataset.column), head.classList.contains("number"), up ? 1 : -1);
      body.append(...rows.sort(order));
    });
  }

  const filter = () => {
    const words = find.value.trim().toLowerCase();
    const limit = below && below.value !== "" ? Number(below.value) : Infinity;
    let seen = 0;
    for (const row of rows) {
      const dice = row.dataset.dice === "" ? -Infinity : Number(row.dataset.dice);
      row.hidden = !row.dataset.name.includes(words) || !(dice < limit);
      seen += !row.hidden;
    }
    count.textContent = seen === rows.length ? "" : `${seen} of ${rows.length} shown`;
  };
  find.addEventListener("input", filter);
  if (below) below.addEventListener("input", filter);
})();
"""
