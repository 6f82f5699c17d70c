"use strict";
/* The script of all pages: pictures are selected, sorted, filtered, enlarged, and their paths exported. Without it a page
   shows everything; it only adds. Names become text nodes, never markup. matrix.js and map.js use what stands here. */

const find = (query, within = document) => within.querySelector(query);
const all = (query, within = document) => [...within.querySelectorAll(query)];
const on = (target, kind, action) => target?.addEventListener(kind, action);
const data = JSON.parse(find("#data").textContent);
const cards = data.cards ?? { path: [], classes: [], statuses: [] };

/** An element with parts: properties, and children, of which texts are texts. */
function element(tag, ...parts) {
  const made = document.createElement(tag);
  for (const part of parts) part.constructor === Object ? Object.assign(made, part) : made.append(part);
  return made;
}

/** As Python writes names: what cannot be printed, or would turn the direction of writing, by its code. */
function printable(text) {
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu, (character) => {
    const code = character.codePointAt(0);
    const [letter, digits] = code < 256 ? ["x", 2] : code < 65536 ? ["u", 4] : ["U", 8];
    return { 9: "\\t", 10: "\\n", 13: "\\r" }[code] ?? "\\" + letter + code.toString(16).padStart(digits, "0");
  });
}
const named = (text) => element("bdi", printable(text));
const classOf = (number) => named(cards.classes[number]);
const count = (number) => number.toLocaleString("en");

/** A share as Python writes it: never 100% or 0% for what is not quite that. */
function percent(share, digits = 1) {
  const text = share.toLocaleString("en", { style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits, roundingMode: "halfEven" });
  const step = 10 ** -digits;
  return share < 1 && parseFloat(text) === 100 ? `>${(100 - step).toFixed(digits)}%` : share > 0 && parseFloat(text) === 0 ? `<${step.toFixed(digits)}%` : text;
}
const collator = new Intl.Collator("en", { numeric: true });
/** Numbers, or texts: image 9 before image 10. */
const compare = (a, b) => (typeof a === "string" ? collator.compare(a, b) : a - b || 0);

/* ---- The selection: rows (numbers of cards, in an order that may mean something), and a sentence that says what they are.
   Matrix, tables, map and wall set it, and listen: selection.set([3, 1], "the two nearest"), selection.on(listener).
   rows and members, the same as a set, are null: all. source: the element that selected. */
const selection = {
  rows: null,
  listeners: [],
  set(rows, why = "", source = null) {
    Object.assign(this, { rows: rows && [...rows], members: rows && new Set(rows), why, source });
    for (const listener of this.listeners) listener(this);
  },
  clear() { this.set(null); },
  has(row) { return this.members?.has(row) ?? true; },
  on(listener) { this.listeners.push(listener); },
};

/** Rows for [numbers] or {column: value or [values], ...}. A data-select says this, or a name among data.selections. */
function rowsOf(what) {
  if (Array.isArray(what)) return what;
  const wanted = Object.entries(what).map(([name, values]) => [cards[name] ?? [], [values].flat()]);
  // Of a map, rows without a card and an answer lie about.
  const scored = (row) => row < items.length || !cards.predicted || cards.predicted[row] >= 0;
  return [...cards.path.keys()].filter((row) => scored(row) && wanted.every(([column, values]) => values.includes(column[row])));
}

on(document, "click", (event) => {
  const chosen = event.target.closest("[data-select]");
  if (!chosen) return;
  // Once more: all.
  if (chosen.ariaPressed === "true") { selection.clear(); return; }
  const text = chosen.dataset.select;
  selection.set(data.selections?.[text] ?? rowsOf(JSON.parse(text)), chosen.dataset.why ?? (find(".why", chosen) ?? chosen).textContent.trim(), chosen);
  if (!chosen.closest("#pictures")) find("#pictures")?.scrollIntoView();
});
selection.on(({ source }) => {
  for (const button of all("[data-select][aria-pressed=true]")) button.ariaPressed = "false";
  if (source) source.ariaPressed = "true";
});

/* ---- Cards. In the document are only the first ones of those that are shown: what follows the list stays within reach. */
const list = find("ul[data-main]");
const items = all("ul[data-main] > .card");
const form = find("form.controls");
const clear = find("[data-clear]");
const say = (text) => { find("output", form).textContent = text; };
const more = element("button", { className: "more" });
const AT_ONCE = 60;
// On paper are all that are selected or filtered; of a list that is neither, so many.
const PRINTED = 1000;
let printing = false;
let most = AT_ONCE;
let placed = "";
let shown = [];
// The same of rows that have no card: a map has them, and lists of paths.
let beyond = [];

