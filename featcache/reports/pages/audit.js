/* An audit: people go from case to case and decide. A case is a group of copies, or one image. Only what is seen of the list is
   in the document. Decisions are steps that can be undone; they stay in this browser, and are saved as plan.csv. */
(() => {
const box = find("[data-audit]");
if (!box) return;
const { images, items, classes, splits, words, pictures, whole } = data.audit;
const N = items.rows.length;
const still = all(".still");
for (const picture of all("img[data-picture]")) pictures[picture.dataset.picture] ??= picture.src;
still.forEach((each) => each.remove());
addEventListener("beforeprint", () => box.after(...still));
addEventListener("afterprint", () => still.forEach((each) => each.remove()));

const things = (n, one, several = one + "s") => `${count(n)} ${n === 1 ? one : several}`;
const isCopies = (item) => items.keep[item] >= 0;
const fileOf = (image) => images.path[image].split("/").pop();
const className = (label, most = 30) => { const text = printable(classes[label] ?? ""); return text.length > most ? text.slice(0, most - 1) + "…" : text; };

/* ---- Decisions: a step is a list of [item, place among its images, verdict, label]; verdict null: none */
const places = new Map(); // image -> [[item, place], ...]
items.rows.forEach((rows, item) => rows.forEach((image, place) => places.set(image, [...places.get(image) ?? [], [item, place]])));
let steps = [];
let loaded = []; // lines of a plan that was chosen, about images that have no case here: saved again as they are
const verdicts = items.rows.map((rows) => Array(rows.length).fill(null)); // of each image [verdict, label]
const perform = (step) => { for (const [item, place, verdict, label] of step.set) verdicts[item][place] = verdict && [verdict, label]; };
function replay() { for (const each of verdicts) each.fill(null); steps.forEach(perform); }

/** What becomes of an image: dropped anywhere it is gone; a new label counts more than keeping. */
function fate(image) {
  const given = places.get(image).map(([item, place]) => verdicts[item][place]).filter(Boolean);
  return given.find(([verdict]) => verdict === "drop") ?? given.findLast(([verdict]) => verdict === "relabel") ?? given[0] ?? null;
}
const isDone = (item) => verdicts[item].every((given, place) => given || fate(items.rows[item][place])?.[0] === "drop");

/* The browser's memory of this audit, which all its tabs share. In a notebook's frame, or where cookies are forbidden, there is none. */
const memory = {
  key: "featcache-audit-" + data.audit.fingerprint,
  works: true,
  text: null, // as last read or written
  /** What is there, if another tab or an earlier visit wrote it. */
  read() { try { const text = localStorage.getItem(this.key); const news = text !== this.text; this.text = text; return news ? JSON.parse(text) : null; } catch { this.works = false; return null; } },
  write() { try { localStorage.setItem(this.key, this.text = JSON.stringify({ steps, loaded: loaded.length < 2e4 ? loaded : [] })); } catch { this.works = false; } },
};
let written = 0; // steps at the last write, to the memory or a file
const remember = () => { if (memory.works) memory.write(); if (memory.works) written = steps.length; };
/** Go on from what is in the memory, so that no tab overwrites what was decided in another. Returns whether there was news. */
function catchUp() {
  const kept = memory.works ? memory.read() : null;
  if (!kept?.steps) return false;
  steps = kept.steps;
  if (kept.loaded?.length) loaded = kept.loaded;
  written = steps.length;
  replay();
  return true;
}
addEventListener("beforeunload", (event) => { if (written !== steps.length) event.preventDefault(); });

/* ---- Which are shown */
const controls = Object.fromEntries(all("select, input[type=search]", box).filter((each) => each.name).map((each) => [each.name, each]));
let shown = [];
let at = 0; // place of the current case among them
const current = () => shown[at];
const crosses = (item, column) => isCopies(item) && new Set(items.rows[item].map((image) => images[column][image])).size > 1;
function fits(item, { kind, label, split, crossing, state, text }) {
  const rows = items.rows[item];
  return (!kind || items.kinds[item].includes(Number(kind)))
    && (!label || items.suggested[item] === Number(label) || rows.some((image) => images.label[image] === Number(label)))
    && (!split || rows.some((image) => splits[images.split[image]] === split))
    && (!crossing || crosses(item, crossing))
    && (!state || isDone(item) === (state === "done"))
    && (!text || rows.some((image) => printable(images.path[image]).toLowerCase().includes(text.toLowerCase())));
}
function sift(kept = current()) {
  const values = Object.fromEntries(Object.entries(controls).map(([name, each]) => [name, each.value]));
  shown = items.rows.map((_, item) => item).filter((item) => fits(item, values));
  if (values.sort === "score") shown.sort((a, b) => items.score[b] - items.score[a] || a - b);
  if (values.sort === "path") shown.sort((a, b) => collator.compare(images.path[items.rows[a][0]], images.path[items.rows[b][0]]) || a - b);
  at = Math.max(shown.indexOf(kept), 0);
}

/* ---- The list: rows of one height, of which those in sight are drawn */
const queue = find(".queue", box);
const HEIGHT = 60;
const MARKS = { keep: "✓", drop: "✕", relabel: "→" };
function titleOf(item) {
  const names = items.kinds[item].map((kind) => words[kind]).join(", ");
  return isCopies(item) ? `${count(items.rows[item].length)} ${names.split(", ").pop()}` : names[0].toUpperCase() + names.slice(1);
}
function said(item) {
  const given = verdicts[item].map((one, place) => one ?? (fate(items.rows[item][place])?.[0] === "drop" ? ["drop"] : null));
  if (!given.some(Boolean)) return "";
  if (given.length === 1) return { keep: "✓ keep", drop: "✕ drop", relabel: `→ ${given[0][1] === undefined ? "" : className(given[0][1], 16)}` }[given[0][0]];
  const kept = given.filter((one) => one && one[0] !== "drop").length;
  return given.some((one) => !one) ? `${given.filter(Boolean).length} of ${given.length} decided` : kept === given.length ? "✓ keep all" : `✓ ${kept} ✕ ${given.length - kept}`;
}
function subtitle(item) {
  if (items.suggested[item] >= 0) return [element("bdi", className(images.label[items.rows[item][0]], 20)), " → ", element("bdi", className(items.suggested[item], 20)), "?"];
  if (crosses(item, "label")) return [...new Set(items.rows[item].map((image) => images.label[image]))].slice(0, 3).flatMap((label, k) => [k ? " or " : "", label < 0 ? "no label" : element("bdi", className(label, 14))]);
  const there = [...new Set(items.rows[item].map((image) => images.split[image]))].filter(Boolean).sort().map((split) => splits[split]);
  const label = images.label[items.rows[item][0]];
  if (there.length > 1) return ["in " + there.join(" and ")];
  return [...(label < 0 ? [] : [element("bdi", className(label, 16)), ", "]), named(fileOf(items.rows[item][0]))];
}
function pictureOf(image, properties = {}) {
  const src = pictures[images.picture[image]];
  return src ? element("img", { src, alt: "", ...properties }) : element("span", { className: "none" }, properties.short ? "–" : images.why[image]);
}
let drawn = new Map(); // case -> its row; rows stay as long as they are in sight, so that pictures are not decoded again
function optionOf(item) {
  return drawn.get(item) ?? element("div", { role: "option", id: "audit-" + item }, pictureOf(items.rows[item][0], { short: true }),
    element("span", element("b", titleOf(item)), element("br"), element("small", ...subtitle(item))), element("span", { className: "mark" }));
}
function drawQueue() {
  const first = Math.max(Math.floor(queue.scrollTop / HEIGHT) - 3, 0);
  const last = Math.min(first + Math.ceil(queue.clientHeight / HEIGHT) + 7, shown.length);
  queue.firstChild.style.height = `${shown.length * HEIGHT}px`;
  const rows = new Map();
  for (let k = first; k < last; k++) {
    const option = optionOf(shown[k]);
    Object.assign(option, { ariaSelected: String(k === at), ariaPosInSet: String(k + 1), ariaSetSize: String(shown.length) });
    option.style.transform = `translateY(${k * HEIGHT}px)`;
    option.dataset.at = k;
    option.lastChild.textContent = said(shown[k]);
    rows.set(shown[k], option);
  }
  for (const [item, option] of drawn) if (!rows.has(item)) option.remove();
  let before = null;
  for (const option of rows.values()) {
    if (before ? before.nextSibling !== option : queue.firstChild.firstChild !== option) before ? before.after(option) : queue.firstChild.prepend(option);
    before = option;
  }
  drawn = rows;
  if (shown.length) queue.setAttribute("aria-activedescendant", "audit-" + current());
  else queue.removeAttribute("aria-activedescendant");
}
function reveal() {
  const top = at * HEIGHT;
  if (top < queue.scrollTop) queue.scrollTop = top;
  else if (top + HEIGHT > queue.scrollTop + queue.clientHeight) queue.scrollTop = top + HEIGHT - queue.clientHeight;
}

/* ---- The case: its pictures, and the evidence */
const stage = find(".case", box);
const buttons = Object.fromEntries(all("[data-do]", box).map((each) => [each.dataset.do, each]));
const chooser = find("input[list]", box);
const heard = find(".heard output", box);
function labelled(image, against = -2) {
  const label = images.label[image];
  const name = label < 0 ? element("span", { className: "soft" }, "no label") : element("b", { className: against === label ? "same" : "" }, element("bdi", { title: printable(classes[label]) }, className(label)));
  return images.split[image] ? [name, " ", element("span", { className: "chip" }, splits[images.split[image]])] : [name];
}
function copyOf(item, place) {
  const image = items.rows[item][place];
  const verdict = (verdicts[item][place] ?? [])[0];
  const choose = (word) => {
    const button = element("button", { type: "button", ariaPressed: String(verdict === word || (word === "keep" && verdict === "relabel")) },
      word === "keep" ? "Keep" : "Drop", element("span", { className: "said" }, " " + printable(fileOf(image))));
    Object.assign(button.dataset, { set: word, place });
    return button;
  };
  const notes = [place === items.keep[item] ? "proposed to keep" : "", verdict === "relabel" ? "→ " + className(verdicts[item][place][1]) : "", verdict !== "drop" && fate(image)?.[0] === "drop" ? "dropped elsewhere" : ""].filter(Boolean);
  return element("li", { className: `card ${verdict ? "is-" + verdict : ""}` }, element("div", { className: "pic" }, pictureOf(image, { alt: printable(fileOf(image)) })),
    element("p", ...(place < 9 ? [element("kbd", String(place + 1)), " "] : []), ...labelled(image)),
    element("p", { className: "soft" }, images.facts[image]), element("p", { className: "path" }, named(images.path[image])),
    element("p", { className: "right" }, notes.join("; ")), element("p", choose("keep"), " ", choose("drop")));
}
function answersOf(item) {
  const flat = items.answers[item];
  const rows = [];
  const given = images.label[items.rows[item][0]];
  for (let k = 0; k < flat.length; k += 2) {
    const note = flat[k] === given ? " (given)" : flat[k] === items.suggested[item] ? " (suggested)" : "";
    // Markup, of a number alone.
    const line = element("li", { innerHTML: `<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true"><rect width="${flat[k + 1] / 100}" height="8"/></svg>` });
    line.prepend(element("span", named(classes[flat[k]]), note), element("span", percent(flat[k + 1] / 1e4)));
    rows.push(line);
  }
  return rows.length ? [element("h4", "What a model says that has not seen it"), element("ol", { className: "likeliest" }, ...rows)] : [];
}
function alikeOf(item) {
  const flat = items.alike[item];
  const rows = [];
  for (let k = 0; k < flat.length; k += 2) {
    rows.push(element("li", { className: "card" }, element("div", { className: "pic" }, pictureOf(flat[k], { alt: printable(fileOf(flat[k])) })),
      element("p", ...labelled(flat[k], items.suggested[item])), element("p", { className: "soft" }, "cosine " + (flat[k + 1] / 1e4).toFixed(3)), element("span", { className: "file", title: printable(images.path[flat[k]]) }, named(fileOf(flat[k])))));
  }
  return rows.length ? [element("h4", "The images most like it"), element("ul", { className: "cards" }, ...rows)] : [];
}
function aloneOf(item) {
  const image = items.rows[item][0];
  const facts = element("dl", { className: "facts" });
  const add = (word, ...values) => facts.append(element("dt", word), element("dd", ...values));
  if (images.label[image] >= 0) add("label", ...labelled(image));
  else if (images.split[image]) add("split", splits[images.split[image]]);
  if (items.suggested[item] >= 0) add("fits better", element("b", { className: "same" }, element("bdi", { title: printable(classes[items.suggested[item]]) }, className(items.suggested[item]))));
  add("file", named(images.path[image]), element("br"), element("span", { className: "soft" }, images.facts[image]));
  const elsewhere = places.get(image).filter(([other]) => other !== item);
  if (elsewhere.length) add("also", `among ${titleOf(elsewhere[0][0])}${fate(image)?.[0] === "drop" && !verdicts[item][0] ? ", dropped there" : ""}`);
  return element("div", { className: "two" }, element("div", { className: "pic large" }, pictureOf(image, { alt: printable(fileOf(image)) })), element("div", facts, ...answersOf(item)));
}
function drawCase() {
  const item = current();
  for (const name of ["keep", "drop", "relabel"]) if (buttons[name]) buttons[name].disabled = item === undefined;
  if (item === undefined) {
    stage.replaceChildren(element("h3", { id: "case-h" }, "None"), element("p", { className: "soft" }, controls.state.value === "open" ? "All that you chose to see are decided." : "Nothing fits what you chose above."));
    return;
  }
  const rows = items.rows[item];
  const here = said(item);
  const title = element("h3", { id: "case-h" }, titleOf(item), " ", ...(here ? [element("span", { className: "mark" }, here)] : []));
  const why = element("p", { className: "why" }, items.reasons[item].map((text) => text[0].toUpperCase() + text.slice(1)).join(". ") + ".");
  if (isCopies(item)) {
    const list = element("ul", { className: rows.length < 4 ? "cards few" : "cards" }, ...rows.slice(0, data.audit.most).map((_, place) => copyOf(item, place)));
    stage.replaceChildren(title, why, list, ...(rows.length > data.audit.most ? [element("p", { className: "soft" }, `and ${things(rows.length - data.audit.most, "copy", "copies")} more, decided with these.`)] : []));
  } else stage.replaceChildren(title, why, aloneOf(item), ...alikeOf(item));
  drawBar(item);
}
function drawBar(item) {
  const rows = items.rows[item];
  const mine = verdicts[item].map((given) => (given ?? [])[0]);
  const every = (word) => mine.every((verdict) => verdict === word);
  buttons.keep.firstChild.textContent = isCopies(item) ? `Keep all ${rows.length}` : "Keep";
  buttons.drop.firstChild.textContent = isCopies(item) ? `Keep one, drop ${rows.length - 1}` : "Drop";
  buttons.keep.ariaPressed = String(every("keep"));
  buttons.drop.ariaPressed = String(isCopies(item) ? mine.every((verdict, place) => verdict === (place === items.keep[item] ? "keep" : "drop")) : every("drop"));
  if (buttons.relabel) {
    buttons.relabel.ariaPressed = String(mine.includes("relabel"));
    buttons.relabel.firstChild.textContent = items.suggested[item] < 0 ? "Relabel…" : `Relabel: ${className(items.suggested[item], 20)}`;
    chooser.value = "";
  }
}
function drawProgress() {
  const done = items.rows.reduce((sum, _, item) => sum + isDone(item), 0);
  const open = shown.filter((item) => !isDone(item));
  const progress = find("progress", box);
  [progress.max, progress.value] = [N, done];
  find("[data-going]", box).textContent = `${count(done)} of ${count(N)} decided`;
  find("[data-shown]", box).textContent = `Showing ${count(shown.length)} of ${count(N)}, ${count(open.length)} open`;
  buttons.undo.disabled = !steps.length;
  for (const button of all("[data-all]", box)) button.disabled = !open.some((item) => button.dataset.all !== "relabel" || items.suggested[item] >= 0);
  const settled = [...places.keys()].reduce((sum, image) => sum + Boolean(fate(image)), 0);
  find("[data-save]").textContent = `Save plan.csv${settled ? ": " + things(settled, "image") + " decided" : ""}`;
}
let last;
function draw() {
  reveal();
  drawCase();
  drawQueue();
  if (last === current()) return;
  last = current();
  // Who had scrolled down sees the next case from its top.
  const bench = find(".bench", box);
  if (bench.getBoundingClientRect().top < -40 && bench.getBoundingClientRect().bottom > 0) bench.scrollIntoView({ behavior: "instant" });
}

/* ---- Deciding */
const say = (text) => { heard.textContent = text; };
function whatOf(item) { return isCopies(item) ? titleOf(item) : printable(fileOf(items.rows[item][0])); }
/** What a verdict on a case means for each of its images; null: nothing, as there is no label to give. */
function setOf(item, verdict, label = items.suggested[item]) {
  const rows = items.rows[item];
  if (!isCopies(item)) return verdict === "relabel" && label < 0 ? null : [[item, 0, verdict, verdict === "relabel" ? label : undefined]];
  if (verdict === "keep") return rows.map((_, place) => [item, place, "keep"]);
  if (verdict === "relabel" && label < 0) return null;
  const mine = verdicts[item];
  const chosen = (place) => (verdict === "relabel" && mine.some((given) => given && given[0] !== "drop") ? mine[place] && mine[place][0] !== "drop" : place === items.keep[item]);
  return rows.map((_, place) => (chosen(place) ? [item, place, verdict === "relabel" ? "relabel" : "keep", verdict === "relabel" ? label : undefined] : [item, place, "drop"]));
}
function perfect(step, text, { onward = true } = {}) {
  if (!step.set.length) { say(text + "."); return; }
  catchUp();
  steps.push(step);
  perform(step);
  remember();
  const item = current();
  if (onward) {
    const before = at;
    sift(item);
    // Decided cases may leave the list: then the one that takes the place is next.
    if (shown.includes(item)) at = next(at);
    else at = Math.min(before, Math.max(shown.length - 1, 0));
  }
  draw();
  drawProgress();
  const ahead = onward && shown.length && current() !== item ? ` Next: ${whatOf(current())}.` : "";
  say(text + "." + (items.rows.every((_, each) => isDone(each)) ? " All are decided: save the plan." : ahead));
}
/** The place of the next case that is open; of the next one if none is. */
function next(from) {
  for (let k = 1; k < shown.length; k++) if (!isDone(shown[(from + k) % shown.length])) return (from + k) % shown.length;
  return Math.min(from + 1, shown.length - 1);
}
function decide(verdict, label) {
  const item = current();
  if (item === undefined) return;
  const set = setOf(item, verdict, label);
  if (!set) { chooser?.focus(); return; }
  const dropped = set.filter(([, , word]) => word === "drop").length;
  const to = label ?? items.suggested[item];
  const text = isCopies(item)
    ? { keep: `All ${set.length} copies kept`, drop: `One kept, ${dropped} dropped`, relabel: `${set.length - dropped} relabelled ${className(to)}, ${dropped} dropped` }[verdict]
    : { keep: "Kept ", drop: "Dropped ", relabel: `Relabelled ${className(to)}: ` }[verdict] + whatOf(item);
  perfect({ item, set }, text);
}
const actions = {
  keep: () => decide("keep"),
  drop: () => decide("drop"),
  relabel: () => decide("relabel"),
  next: () => go(at + 1),
  previous: () => go(at - 1),
  undo() {
    catchUp();
    const step = steps.pop();
    if (!step) { say("There is nothing to undo."); return; }
    replay();
    remember();
    sift(step.item);
    draw();
    drawProgress();
    say(`Undone: ${step.all ? things(step.all, "decision") : whatOf(step.item)}. ${steps.length ? things(steps.length, "step") + " before it can be undone." : "Nothing else is decided."}`);
  },
};
function go(to) {
  if (!shown.length) return;
  at = Math.min(Math.max(to, 0), shown.length - 1);
  draw();
  say(`${count(at + 1)} of ${count(shown.length)}: ${titleOf(current())}, ${whatOf(current())}`);
}
box.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-do]");
  if (button) actions[button.dataset.do]();
  const option = target.closest('[role="option"]');
  if (option) go(Number(option.dataset.at));
  const single = target.closest("[data-set]");
  if (single) {
    const { place, set: verdict } = single.dataset;
    const item = current();
    perfect({ item, set: [[item, Number(place), verdict]] }, `${verdict === "keep" ? "Kept" : "Dropped"} ${printable(fileOf(items.rows[item][place]))}`, { onward: false });
    find(`[data-set="${verdict}"][data-place="${place}"]`, stage).focus();
  }
  const bulk = target.closest("[data-all]");
  if (bulk) {
    const verdict = bulk.dataset.all;
    const open = shown.filter((item) => !isDone(item) && (verdict !== "relabel" || items.suggested[item] >= 0));
    const item = current();
    perfect({ item, all: open.length, set: open.flatMap((each) => setOf(each, verdict) ?? []) }, `${things(open.length, "decision")}: ${{ keep: "kept", drop: "dropped, of copies all but one", relabel: "relabelled as suggested" }[verdict]}; u undoes them`);
  }
});
chooser?.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { chooser.value = ""; queue.focus(); }
  if (event.key !== "Enter") return;
  const wanted = chooser.value.trim();
  const label = classes.findIndex((name) => printable(name) === wanted);
  const begins = classes.map((name, k) => [printable(name).toLowerCase(), k]).filter(([name]) => wanted && name.startsWith(wanted.toLowerCase()));
  const found = label >= 0 ? label : begins.length === 1 ? begins[0][1] : -1;
  if (found < 0) { say(begins.length ? `${begins.length} classes begin so; type more.` : `No class is called ${wanted || "that"}.`); return; }
  decide("relabel", found);
  queue.focus({ preventScroll: true });
});

