"use strict";
// Draws the charts, and shows what both models thought of the token that is looked at.

const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
const charts = [...document.querySelectorAll(".chart")].map(async (element) => {
  const spec = JSON.parse(document.getElementById(`${element.dataset.name}-spec`).textContent);
  const options = {
    mode: "vega-lite", renderer: "svg", actions: false, tooltip: { theme: isDark ? "dark" : "light" },
  };
  try {
    await vegaEmbed(element, spec, options);
  } catch (error) {
    element.textContent = `This chart could not be drawn: ${error.message}`;
    console.error(error);
  }
});
Promise.all(charts).then(() => { document.documentElement.dataset.drawn = charts.length; });

const number = (value, digits = 3) => (value === null ? "-" : value.toFixed(digits));
const shown = (text) => text.replaceAll(" ", "␣");

function add(parent, tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  parent.append(element);
  return element;
}

// The order is that of `packed` in views.py.
function show(panel, packed, text) {
  const [position, id, isSupervised, logP, logQ, advantage, entropyP, low, high, entropyQ, overlap,
    massP, massQ, entries, numStudent, numTeacher] = packed;
  panel.replaceChildren();
  add(panel, "h4", `token ${position}: ${shown(text)} (id ${id})`);
  if (!isSupervised) add(panel, "p", "not supervised: no loss looks at it");
  add(panel, "p", `log p ${number(logP)}, log q ${number(logQ)}, advantage ${number(advantage)}`);
  const bounds = low === null ? "-" : `${number(low, 2)} to ${number(high, 2)}`;
  const ours = entropyP === null ? bounds : number(entropyP);
  add(panel, "p", `entropy H(p) ${ours}, H(q) ${number(entropyQ)}`);
  add(panel, "p", `overlap ${number(overlap, 2)}, mass on it p ${number(massP)}, q ${number(massQ)}`);
  if (!entries.length) {
    add(panel, "p", "no entries are stored");
    return;
  }
  const table = add(panel, "table");
  add(table, "caption", `the student's ${numStudent} and the teacher's ${numTeacher} likeliest`, "hidden");
  const head = add(add(table, "thead"), "tr");
  add(head, "th", "token").scope = "col";
  for (const name of ["p", "rank", "q", "rank"]) add(head, "th", name, "n").scope = "col";
  const body = add(table, "tbody");
  for (const [entryText, entryId, entryP, entryQ, rankP, rankQ] of entries) {
    const isSampled = entryId === id;
    const row = add(body, "tr", undefined, isSampled ? "sampled" : "");
    add(row, "td", shown(entryText) + (isSampled ? " ◂" : "")).title = `id ${entryId}`;
    for (const [value, rank] of [[entryP, rankP], [entryQ, rankQ]]) {
      add(row, "td", value === null ? "-" : Math.exp(value).toPrecision(2), "n");
      add(row, "td", rank || "-", "n");
    }
  }
  add(panel, "p", "◂ was sampled; - is not stored, or not among that model's likeliest");
}

// The token of the next line up or down that is nearest from side to side.
function beside(tokens, from, step) {
  const start = tokens[from].getBoundingClientRect();
  let best = from, line = null, nearest = Infinity;
  for (let i = from + step; i >= 0 && i < tokens.length; i += step) {
    const { top, left } = tokens[i].getBoundingClientRect();
    if (Math.abs(top - start.top) < 4) continue;
    line ??= top;
    if (Math.abs(top - line) > 4) break;
    if (Math.abs(left - start.left) < nearest) {
      best = i;
      nearest = Math.abs(left - start.left);
    }
  }
  return best;
}

for (const list of document.querySelectorAll(".tokens")) {
  const article = list.closest("article"), panel = article.querySelector(".panel");
  const packed = JSON.parse(article.querySelector(".packed").textContent);
  const tokens = [...list.children];
  let current = Number(list.dataset.focus);
  const look = (i) => show(panel, packed[i], tokens[i].textContent.replace("\n", ""));
  const select = (i, isSelected) => {
    tokens[i].tabIndex = isSelected ? 0 : -1;
    tokens[i].setAttribute("aria-selected", isSelected);
  };
  const go = (i) => {
    select(current, false);
    current = i;
    select(current, true);
    tokens[current].focus();
    look(current);
  };
  const moves = {
    ArrowRight: () => Math.min(current + 1, tokens.length - 1),
    ArrowLeft: () => Math.max(current - 1, 0),
    ArrowDown: () => beside(tokens, current, 1),
    ArrowUp: () => beside(tokens, current, -1),
    Home: () => 0,
    End: () => tokens.length - 1,
  };
  const pointed = (event) => tokens.indexOf(event.target);
  list.addEventListener("pointerover", (event) => { if (pointed(event) >= 0) look(pointed(event)); });
  list.addEventListener("pointerleave", () => look(current));
  list.addEventListener("click", (event) => { if (pointed(event) >= 0) go(pointed(event)); });
  list.addEventListener("keydown", (event) => {
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    go(moves[event.key]());
  });
  look(current);
}