/** Rows in the order that a key names: a column, "-" before it: the largest first; "order": as they are. */
function sorted(rows, key) {
  const sign = key.startsWith("-") ? -1 : 1;
  const column = cards[key.replace("-", "")];
  if (!column) return rows;
  const value = (row) => (key === "label" || key === "predicted" ? cards.classes[column[row]] ?? "" : column[row]);
  // Rows without a value come last, whatever the direction.
  const missing = (row) => column[row] === -1 || column[row] === "";
  return rows.sort((a, b) => missing(a) - missing(b) || sign * compare(value(a), value(b)) || a - b);
}

function update() {
  if (!list) return;
  const { sort, ...filters } = Object.fromEntries(new FormData(form));
  const wanted = Object.entries(filters).filter(([, value]) => value);
  const fits = (row) => wanted.every(([name, value]) => (name === "text"
    ? printable(cards.path[row]).toLowerCase().includes(value.toLowerCase()) : String(cards[name][row]) === value));
  const fitting = (selection.rows ?? [...items.keys()]).filter(fits);
  const before = shown.join();
  shown = sorted(fitting.filter((row) => row < items.length), sort);
  beyond = fitting.filter((row) => row >= items.length);
  clear.hidden = !selection.rows && !wanted.length;
  if (shown.join() !== before) most = AT_ONCE;
  place();
  if (shown.length) inTabOrder(shown[0]);
  say(`Showing ${count(shown.length)} of ${count(items.length)}` + (selection.why ? `: ${printable(selection.why)}` : "")
    + (beyond.length ? `; ${count(beyond.length)} more on the map only, saved with the paths` : ""));
  for (const button of all("[data-export]")) button.disabled = !fitting.length;
}

/** Puts the first cards on the page, in one step and only if they changed. */
function place() {
  const wanted = shown.slice(0, !printing ? most : clear.hidden ? PRINTED : Infinity);
  if (wanted.join() !== placed) list.replaceChildren(...wanted.map((row) => items[row]));
  placed = wanted.join();
  const rest = shown.length - wanted.length;
  more.hidden = !rest;
  more.textContent = printing ? `The other ${count(rest)} are not printed; what is selected or filtered is.` : rest > 4 * AT_ONCE ? `Show ${4 * AT_ONCE} more of ${count(rest)}` : `Show the other ${count(rest)}`;
}
list?.after(more);
on(more, "click", () => {
  const next = shown[most];
  most += 4 * AT_ONCE;
  place();
  focusOn(next);
});
for (const kind of ["beforeprint", "afterprint"]) {
  on(window, kind, () => {
    const focused = document.activeElement;
    printing = kind === "beforeprint";
    if (list) place();
    focused.focus({ preventScroll: true });
  });
}
selection.on(update);
on(form, "input", update);

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
/** Of things that stand in lines the one that a key leads to from one of them. */
function walked(event, things, from) {
  const across = Math.max(1, things.findIndex((thing) => thing.offsetTop > things[0].offsetTop));
  const to = { ArrowRight: from + 1, ArrowLeft: from - 1, ArrowDown: from + across, ArrowUp: from - across, Home: 0, End: things.length - 1 }[event.key];
  if (to === undefined || from < 0 || event.ctrlKey || event.metaKey || event.altKey) return undefined;
  event.preventDefault();
  return things[to];
}
on(list, "keydown", (event) => {
  const card = event.target.closest(".card");
  const next = walked(event, shown.map((row) => items[row]), shown.indexOf(items.indexOf(card)));
  if (next) focusOn(items.indexOf(next));
});
on(list, "click", (event) => {
  const card = event.target.closest(".pic")?.closest(".card");
  if (card) enlarge(items.indexOf(card));
});

/* ---- One picture at a time, with all that is known of it */
const dialog = find("#enlarged");
let current = -1;

function likeliest(flat) {
  const made = element("ol", { className: "likeliest" });
  for (let k = 0; k < flat.length; k += 2) {
    const share = flat[k + 1] / 1e4;
    // Markup, of a number alone.
    const line = element("li", { innerHTML: `<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true"><rect width="${100 * share}" height="8"/></svg>` });
    line.prepend(element("span", classOf(flat[k])), element("span", percent(share)));
    made.append(line);
  }
  return made;
}

function evidenceOf(row) {
  return element("ul", { className: "evidence" }, ...cards.evidence[row].map(([path, label, similarity, picture]) => element("li", {},
    picture < 0 ? "" : element("img", { src: cards.pictures[picture], alt: "" }),
    ...(label < 0 ? [] : [element("b", classOf(label)), " "]), `cosine ${similarity.toFixed(3)} `, named(path))));
}

