"use strict";
/* The script of all pages: pictures are selected, sorted, filtered, enlarged, and their paths exported. Without it a page
   shows everything; it only adds. Names become text nodes, never markup. */

const data = JSON.parse(document.getElementById("data").textContent);
const cards = data.cards ?? { path: [], classes: [], statuses: [], pictures: [] };
const find = (query, within = document) => within.querySelector(query);
const all = (query, within = document) => [...within.querySelectorAll(query)];

/** An element with properties and children; texts are texts. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** As Python writes names: what cannot be printed, or would turn the direction of writing, by its code. */
function printable(text) {
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu, (c) => {
    const code = c.codePointAt(0);
    return { 9: "\\t", 10: "\\n", 13: "\\r" }[code] ?? (code < 256 ? "\\x" + code.toString(16).padStart(2, "0")
      : code < 65536 ? "\\u" + code.toString(16).padStart(4, "0") : "\\U" + code.toString(16).padStart(8, "0"));
  });
}
const named = (text) => element("bdi", {}, printable(text));
/** A share as Python writes it: never 100% or 0% for what is not quite that. */
function percent(share, digits = 1) {
  const text = share.toLocaleString("en", { style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits, roundingMode: "halfEven", useGrouping: false });
  const step = (100 * 10 ** -(digits + 2)).toFixed(digits);
  if (share < 1 && parseFloat(text) === 100) return `>${(100 - step).toFixed(digits)}%`;
  return share > 0 && parseFloat(text) === 0 ? `<${step}%` : text;
}

/* ---- The selection: rows (numbers of cards, in an order that may mean something), and a sentence that says what they are.
   Matrix, tables, map and wall set it, and listen: selection.set([3, 1], "the two nearest"), selection.on(listener). */
const selection = {
  rows: null, // null: all
  why: "",
  source: null, // the element that selected
  listeners: [],
  set(rows, why = "", source = null) {
    [this.rows, this.why, this.source] = [rows === null ? null : [...rows], why, source];
    for (const listener of this.listeners) listener(this);
  },
  clear() { this.set(null); },
  has(row) { return this.rows === null || (this.members ??= new Set(this.rows)).has(row); },
  on(listener) { this.listeners.push(listener); },
};
selection.on((it) => { it.members = null; });

/** Rows for what a data-select says: [numbers], {column: value or [values], ...}, or a name among data.selections. */
function rowsOf(what) {
  if (typeof what === "string") return data.selections[what];
  if (Array.isArray(what)) return what;
  const wanted = Object.entries(what).map(([name, value]) => [cards[name], new Set([value].flat())]);
  const scored = (row) => row < items.length || !cards.predicted || cards.predicted[row] >= 0; // of a map, other rows lie about
  return cards.path.map((_, row) => row).filter((row) => scored(row) && wanted.every(([column, values]) => column && values.has(column[row])));
}

document.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-select]");
  if (!chosen) return;
  if (chosen.getAttribute("aria-pressed") === "true") { selection.clear(); return; } // again: all
  const text = chosen.dataset.select;
  const rows = rowsOf(/^[[{]/.test(text) ? JSON.parse(text) : text);
  selection.set(rows, chosen.dataset.why ?? (find(".why", chosen) ?? chosen).textContent.trim(), chosen);
  const list = find("#pictures");
  if (list && !chosen.closest("#pictures")) list.scrollIntoView();
});
selection.on((it) => {
  for (const other of all('[data-select][aria-pressed="true"]')) other.setAttribute("aria-pressed", "false");
  it.source?.setAttribute("aria-pressed", "true");
});

/* ---- Cards */
const list = find("ul.cards[data-main]");
const items = list ? all(":scope > .card", list) : [];
const form = find("form.controls");
let shown = items.map((_, row) => row); // rows, in their order; other cards are out of the document
let beyond = []; // the same of rows that have no card: a map has them, and lists of paths
const AT_ONCE = 60; // cards: what follows the list stays within reach
const more = list ? element("button", { type: "button", className: "more" }) : null;
let most = AT_ONCE;

const collator = new Intl.Collator("en", { numeric: true }); // image 9 before image 10

