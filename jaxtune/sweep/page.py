"""The parts of sweep.html that are the same for every sweep: its look, and what sorts its table."""

from jaxtune.sweep.canvas import COLOURS


def _scheme(which: int) -> str:
    return "".join(f"--{name}:{pair[which]};" for name, pair in COLOURS.items())


STYLE = (
    f":root{{color-scheme:light dark;{_scheme(0)}--panel:#f5f6f8;"
    "--sans:ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',sans-serif;"
    "--mono:ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace}"
    f"@media (prefers-color-scheme:dark){{:root{{{_scheme(1)}--panel:#1d2126}}}}"
    """
*{box-sizing:border-box}
html{background:var(--paper);color:var(--ink);font:16px/1.55 var(--sans);
  -webkit-text-size-adjust:100%}
body{max-width:1080px;margin:0 auto;padding:3rem 1.5rem 5rem}
h1,h2,p,figure,dl,dd,ul{margin:0;padding:0}
.over{color:var(--dim);font-size:.8rem;letter-spacing:.06em}
h1{font-size:clamp(1.6rem,3.4vw,2.35rem);line-height:1.2;font-weight:650;letter-spacing:-.018em;
  margin:.35rem 0 .7rem;max-width:26em;text-wrap:balance}
section{display:grid;grid-template-columns:170px minmax(0,1fr);column-gap:2.2rem;
  margin-top:2.6rem;padding-top:1.3rem;border-top:1px solid var(--rule)}
section>*{grid-column:2}
section>:nth-child(2){margin-top:0}
section>h2{grid-column:1;grid-row:1/span 99;align-self:start;position:sticky;top:1.3rem}
section.wide>*{grid-column:1/-1;grid-row:auto}
h2{font-size:1.05rem;line-height:1.45;font-weight:650;letter-spacing:-.01em}
@media(max-width:820px){section>*,section>h2{grid-column:1/-1;grid-row:auto}
  section>h2{position:static;margin-bottom:.3rem}
  figure{overflow-x:auto}figure svg{min-width:600px}.facts dd:first-of-type{font-size:1.1rem}}
p,li{max-width:46em;text-wrap:pretty}
.note{color:var(--dim);font-size:.92rem}
code,kbd,.mono{font-family:var(--mono);font-size:.86em}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;
  margin:2rem 0 0;background:var(--rule);border:1px solid var(--rule);border-radius:10px;
  overflow:hidden}
.facts div{background:var(--paper);padding:.85rem 1rem}
.facts dt{color:var(--dim);font-size:.78rem}
.facts dd{font-size:1.32rem;font-weight:600;letter-spacing:-.015em;
  font-variant-numeric:tabular-nums;line-height:1.35}
.facts dd+dd{font-size:.8rem;font-weight:400;color:var(--dim);letter-spacing:0}
.facts .won dd:first-of-type{color:var(--best)}
figure{margin:1.1rem 0 0}
figure svg{display:block;width:100%;height:auto;overflow:visible}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figcaption{color:var(--dim);font-size:.85rem;max-width:52em;margin-top:.4rem}
.trial{transition:opacity .12s}
.lighting svg .trial:not(.lit){opacity:.13}
table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums}
th,td{padding:.34rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th{color:var(--dim);font-weight:550;vertical-align:bottom}
td.text,th.text{text-align:left}
td.why{white-space:normal;min-width:15em;color:var(--dim)}
.frame{overflow:auto;max-height:80vh;margin-top:1rem;border:1px solid var(--rule);
  border-radius:10px}
.frame table{width:100%}
.frame thead th{position:sticky;top:0;background:var(--panel);z-index:1}
.frame tbody tr:last-child td{border-bottom:0}
.plain td:first-child,.plain th:first-child{padding-left:0}
.plain tr:last-child td{border-bottom:0}
.plain+p,p+.plain{margin-top:.7rem}
th button{all:unset;cursor:pointer}
th button:focus-visible{outline:2px solid var(--finished);outline-offset:2px}
th[aria-sort] button{color:var(--ink)}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
tr.lit td{background:var(--panel)}
tr.winner td{font-weight:600}
tr.winner td.why{font-weight:400}
.dot{display:inline-block;width:.62em;height:.62em;border-radius:50%;margin-right:.5em;
  background:var(--faint)}
.dot.finished{background:var(--finished)}.dot.diverged{background:var(--diverged)}
.dot.running,.dot.paused,.dot.waiting{background:var(--running)}.dot.winner{background:var(--best)}
ul{padding-left:1.1rem;margin-top:.6rem}
li{margin:.2rem 0}
pre{font:.86rem/1.7 var(--mono);background:var(--panel);border-radius:10px;padding:1rem 1.2rem;
  overflow-x:auto;margin:.9rem 0 0}
pre .say{color:var(--dim)}
@media print{.frame{max-height:none;overflow:visible}h2{break-after:avoid}
  figure{break-inside:avoid}}
"""
)

# A click on a head sorts; the pointer on a trial, in table or picture, shows it everywhere.
SCRIPT = """
const table = document.querySelector("#trials");
const value = (row, column) => row.cells[column].dataset.value;
for (const head of table ? table.tHead.rows[0].cells : []) {
  head.querySelector("button").addEventListener("click", () => {
    const rising = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const numbers = head.dataset.kind === "number";
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a, head.cellIndex), value(b, head.cellIndex)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what is not there stays last
      const order = numbers ? Number(x) - Number(y) : x.localeCompare(y);
      return rising ? order : -order;
    });
    table.tBodies[0].append(...rows);
  });
}
const light = (event) => {
  const trial = event.target.closest("[data-trial]")?.dataset.trial;
  document.body.classList.toggle("lighting", trial !== undefined);
  for (const part of document.querySelectorAll("[data-trial]"))
    part.classList.toggle("lit", part.dataset.trial === trial);
};
document.addEventListener("mouseover", light);
"""