/** What is known of a row, as a list of words and values. */
function factsOf(row) {
  const name = (column) => cards[column]?.[row] >= 0 && classOf(cards[column][row]);
  const text = (column) => cards[column]?.[row] && printable(cards[column][row]);
  const status = cards.statuses[cards.status?.[row]];
  const facts = {
    label: name("label"), prediction: name("predicted"), "that is": ["wrong", "right"][cards.correct?.[row]],
    status: status !== "ok" && status, reason: text("reason"), split: text("split"), note: text("note"),
    unfamiliar: cards.unfamiliarity?.[row] >= 0 && `more than ${percent(cards.unfamiliarity[row])} of the training images`,
  };
  return element("dl", { className: "facts" }, ...Object.entries(facts).filter(([, value]) => value)
    .flatMap(([word, value]) => [element("dt", word), element("dd", value)]));
}

/** The row before or behind the one that is enlarged, of those shown. */
const beside = (by) => shown[(shown.indexOf(current) + 1 || NaN) - 1 + by];
function enlarge(row) {
  if (!items[row]) return;
  current = row;
  const image = find("img", items[row]);
  const known = element("div", element("h2", { id: "enlarged-name" }, named(cards.path[row])), factsOf(row));
  if (cards.top?.[row].length) known.append(element("h3", "Likeliest classes"), likeliest(cards.top[row]));
  if (cards.evidence?.[row].length) known.append(element("h3", "Nearest training images"), evidenceOf(row));
  find(".two").replaceChildren(image ? element("img", { className: "big", src: image.src, alt: image.alt })
    : element("p", { className: "soft" }, "No picture."), known);
  for (const button of all("[data-step]", dialog)) button.disabled = beside(+button.dataset.step) === undefined;
  if (!dialog.open) dialog.showModal();
}
on(dialog, "click", ({ target }) => {
  if (target.dataset.step) enlarge(beside(+target.dataset.step));
  else if (target === dialog || target.matches("[data-close]")) dialog.close();
});
on(dialog, "keydown", (event) => enlarge(beside({ ArrowRight: 1, ArrowLeft: -1 }[event.key])));
on(dialog, "close", () => { if (list?.contains(document.activeElement) && shown.includes(current)) focusOn(current); });

/* ---- Paths of what is shown, a line each, or as CSV where a name has line breaks; names that are no UTF-8 by their bytes */
function pathList() {
  const paths = [...shown, ...beyond].map((row) => cards.path[row]);
  if (!paths.some((path) => /[\r\n]/.test(path))) return paths.join("\n") + "\n";
  return ["path", ...paths.map((path) => `"${path.replaceAll('"', '""')}"`)].join("\r\n") + "\r\n";
}

/** Python's surrogate escapes, U+DC80 to U+DCFF, become a byte each. */
function asBytes(text) {
  return text.split(/((?<![\ud800-\udbff])[\udc80-\udcff])/).map((part, k) => (k % 2 ? new Uint8Array([part.charCodeAt(0)]) : part));
}

function save(text) {
  const link = element("a", { href: URL.createObjectURL(new Blob(asBytes(text))), download: text.startsWith("path\r") ? "paths.csv" : "paths.txt" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  return "saved";
}

function copy(text) {
  const field = element("textarea", { value: text });
  document.body.append(field);
  field.select();
  // Works in files and frames, too, where navigator.clipboard is missing.
  document.execCommand("copy");
  field.remove();
  return "copied";
}

on(form, "click", ({ target }) => {
  const way = target.dataset.export;
  if (way) {
    const done = (way === "copy" ? copy : save)(pathList());
    say(`${count(shown.length + beyond.length)} paths ${done}`);
    target.focus();
  } else if (target === clear) {
    const { sort } = form.elements;
    const kept = sort.value;
    form.reset();
    sort.value = kept;
    selection.clear();
  }
});

/* ---- The page */
// In a frame of a notebook links to places of the page would lead to the notebook, whose address they count from.
if (location.protocol === "about:") {
  for (const link of all("a")) on(link, "click", (event) => { event.preventDefault(); find(link.hash).scrollIntoView(); });
}
// What is of use with script only.
for (const hidden of all("[data-script]")) hidden.hidden = false;

/** Contents say where one is. */
function locate() {
  const here = all("main > section").find((section) => section.getBoundingClientRect().bottom > innerHeight / 10);
  for (const link of all("nav a")) link.ariaCurrent = link.hash === "#" + here?.id ? "true" : null;
}
on(window, "scroll", locate);
update();
locate();