/** Row numbers in the order that a key names: a column, "-" before it: the largest first; "order": as the page was made. */
function sorted(rows, key) {
  if (key === "order" && selection.rows) {
    const kept = new Set(rows);
    return selection.rows.filter((row) => kept.has(row));
  }
  const sign = key.startsWith("-") ? -1 : 1;
  const column = cards[key.replace("-", "")];
  if (!column) return rows;
  const value = (row) => (key === "label" || key === "predicted" ? cards.classes[column[row]] ?? "" : column[row]);
  // Rows without a value come last, whatever the direction.
  const missing = (row) => column[row] === -1 || column[row] === "";
  const compare = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a - b);
  return [...rows].sort((a, b) => missing(a) - missing(b) || sign * compare(value(a), value(b)) || a - b);
}

function matches(row, values) {
  return selection.has(row)
    && ["label", "predicted", "status", "correct", "split"].every((name) => !values[name] || String(cards[name]?.[row]) === values[name])
    && (!values.text || printable(cards.path[row]).toLowerCase().includes(values.text.toLowerCase()));
}

function update() {
  if (!list) return;
  const values = form ? Object.fromEntries(new FormData(form)) : {};
  const kept = items.map((_, row) => row).filter((row) => matches(row, values));
  const before = shown;
  shown = sorted(kept, values.sort ?? "order");
  if (shown.length !== before.length || shown.some((row, k) => row !== before[k])) most = AT_ONCE;
  place();
  if (shown.length) inTabOrder(shown[0]);
  if (!form) return;
  beyond = (selection.rows ?? []).filter((row) => row >= items.length && matches(row, values));
  find("output", form).textContent = `Showing ${shown.length.toLocaleString("en")} of ${items.length.toLocaleString("en")}`
    + (selection.rows && selection.why ? `: ${printable(selection.why)}` : "")
    + (beyond.length ? `; ${beyond.length.toLocaleString("en")} more on the map only, saved with the paths` : "");
  find("[data-clear]", form).hidden = selection.rows === null && !["label", "predicted", "status", "correct", "split", "text"].some((name) => values[name]);
  for (const button of all("[data-export]", form)) button.disabled = !shown.length && !beyond.length;
}

/** Puts the first cards on the page, in one step and only if they changed. */
function place() {
  const wanted = shown.slice(0, most).map((row) => items[row]);
  if (wanted.length !== list.children.length || wanted.some((item, k) => item !== list.children[k])) list.replaceChildren(...wanted);
  more.hidden = shown.length <= most;
  const rest = shown.length - most;
  more.textContent = rest > 4 * AT_ONCE ? `Show ${4 * AT_ONCE} more of ${rest.toLocaleString("en")}` : `Show the other ${rest.toLocaleString("en")}`;
}
list?.after(more);
more?.addEventListener("click", () => {
  const next = shown[most];
  most += 4 * AT_ONCE;
  place();
  focusOn(next);
});

selection.on(update);
if (form) {
  form.hidden = false;
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  find("[data-clear]", form).addEventListener("click", () => {
    const { sort } = form.elements;
    const kept = sort.value;
    form.reset();
    sort.value = kept;
    selection.clear();
  });
}

/* Arrows walk through the pictures: one of them is in the tab order at a time. */
let tabbed = null;
function inTabOrder(row) {
  if (tabbed) tabbed.tabIndex = -1;
  tabbed = find(".pic", items[row]);
  tabbed.tabIndex = 0;
}
function focusOn(row) {
  if (!items[row].isConnected) { most = shown.indexOf(row) + AT_ONCE; place(); }
  inTabOrder(row);
  tabbed.focus();
}

list?.addEventListener("keydown", (event) => {
  const here = shown.indexOf(items.indexOf(event.target.closest(".card")));
  if (here < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const top = items[shown[0]].offsetTop;
  const across = Math.max(shown.findIndex((row) => items[row].offsetTop > top), 1) || 1; // columns
  const last = shown.length - 1;
  const to = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: here + across, ArrowUp: here - across, Home: 0, End: last }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  if (to >= 0 && to <= last) focusOn(shown[to]);
});
list?.addEventListener("click", (event) => {
  const item = event.target.closest(".pic")?.closest(".card");
  if (item) enlarge(items.indexOf(item));
});