/* ---- Keys, wherever the focus is, once the case is in sight; not within fields */
const inSight = () => { const { top, bottom } = box.getBoundingClientRect(); return top < innerHeight * 0.8 && bottom > 120; };
const keysOn = find("[data-keys]", box);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input:not([type="checkbox"]), select, textarea') || event.target.closest("dialog")) return;
  const inQueue = event.target === queue;
  const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, ...(inQueue ? { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1, PageDown: at + 8, PageUp: at - 8 } : {}) };
  const key = event.key.toLowerCase();
  const named = { k: "keep", d: "drop", r: "relabel", n: "next", p: "previous", u: "undo" }[key];
  const other = /^[1-9]$/.test(key) || (key === "c" && chooser) || key === "?";
  if (moves[event.key] === undefined && !(keysOn.checked && (named || other))) return;
  if (event.key.startsWith("Arrow") && event.target.matches("[role=region].scroll, pre")) return; // they scroll
  event.preventDefault();
  if (!inSight()) { box.scrollIntoView(); say("Here are the cases; press the key again."); return; } // nobody decides on what is not seen
  if (moves[event.key] !== undefined) go(moves[event.key]);
  else if (named) actions[named]?.();
  else if (key === "?") { const help = find("#audit-keys"); help.open = !help.open; if (help.open) help.scrollIntoView({ block: "nearest" }); }
  else if (key === "c") chooser.focus();
  else if (current() !== undefined && isCopies(current()) && Number(key) <= items.rows[current()].length) {
    const item = current();
    perfect({ item, set: items.rows[item].map((_, place) => [item, place, place === key - 1 ? "keep" : "drop"]) }, `Copy ${key} kept, ${items.rows[item].length - 1} dropped`);
  }
});

