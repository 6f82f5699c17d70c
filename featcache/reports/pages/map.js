
/* ==== The map, on pages that have one. Rows are those of the cards, then those that have no card. Pixels are mixed here, one by
   one: a canvas that is asked for 100,000 discs takes a second, this takes a hundredth of it. */
(() => {
const box = find("[data-map]");
const known = data.map;
const unpack = (text, Kind) => new Kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const [X, Y] = [unpack(known.x, Int16Array), unpack(known.y, Int16Array)];
const N = X.length;
// refused images are nowhere
const there = Int32Array.from({ length: N }, (_, row) => row).filter((row) => X[row] > -32768);

/* What is known of rows without a card stands behind what is known of the cards. */
{
  const [labels, answers] = [unpack(known.label, Int32Array), unpack(known.predicted, Int32Array)];
  const extend = (name, none, column) => { cards[name] = [...(cards[name] ?? Array(items.length).fill(none)), ...column]; };
  extend("path", "", known.path);
  extend("label", -1, labels);
  extend("split", "", Array.from(unpack(known.split, Uint8Array), (split) => known.splits[split]));
  if (cards.predicted) {
    extend("predicted", -1, answers);
    extend("correct", -1, known.path.map((_, k) => (labels[k] < 0 || answers[k] < 0 ? -1 : +(labels[k] === answers[k]))));
  }
}
const pictureOf = (row) => (row < items.length ? find("img", items[row])?.src : known.pictures[row - items.length]);

/* ---- Colours: five, as discs and as squares; what is not among the most frequent is grey */
const by = find("[data-colour]", box);
const legend = find(".legend", box);
const tint = new Uint8Array(N);
// [text, row]: where the name of a class stands
let places = [];
const WORDS = { correct: { 1: "right", 0: "wrong", "-1": "not known" }, split: { "": "no split" } };
const wordOf = (key, value) => WORDS[key]?.[value] ?? (key === "split" ? value : cards.classes[value] ?? (key === "label" ? "(no label)" : "(none)"));

function recolour() {
  const key = by.value;
  const column = cards[key];
  const groups = new Map();
  for (const row of there) groups.has(column[row]) ? groups.get(column[row]).push(row) : groups.set(column[row], [row]);
  const name = (value) => wordOf(key, value);
  const compare = (a, b) => (name(a) < name(b) ? -1 : 1);
  const frequent = [...groups.keys()].sort((a, b) => groups.get(b).length - groups.get(a).length || compare(a, b));
  const tints = new Map(key === "correct" ? [[1, 1], [0, 7], [-1, 0]].filter(([value]) => groups.has(value))
    : frequent.slice(0, 10).sort(compare).map((value, k) => [value, value === -1 || value === "" ? 0 : k + 1]));
  tint.fill(0);
  for (const [value, number] of tints) for (const row of groups.get(value)) tint[row] = number;
  const entry = (value, number) => {
    const mark = element("span", { className: "k" + (number && (number - 1) % 5 + 1), ariaHidden: "true" }, number > 5 ? "■" : "●");
    const button = element("button", { type: "button", ariaPressed: "false" }, mark, " ", named(shorten(name(value))), " ", element("small", count(groups.get(value).length)));
    on(button, "click", () => selection.set(button.ariaPressed === "true" ? null : groups.get(value), name(value), button));
    return element("li", button);
  };
  legend.replaceChildren(...[...tints].map(([value, number]) => entry(value, number)));
  const others = frequent.filter((value) => !tints.has(value)).sort(compare);
  if (others.length) {
    const list = element("select", { ariaLabel: "Select another class" }, element("option", { value: "" }, `${count(others.length)} more, grey …`),
      ...others.map((value) => element("option", { value, dir: "auto" }, `${printable(shorten(name(value)))} (${groups.get(value).length})`)));
    on(list, "change", () => { if (list.value) selection.set(groups.get(+list.value), name(+list.value)); });
    legend.append(element("li", element("span", { className: "k0", ariaHidden: "true" }, "● "), list));
  }
  places = groups.size < 2 || key === "correct" || key === "split" ? [] : frequent.slice(0, 200).filter((value) => groups.get(value).length > 2)
    .map((value) => [printable(shorten(name(value))), middleOf(groups.get(value)), groups.get(value)])
    .filter(([, row, rows]) => groups.size <= 10 || spread(rows, row) < 0.4 * spread(there, middle));
  paint();
}
const shorten = (text, most = 30) => (text.length > most ? text.slice(0, most / 2 - 1) + "…" + text.slice(-most / 2 + 1) : text);

/** Of some rows the one nearest to where most of them are. */
function middleOf(rows) {
  const median = (values) => Int16Array.from(rows, (row) => values[row]).sort()[rows.length >> 1];
  const [x, y] = [median(X), median(Y)];
  return rows.reduce((best, row) => (Math.hypot(X[row] - x, Y[row] - y) < Math.hypot(X[best] - x, Y[best] - y) ? row : best));
}

/** Half of the rows are so near to one. Of many classes only those that lie together are named. */
const spread = (rows, row) => Float64Array.from(rows, (each) => Math.hypot(X[each] - X[row], Y[each] - Y[row])).sort()[rows.length >> 1];
const middle = middleOf([...there]);

/* ---- Rows by cells of a grid, line by line: what is near is found without looking at all */
const CELLS = Math.max(1, Math.min(256, Math.round(Math.sqrt(N / 2))));
const cellOf = (value) => Math.min(CELLS - 1, Math.max(0, Math.floor((value + 32768) / 65536 * CELLS)));
const starts = new Uint32Array(CELLS * CELLS + 1);
const inTurn = [...there].sort((a, b) => cellOf(Y[b]) - cellOf(Y[a]) || cellOf(X[a]) - cellOf(X[b]) || X[a] - X[b]);
const cell = (row) => (CELLS - 1 - cellOf(Y[row])) * CELLS + cellOf(X[row]);
for (const row of inTurn) starts[cell(row) + 1]++;
for (let k = 0; k < CELLS * CELLS; k++) starts[k + 1] += starts[k];

/* The order of drawing. Line by line, as pixels lie in memory: at 100,000 points that is what takes the time. Cards come last,
   mistakes, which are the first of them, at the very end: they lie on top. */
const drawn = Int32Array.from([...inTurn.filter((row) => row >= items.length), ...there.filter((row) => row < items.length).reverse()]);

/* ---- Drawing */
const [canvas, over] = all("canvas", box);
const plane = find(".plane", box);
const [below, above] = [canvas.getContext("2d", { alpha: false }), over.getContext("2d")];
const extent = there.reduce(([x, y], row) => [Math.max(x, Math.abs(X[row])), Math.max(y, Math.abs(Y[row]))], [1, 1]);
// the middle, in units of X; pixels per unit
const view = { x: 0, y: 0, zoom: 1, scale: 1, wide: 1, high: 1 };
const ROOM = 24;
const screen = (row) => [view.wide / 2 + (X[row] - view.x) * view.scale, view.high / 2 - (Y[row] - view.y) * view.scale];
let [image, pixels, inks, here, lasso, awaited] = [null, null, [], -1, null, false];
let [picturing, pictured] = [false, []];

/** Colours, as CSS has them just now: as texts, and as the numbers that pixels are. */
const colours = {};
const probe = element("span", { hidden: true });
box.append(probe);
const inkOf = (number) => (number ? "c" + ((number - 1) % 5 + 1) : "edge");
function ink() {
  for (const name of ["edge", "c1", "c2", "c3", "c4", "c5", "raised", "rule", "ink", "link"]) {
    probe.style.color = `var(--${name})`;
    colours[name] = getComputedStyle(probe).color;
  }
  const number = (name) => {
    const [r, g, b] = colours[name].match(/\d+/g);
    // opaque
    return -16777216 | b << 16 | g << 8 | r;
  };
  inks = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10].map((tinted) => number(inkOf(tinted)));
  [inks.page, inks.dim] = [number("raised"), number("rule")];
}

/** Where a mark covers pixels around its own, and how much, 0..255. */
function markOf(radius, strength, square = false) {
  const [offsets, cover] = [[], []];
  const reach = Math.ceil(radius + 0.5);
  for (let dy = -reach; dy <= reach; dy++) {
    for (let dx = -reach; dx <= reach; dx++) {
      const distance = square ? Math.max(Math.abs(dx), Math.abs(dy)) / 0.88 : Math.hypot(dx, dy);
      const part = Math.min(1, radius + 0.5 - distance);
      if (part > 0.08) { offsets.push(dy * canvas.width + dx); cover.push(Math.round(255 * strength * part)); }
    }
  }
  return { offsets: Int32Array.from(offsets), cover: Uint8Array.from(cover), reach };
}

/** The loop that runs a million times a frame, in 32-bit integers: red and blue are mixed in one multiplication. */
function stamp(at, mark, colour) {
  const { offsets, cover } = mark;
  const rb = colour & 0xff00ff;
  const g = colour & 0xff00;
  for (let k = 0; k < offsets.length; k++) {
    const to = at + offsets[k];
    const rbu = pixels[to] & 0xff00ff;
    const gu = pixels[to] & 0xff00;
    pixels[to] = -16777216 | (rbu + (Math.imul(rb - rbu, cover[k]) >> 8)) & 0xff00ff | (gu + ((g - gu) * cover[k] >> 8)) & 0xff00;
  }
}

function draw() {
  awaited = false;
  const [wide, high, ratio] = [plane.clientWidth, plane.clientHeight, devicePixelRatio || 1];
  if (!wide) return;
  [view.wide, view.high] = [wide, high];
  view.scale = view.zoom * Math.min((wide - 2 * ROOM) / 2 / extent[0], (high - 2 * ROOM) / 2 / extent[1]);
  for (const each of [canvas, over]) {
    if (each.width !== Math.round(wide * ratio) || each.height !== Math.round(high * ratio)) {
      [each.width, each.height, image] = [Math.round(wide * ratio), Math.round(high * ratio), null];
    }
  }
  if (!image) {
    image = below.createImageData(canvas.width, canvas.height);
    pixels = new Int32Array(image.data.buffer);
  }
  pixels.fill(inks.page);
  const radius = ratio * Math.min(4, Math.max(1.1, 14 / N ** 0.22)) * Math.min(view.zoom ** 0.3, 2);
  const [disc, square, faint, rim] = [markOf(radius, 0.9), markOf(radius, 0.9, true), markOf(radius, 0.6), markOf(radius + ratio, 0.8)];
  // then each has a rim
  const apart = N < 3000;
  const [sx, sy, left, top] = [view.scale * ratio, -view.scale * ratio, canvas.width / 2 - view.x * view.scale * ratio, canvas.height / 2 + view.y * view.scale * ratio];
  const { members } = selection;
  const { reach } = rim;
  const visible = [];
  for (const chosen of members ? [false, true] : [true]) {
    for (let k = 0; k < drawn.length; k++) {
      const row = drawn[k];
      if (members && members.has(row) !== chosen) continue;
      const x = left + X[row] * sx | 0;
      const y = top + Y[row] * sy | 0;
      if (x < reach || y < reach || x >= canvas.width - reach || y >= canvas.height - reach) continue;
      const at = y * canvas.width + x;
      const number = tint[row];
      if (apart && chosen) stamp(at, rim, inks.page);
      if (chosen) stamp(at, number > 5 ? square : number ? disc : faint, inks[number]);
      else stamp(at, disc, inks.dim);
      if (chosen && visible.length < 4000) visible.push(row);
    }
  }
  below.putImageData(image, 0, 0);
  pictured = picturing || (view.zoom > 1 && visible.length <= 150) ? thinned(visible) : [];
  cover();
}
/** Draws before the next frame, however often it is asked to. */
function paint() { if (!awaited) { awaited = true; requestAnimationFrame(draw); } }

/* Pictures in their places, as many as do not cover each other. */
const SIDE = 56;
const loaded = new Map();
function thinned(rows) {
  const kept = [];
  for (const row of rows.reverse()) {
    if (kept.length >= 250 || !pictureOf(row)) continue;
    const [x, y] = screen(row);
    if (!kept.some((other) => { const [u, v] = screen(other); return Math.abs(u - x) < SIDE && Math.abs(v - y) < SIDE; })) kept.push(row);
  }
  for (const row of kept) {
    if (loaded.has(row)) continue;
    const picture = new Image();
    picture.onload = cover;
    picture.src = pictureOf(row);
    loaded.set(row, picture);
  }
  return kept;
}

/** What lies over the points: pictures, names, where one is, the lasso. */
function cover() {
  const ratio = devicePixelRatio || 1;
  above.setTransform(ratio, 0, 0, ratio, 0, 0);
  above.clearRect(0, 0, view.wide, view.high);
  for (const row of pictured) {
    const picture = loaded.get(row);
    if (!picture?.naturalWidth) continue;
    const [x, y] = screen(row);
    const side = (SIDE - 4) / Math.max(picture.naturalWidth, picture.naturalHeight);
    const [w, h] = [picture.naturalWidth * side, picture.naturalHeight * side];
    above.fillStyle = colours[inkOf(tint[row])];
    above.fillRect(x - w / 2 - 2, y - h / 2 - 2, w + 4, h + 4);
    above.drawImage(picture, x - w / 2, y - h / 2, w, h);
  }
  above.font = "600 13px " + getComputedStyle(box).fontFamily;
  [above.textAlign, above.textBaseline, above.lineJoin] = ["center", "middle", "round"];
  const taken = [];
  for (const [text, row] of pictured.length ? [] : places) {
    const [x, y] = screen(row);
    const wide = above.measureText(text).width;
    if (x < wide / 2 || y < 9 || x > view.wide - wide / 2 || y > view.high - 9) continue;
    if (taken.some(([u, v, w]) => Math.abs(u - x) < (wide + w) / 2 + 6 && Math.abs(v - y) < 18)) continue;
    taken.push([x, y, wide]);
    [above.strokeStyle, above.fillStyle, above.lineWidth] = [colours.raised, colours.ink, 4];
    above.strokeText(text, x, y);
    above.fillText(text, x, y);
  }
  if (here >= 0) {
    const [x, y] = screen(here);
    for (const [width, name] of [[5, "raised"], [2.5, "ink"]]) {
      [above.lineWidth, above.strokeStyle] = [width, colours[name]];
      above.beginPath();
      above.arc(x, y, 9, 0, 7);
      above.stroke();
    }
  }
  if (lasso) {
    above.beginPath();
    for (const [x, y] of lasso) above.lineTo(x, y);
    above.closePath();
    [above.lineWidth, above.strokeStyle, above.fillStyle, above.globalAlpha] = [2, colours.link, colours.link, 0.15];
    above.fill("evenodd");
    above.globalAlpha = 1;
    above.stroke();
  }
}

/* ---- Finding */
/** The row nearest to a place on the screen, among those at most 14 pixels away; -1: none. */
function nearest(x, y) {
  const [u, v, far] = [view.x + (x - view.wide / 2) / view.scale, view.y - (y - view.high / 2) / view.scale, 14 / view.scale];
  let [found, least] = [-1, far * far];
  for (let r = CELLS - 1 - cellOf(v + far); r <= CELLS - 1 - cellOf(v - far); r++) {
    for (let k = starts[r * CELLS + cellOf(u - far)]; k < starts[r * CELLS + cellOf(u + far) + 1]; k++) {
      const away = (X[inTurn[k]] - u) ** 2 + (Y[inTurn[k]] - v) ** 2;
      if (away < least) [found, least] = [inTurn[k], away];
    }
  }
  return found;
}

/** The nearest row in a direction: what lies aside counts twice. */
function toward(dx, dy) {
  let [found, least] = [-1, Infinity];
  const [x, y] = here < 0 ? [view.x, view.y] : [X[here], Y[here]];
  for (const row of there) {
    const [ahead, aside] = [(X[row] - x) * dx + (Y[row] - y) * dy, Math.abs((X[row] - x) * dy) + Math.abs((Y[row] - y) * dx)];
    const away = here < 0 ? Math.hypot(X[row] - x, Y[row] - y) : ahead > 0 ? ahead + 2 * aside : Infinity;
    if (away < least && row !== here) [found, least] = [row, away];
  }
  return found;
}

function within(polygon, [x, y]) {
  let inside = false;
  for (let k = 0, before = polygon.length - 1; k < polygon.length; before = k++) {
    const [[x1, y1], [x2, y2]] = [polygon[k], polygon[before]];
    if (y1 > y !== y2 > y && x < (x2 - x1) * (y - y1) / (y2 - y1) + x1) inside = !inside;
  }
  return inside;
}

/* ---- Pointing: the picture and what is known of it */
const tip = find(".tip", box);
function point(row, { spoken = false } = {}) {
  if (row === here && !spoken && tip.hidden === row < 0) return;
  tiles.get(here)?.classList.remove("here");
  here = row;
  tiles.get(here)?.classList.add("here");
  tip.hidden = row < 0;
  if (row >= 0) {
    const src = pictureOf(row);
    const facts = factsOf(row);
    const name = cards.path[row].split("/").pop();
    tip.replaceChildren(src ? element("img", { src, alt: "" }) : element("p", { className: "soft" }, "no picture on this page"), element("b", named(shorten(name, 24))), facts);
    const [x, y] = screen(row);
    tip.style.transform = `translate(${Math.max(0, Math.min(x > view.wide / 2 ? x - tip.offsetWidth - 16 : x + 16, view.wide - tip.offsetWidth))}px, ${Math.max(0, Math.min(y - 40, view.high - tip.offsetHeight))}px)`;
    if (spoken) heard.textContent = [printable(name), ...all("dd", facts).map((each) => each.textContent)].join(", ");
  }
  cover();
}

/* ---- Selecting */
const [heard, said] = all("output", box);
function chooseOne(row, more) {
  const before = more && selection.rows ? selection.rows : [];
  if (row < 0) { if (!more) selection.clear(); return; }
  if (!before.includes(row)) before.length ? selection.set([...before, row], `${before.length + 1} chosen on the map`) : selection.set([row], cards.path[row]);
}
selection.on((it) => {
  for (const button of all("button", legend)) button.ariaPressed = String(button === it.source);
  said.textContent = it.rows ? `${count(it.rows.length)} of ${count(N)} selected: ${printable(it.why)}` : "";
  for (const name of ["show", "none"]) find(`[data-tool="${name}"]`, box).hidden = !it.rows;
  for (const [row, tile] of tiles) tile.classList.toggle("dim", !it.has(row));
  const first = it.rows ? onWall.find((row) => it.has(row)) : undefined;
  if (first !== undefined && !wall.contains(document.activeElement)) wall.scrollTop = tiles.get(first).parentElement.offsetTop - wall.offsetTop - 3;
  paint();
});

/* ---- By hand */
function zoom(factor, x = view.wide / 2, y = view.high / 2) {
  const after = Math.min(Math.max(view.zoom * factor, 1), 400);
  const before = view.scale;
  view.scale *= after / view.zoom;
  view.zoom = after;
  // what is under the pointer stays there
  view.x += (x - view.wide / 2) * (1 / before - 1 / view.scale);
  view.y -= (y - view.high / 2) * (1 / before - 1 / view.scale);
  if (after === 1) [view.x, view.y] = [0, 0];
  move(0, 0);
}
/** Moves by pixels; some of the map stays in sight. */
function move(dx, dy) {
  const limit = (value, most) => Math.min(Math.max(value, -most), most);
  view.x = limit(view.x - dx / view.scale, extent[0]);
  view.y = limit(view.y + dy / view.scale, extent[1]);
  // then a finger moves the map, not the page
  canvas.classList.toggle("near", view.zoom > 1);
  tip.hidden = true;
  paint();
}
const tools = {
  lasso: (button) => { button.ariaPressed = String(canvas.classList.toggle("lasso")); },
  pictures: (button) => { picturing = !picturing; button.ariaPressed = String(picturing); paint(); },
  in: () => zoom(1.5), out: () => zoom(1 / 1.5), all: () => zoom(0),
  show: () => find("#pictures")?.scrollIntoView(), none: () => selection.clear(),
};
on(box, "click", (event) => {
  const button = event.target.closest("[data-tool]");
  if (button) tools[button.dataset.tool](button);
});

const fingers = new Map();
const place = (event) => { const { left, top } = canvas.getBoundingClientRect(); return [event.clientX - left, event.clientY - top]; };
let moved = 0;
on(canvas, "pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, place(event));
  moved = 0;
  tip.hidden = true;
  lasso = fingers.size === 1 && (canvas.classList.contains("lasso") || event.shiftKey) ? [place(event)] : null;
});
on(canvas, "pointermove", (event) => {
  const [x, y] = place(event);
  const before = fingers.get(event.pointerId);
  if (!before) { point(nearest(x, y)); return; }
  moved += Math.hypot(x - before[0], y - before[1]);
  fingers.set(event.pointerId, [x, y]);
  if (fingers.size === 2) {
    const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
    const apart = ([u, v]) => Math.hypot(u - other[0], v - other[1]);
    zoom(apart([x, y]) / Math.max(apart(before), 1), other[0], other[1]);
  } else if (lasso) { lasso.push([x, y]); cover(); } else if (moved > 3) move(x - before[0], y - before[1]);
});
for (const name of ["pointerup", "pointercancel"]) {
  on(canvas, name, (event) => {
    if (!fingers.delete(event.pointerId)) return;
    const polygon = lasso;
    lasso = null;
    if (name === "pointerup" && moved <= 3) chooseOne(nearest(...place(event)), event.shiftKey);
    else if (polygon?.length > 2) selection.set([...there].filter((row) => within(polygon, screen(row))), "inside the lasso");
    cover();
  });
}
on(canvas, "pointerleave", () => { if (document.activeElement !== canvas) point(-1); });
on(canvas, "dblclick", (event) => zoom(2, ...place(event)));
on(canvas, "wheel", (event) => {
  // A wheel that turns the page must not get stuck on the map: it zooms who clicked there, or holds Ctrl.
  if (!event.ctrlKey && document.activeElement !== canvas) return;
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), ...place(event));
});