/* ---- One picture at a time, with all that is known of it */
const dialog = find("#enlarged");
let current = -1;

function bar(share) {
  const name = "http://www.w3.org/2000/svg";
  const [svg, rect] = ["svg", "rect"].map((tag) => document.createElementNS(name, tag));
  const set = (node, values) => Object.entries(values).forEach(([key, value]) => node.setAttribute(key, value));
  set(svg, { class: "share", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
  set(rect, { width: 100 * share, height: 8 });
  svg.append(rect);
  return svg;
}

function likeliest(flat) {
  const rows = [];
  for (let k = 0; k < flat.length; k += 2) {
    rows.push(element("li", {}, element("span", {}, named(cards.classes[flat[k]])), element("span", {}, percent(flat[k + 1] / 1e4)), bar(flat[k + 1] / 1e4)));
  }
  return element("ol", { className: "likeliest" }, ...rows);
}

function evidenceOf(row) {
  return element("ul", { className: "evidence" }, ...cards.evidence[row].map(([path, label, similarity, picture]) => element("li", {},
    ...(picture < 0 ? [] : [element("img", { src: cards.pictures[picture], alt: "" })]),
    ...(label < 0 ? [] : [element("b", {}, named(cards.classes[label])), " "]), `cosine ${similarity.toFixed(3)} `, named(path))));
}

/** What is known of a card, as pairs of a word and an element. */
function factsOf(row) {
  const name = (column) => (cards[column]?.[row] >= 0 ? named(cards.classes[cards[column][row]]) : null);
  const text = (column) => (cards[column]?.[row] ? document.createTextNode(printable(cards[column][row])) : null);
  const outcome = { 1: "right", 0: "wrong" }[cards.correct?.[row]];
  const status = cards.statuses[cards.status?.[row] ?? 0];
  const pairs = [["label", name("label")], ["prediction", name("predicted")], ["that is", outcome && document.createTextNode(outcome)],
    ["status", status !== "ok" && document.createTextNode(status)], ["reason", text("reason")], ["split", text("split")], ["note", text("note")],
    ["unfamiliar", cards.unfamiliarity?.[row] >= 0 && document.createTextNode(`more than ${percent(cards.unfamiliarity[row])} of the training images`)]];
  return pairs.filter(([, value]) => value);
}

function enlarge(row) {
  if (row < 0) return;
  current = row;
  const image = find("img", items[row]);
  const facts = element("dl", { className: "facts" });
  for (const [word, value] of factsOf(row)) facts.append(element("dt", {}, word), element("dd", {}, value));
  const right = element("div", {}, element("h2", { id: "enlarged-name" }, named(cards.path[row])), facts);
  if (cards.top?.[row].length) right.append(element("h3", {}, "Likeliest classes"), likeliest(cards.top[row]));
  if (cards.evidence?.[row].length) right.append(element("h3", {}, "Nearest training images"), evidenceOf(row));
  const left = image ? element("img", { className: "big", src: image.src, alt: image.alt }) : element("p", { className: "soft" }, "No picture.");
  find(".two", dialog).replaceChildren(left, right);
  const at = shown.indexOf(row);
  find('[data-step="-1"]', dialog).disabled = at <= 0;
  find('[data-step="1"]', dialog).disabled = at < 0 || at >= shown.length - 1;
  if (!dialog.open) dialog.showModal();
}

function step(by) {
  const next = shown[shown.indexOf(current) + by];
  if (next !== undefined) enlarge(next);
}
dialog?.addEventListener("click", (event) => {
  const by = event.target.dataset.step;
  if (by) step(Number(by));
  else if (event.target === dialog || event.target.matches("[data-close]")) dialog.close();
});
dialog?.addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (by) step(by);
});
dialog?.addEventListener("close", () => { if (list.contains(document.activeElement) && shown.includes(current)) focusOn(current); });