/* ---- plan.csv, as Python's csv writes it; names that are no UTF-8 by their bytes, what a spreadsheet would run behind an apostrophe */
const FORMULA = /^'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/;
function cell(text) {
  const safe = FORMULA.test(text) ? "'" + text : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
const HEAD = ["path", "sha256", "decision", "label", "split", "given", "found"];
const digests = atob(images.digests);
const keyOf = ([path, digest]) => path + "\0" + digest;
function lineOf(image) {
  const digest = [...digests.slice(32 * image, 32 * image + 32)].map((c) => c.charCodeAt(0).toString(16).padStart(2, "0")).join("");
  const [verdict, label] = (places.has(image) && fate(image)) || ["", undefined];
  const given = classes[images.label[image]] ?? "";
  const kinds = data.audit.kinds.filter((_, kind) => images.found[image] >> kind & 1);
  return [images.path[image], digest, verdict, verdict === "relabel" ? classes[label] : given, splits[images.split[image]], given, kinds.join(";")];
}
/** Every image of the cache once, as a plan stands for itself. */
function planLines() {
  const lines = new Map(whole ? [] : loaded.map((line) => [keyOf(line), line]));
  const rows = whole ? images.path.map((_, image) => image) : [...places.keys()];
  for (const line of rows.sort((a, b) => images.row[a] - images.row[b]).map(lineOf)) lines.set(keyOf(line), line);
  if (whole) for (const line of loaded) lines.set(keyOf(line), line);
  return [...lines.values()];
}
const tell = (text) => { find("[data-saved]").textContent = text; };
find("[data-save]").addEventListener("click", () => {
  if (!whole && !loaded.length) { tell("This page knows only the images that were found. Choose the plan.csv that lies beside it first: it lists all."); return; }
  const lines = planLines();
  const text = [HEAD, ...lines].map((line) => line.map(cell).join(",") + "\n").join("");
  const link = element("a", { href: URL.createObjectURL(new Blob(asBytes(text))), download: "plan.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  written = steps.length;
  tell(`Saved ${things(lines.length, "image")}, ${things(lines.filter((line) => line[2]).length, "decision")}. Next, where you saved it: featcache audit --apply plan.csv -o clean.csv`);
});

/** Bytes as Python reads names: what is no UTF-8 becomes U+DC80 to U+DCFF. */
function asText(bytes) {
  try { return new TextDecoder("utf-8", { fatal: true }).decode(bytes); } catch { /* then byte by byte */ }
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  const utf8 = /[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2}|[\x80-\xff]/g;
  return text.replace(/^\xef\xbb\xbf/, "").replace(utf8, (found) => (found.length === 1 ? String.fromCharCode(0xdc00 + found.charCodeAt(0)) : new TextDecoder().decode(Uint8Array.from(found, (c) => c.charCodeAt(0)))));
}
/** Lines of cells, also as a spreadsheet separates them. */
function parse(text) {
  const separator = text.match(/[,;\t]/)?.[0] ?? ",";
  const lines = [[]];
  for (const [whole, quoted, plain, end] of text.matchAll(RegExp(`(?:"((?:[^"]|"")*)"|([^${separator}\\r\\n"]*))(${separator}|\\r?\\n|\\r|$)`, "g"))) {
    if (!whole && !lines.at(-1).length) break;
    lines.at(-1).push((quoted?.replaceAll('""', '"') ?? plain).replace(/^'(?='*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20])/, ""));
    if (end !== separator) lines.push([]);
  }
  return lines.filter((line) => line.length > 1 || line[0]);
}
find("[data-load]").addEventListener("change", async ({ target }) => {
  const file = target.files[0];
  if (!file) return;
  const [head = [], ...lines] = parse(asText(new Uint8Array(await file.arrayBuffer())));
  target.value = "";
  const columns = HEAD.map((name) => head.findIndex((word) => word.trim().toLowerCase() === name));
  if (columns.slice(0, 4).includes(-1)) { tell(`${file.name} is no plan: its first line should hold path, sha256, decision and label.`); return; }
  const known = new Map([...places.keys()].map((image) => [keyOf(lineOf(image)), image]));
  // Of a whole cache it is known which lines speak of none of its images.
  const everything = whole ? new Set(images.path.map((_, image) => keyOf(lineOf(image)))) : null;
  const set = [];
  const others = [];
  let [taken, odd, unknown] = [0, 0, 0];
  for (const cells of lines) {
    const line = columns.map((column) => cells[column] ?? "");
    [line[1], line[2]] = [line[1].trim().toLowerCase(), line[2].trim().toLowerCase()];
    const image = known.get(keyOf(line));
    const label = line[2] === "relabel" ? classes.indexOf(line[3]) : undefined;
    if (everything && !everything.has(keyOf(line))) { unknown++; continue; }
    if (!["", "keep", "drop", "relabel"].includes(line[2]) || label === -1) { odd++; line[2] = ""; }
    if (!whole || (image === undefined && line[2])) others.push(line);
    if (image !== undefined && line[2]) {
      taken++;
      // A new label is for the image by itself: among copies it means that this one is kept.
      const homes = places.get(image);
      for (const [item, place] of homes) set.push(label !== undefined && isCopies(item) && homes.length > 1 ? [item, place, "keep"] : [item, place, line[2], label]);
    }
  }
  loaded = others;
  perfect({ item: current(), all: taken, set }, `${file.name}: ${things(taken, "decision")} taken over`);
  const rest = others.filter((line) => line[2] && !known.has(keyOf(line))).length;
  tell(heard.textContent.replace(/\. (Next:|All are).*/, ".") + (rest ? ` ${things(rest, "decision")} about images that have no case here will be saved, too.` : "")
    + (unknown ? ` ${things(unknown, "line")} left out: their images are not in this cache, or have changed.` : "")
    + (odd ? ` ${things(odd, "line")} could not be understood: a decision is keep, drop or relabel, with a label that exists.` : ""));
});

/* ---- The page */
function choose(kept) {
  sift(kept);
  draw();
  drawProgress();
  say(shown.length ? `${things(shown.length, "case")}; here is ${at + 1}: ${titleOf(current())}, ${whatOf(current())}.` : "");
}
for (const each of Object.values(controls)) each.addEventListener("input", () => choose());
for (const link of all("a[data-kind]")) {
  link.addEventListener("click", () => {
    for (const [name, each] of Object.entries(controls)) if (name !== "sort") each.value = "";
    if (controls.kind) controls.kind.value = link.dataset.kind;
    choose(null);
    queue.focus({ preventScroll: true });
  });
}
queue.addEventListener("scroll", drawQueue);
new ResizeObserver(drawQueue).observe(queue);
box.hidden = false;
catchUp();
memory.write();
addEventListener("storage", ({ key }) => {
  if (key !== memory.key || !catchUp()) return;
  sift();
  draw();
  drawProgress();
  say(`Decided in another tab, and taken over: ${things(steps.length, "step")} of decisions by now.`);
});
sift();
if (steps.length) at = next(-1);
draw();
drawProgress();
if (steps.length) say(`Welcome back: ${things(steps.length, "step")} of decisions, kept by this browser.`);
else if (!memory.works) say("This browser keeps nothing here: save the plan before you close the page.");
})();