/* ---- By keyboard */
on(canvas, "keydown", (event) => {
  const [dx, dy] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [0, 0];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { PageDown: 1, PageUp: -1 }[event.key];
  const keys = { "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: () => zoom(0), Enter: () => chooseOne(here, event.shiftKey),
    " ": () => chooseOne(here, event.shiftKey), Escape: () => { point(-1); selection.clear(); } };
  if ((dx || dy) && event.shiftKey) move(-60 * dx, 60 * dy);
  else if (dx || dy) visit(toward(dx, dy));
  else if (step) visit(inTurn[(inTurn.indexOf(here) + step + inTurn.length) % inTurn.length]);
  else if (keys[event.key]) keys[event.key]();
  else return;
  event.preventDefault();
});
function visit(row) {
  if (row < 0) return;
  const [x, y] = screen(row);
  if (x < 0 || y < 0 || x > view.wide || y > view.high) { [view.x, view.y] = [X[row], Y[row]]; move(0, 0); }
  point(row, { spoken: true });
}
on(canvas, "blur", () => point(-1));

/* ---- The wall: similar pictures beside each other */
const wall = find(".wall", box);
const tiles = new Map();
const onWall = wall ? known.wall : [];
let anchor = -1;
for (const row of onWall) {
  const picture = find("img", items[row]);
  const tile = element("button", { type: "button", tabIndex: -1 }, element("img", { src: picture.src, alt: picture.alt, loading: "lazy" }));
  on(tile, "click", (event) => {
    const [from, to] = [onWall.indexOf(anchor), onWall.indexOf(row)];
    if (event.shiftKey && from >= 0) selection.set(onWall.slice(Math.min(from, to), Math.max(from, to) + 1), "a stretch of the wall");
    else { anchor = row; enlarge(row); }
  });
  for (const name of ["pointerenter", "focus"]) on(tile, name, () => { point(row); tip.hidden = true; });
  tiles.set(row, tile);
  wall.append(element("li", tile));
}
if (onWall.length) tiles.get(onWall[0]).tabIndex = 0;
on(wall, "pointerleave", () => point(-1));
on(wall, "keydown", (event) => {
  const here = event.target.closest("button")?.parentElement;
  const places = [...wall.children];
  const next = walked(event, places, places.indexOf(here));
  if (!next) return;
  [here.firstChild.tabIndex, next.firstChild.tabIndex] = [-1, 0];
  next.firstChild.focus();
});

ink();
new ResizeObserver(paint).observe(plane);
on(matchMedia("(prefers-color-scheme: dark)"), "change", () => { ink(); paint(); });
on(by, "input", recolour);
recolour();
update();
})();