/* ---- Paths of what is shown, a line each, or as CSV where a name has line breaks; names that are no UTF-8 by their bytes */
function pathList() {
  const paths = [...shown, ...beyond].map((row) => cards.path[row]);
  if (!paths.some((path) => /[\r\n]/.test(path))) return paths.join("\n") + "\n";
  return ["path", ...paths.map((path) => `"${path.replaceAll('"', '""')}"`)].join("\r\n") + "\r\n";
}

function asBytes(text) {
  // Python's surrogate escapes, U+DC80 to U+DCFF: a byte each.
  const encoder = new TextEncoder();
  return text.split(/((?<![\ud800-\udbff])[\udc80-\udcff])/).map((part, k) => (k % 2 ? new Uint8Array([part.charCodeAt(0) & 255]) : encoder.encode(part)));
}

for (const button of all("[data-export]")) {
  button.addEventListener("click", async () => {
    const text = pathList();
    if (button.dataset.export === "copy") {
      const field = element("textarea", { value: text });
      document.body.append(field);
      field.select();
      document.execCommand("copy"); // works in files, too, where navigator.clipboard is missing
      field.remove();
      button.focus();
    } else {
      const link = element("a", { href: URL.createObjectURL(new Blob(asBytes(text))), download: text.startsWith("path\r") ? "paths.csv" : "paths.txt" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
    find("output", form).textContent = `${(shown.length + beyond.length).toLocaleString("en")} paths ${button.dataset.export === "copy" ? "copied" : "saved"}`;
  });
}

/* ---- Confusion matrix: counts, or shares of rows or columns; of many classes a part, drawn as Python draws it */
const matrix = find("table.matrix");
for (const button of all("button[data-by]")) {
  button.addEventListener("click", () => {
    matrix.dataset.by = button.dataset.by;
    for (const other of all("button[data-by]")) other.ariaPressed = String(other === button);
  });
}

const triples = []; // [true class, called, images] of all cells that are not empty
for (let k = 0; k < (data.confusion?.cells.length ?? 0); k += 3) triples.push(data.confusion.cells.slice(k, k + 3));
const sums = [0, 1].map((side) => triples.reduce((sum, cell) => sum.set(cell[side], (sum.get(cell[side]) ?? 0) + cell[2]), new Map()));

function drawMatrix(numbers) {
  const at = new Map(triples.map((cell) => [cell[0] + "," + cell[1], cell[2]]));
  const highest = (hit) => Math.max(1, ...triples.filter(([i, j]) => (i === j) === hit).map((cell) => cell[2]));
  const tops = [highest(false), highest(true)];
  const name = (number) => { // as Python's middle_out
    const whole = printable(cards.classes[number]);
    const letters = [...whole];
    return element("bdi", { title: whole }, letters.length > 24 ? letters.slice(0, 11).join("") + "…" + letters.slice(-12).join("") : whole);
  };
  const cell = (i, j) => {
    const n = at.get(i + "," + j);
    if (!n) return element("td", {}, element("span", { className: "zero" }, "·"));
    const shares = { k: n / tops[Number(i === j)], r: n / sums[0].get(i), p: n / sums[1].get(j) };
    const level = (share) => Math.min(Math.floor(data.confusion.levels * Math.sqrt(share)), data.confusion.levels - 1);
    const here = rowsOf({ label: i, predicted: j }).filter((row) => row < items.length).length; // others are on a map
    const why = (i === j ? `${cards.classes[i]}, recognised` : `${cards.classes[i]} taken for ${cards.classes[j]}`)
      + (here < n ? `: ${n.toLocaleString("en")} image${n === 1 ? "" : "s"}, ${here.toLocaleString("en")} of them on this page` : "");
    const button = element("button", { type: "button", "data-select": JSON.stringify({ label: i, predicted: j }) },
      ...["k", "r", "p"].map((by) => element("span", { className: by }, by === "k" ? n.toLocaleString("en") : percent(shares[by], 0))),
      element("span", { className: "said why" }, printable(why)));
    return element("td", { className: [i === j ? "hit" : "miss", ...Object.entries(shares).map(([by, share]) => by + level(share))].join(" ") }, button);
  };
  const end = (...texts) => texts.map((text) => element("td", { className: "sum" }, text.toLocaleString("en")));
  const head = (text, properties = {}) => element("th", { scope: "col", ...properties }, element("span", {}, text));
  matrix.tHead.rows[0].replaceChildren(matrix.tHead.rows[0].cells[0], ...numbers.map((k) => head(name(k))), head("other classes"), head("images", { className: "sum" }));
  matrix.tBodies[0].replaceChildren(...numbers.map((i) => {
    const all = sums[0].get(i) ?? 0;
    const inside = numbers.reduce((sum, j) => sum + (at.get(i + "," + j) ?? 0), 0);
    return element("tr", {}, element("th", { scope: "row" }, name(i)), ...numbers.map((j) => cell(i, j)), ...end(all - inside || "·", all));
  }));
  matrix.tFoot.rows[0].replaceChildren(matrix.tFoot.rows[0].cells[0], ...end(...numbers.map((j) => sums[1].get(j) ?? 0), "", ""));
  matrix.classList.toggle("many", numbers.length > 8);
}

find("[data-zoom]")?.addEventListener("input", ({ target }) => {
  const wanted = target.value.trim().toLowerCase();
  const wrong = new Map();
  for (const [i, j, n] of triples) for (const k of [i, j]) wrong.set(k, (wrong.get(k) ?? 0) + (i === j ? 0 : n));
  const fitting = [...wrong.keys()].filter((k) => printable(cards.classes[k]).toLowerCase().includes(wanted));
  const found = new Set(wanted ? fitting.sort((a, b) => wrong.get(b) - wrong.get(a) || a - b).slice(0, data.confusion.most) : []);
  // Of few classes also what they are taken for, and what is taken for them; of all the pairs that are confused most.
  for (const [i, j] of fitting.length < 6 || !wanted ? [...triples].sort((a, b) => b[2] - a[2]) : []) {
    const fits = i !== j && (!wanted || fitting.includes(i) || fitting.includes(j));
    if (fits && new Set([...found, i, j]).size <= data.confusion.most) found.add(i).add(j);
  }
  drawMatrix([...found].sort((a, b) => a - b));
  find("output", target.closest("div")).textContent = wanted ? `${fitting.length.toLocaleString("en")} class${fitting.length === 1 ? " fits" : "es fit"}` : "";
});

/* ---- Tables that can be sorted: the words above their columns become buttons */
function cellValue(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/[,<>]/g, ""));
  return row.cells[column].matches(".n") ? (Number.isNaN(number) ? -Infinity : number) : text;
}
for (const table of all("table[data-sortable]")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = element("button", { type: "button", className: "plain" }, ...head.childNodes);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.ariaSort ? head.ariaSort === "ascending" : head.matches(".n"); // figures: the largest first
      for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
      head.ariaSort = down ? "descending" : "ascending";
      const compare = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a - b || 0);
      const rows = [...table.tBodies[0].rows].map((row) => [cellValue(row, head.cellIndex), row]);
      table.tBodies[0].append(...rows.sort(([a], [b]) => (down ? compare(b, a) : compare(a, b))).map(([, row]) => row));
    });
  }
}

/* ---- The page */
if (location.protocol === "about:") { // a frame in a notebook: links to its own places would lead to the notebook, whose address they count from
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (!link) return;
    event.preventDefault();
    find(link.hash)?.scrollIntoView();
  });
}
for (const hidden of all("[data-script]")) hidden.hidden = false; // what is of use with script only
addEventListener("beforeprint", () => all("details:not([open])").forEach((each) => { each.open = true; each.dataset.printed = ""; }));
addEventListener("afterprint", () => all("details[data-printed]").forEach((each) => { each.open = false; delete each.dataset.printed; }));
const entries = new Map(all("nav.contents a").map((link) => [link.hash.slice(1), link]));
const reader = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) target.inView = isIntersecting;
  const first = all("main > section").find((section) => section.inView);
  for (const [id, link] of entries) link.ariaCurrent = id === first?.id ? "true" : null;
}, { rootMargin: "-10% 0px -60% 0px" });
all("main > section[id]").forEach((section) => reader.observe(section));
update();
