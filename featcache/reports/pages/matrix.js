
/* ==== A confusion matrix of many classes: a part of it, drawn as Python draws it, of classes whose names are typed */
const matrix = find("table.matrix");
const CAPTION = matrix.caption.textContent;
const { cells: flat, levels, most: MOST } = data.confusion;
// [true class, called, images] of all cells that are not empty
const triples = Array.from({ length: flat.length / 3 }, (_, k) => flat.slice(3 * k, 3 * k + 3));
const counts = new Map(triples.map(([i, j, n]) => [i + "," + j, n]));
const sums = [0, 1].map((side) => triples.reduce((sum, cell) => sum.set(cell[side], (sum.get(cell[side]) ?? 0) + cell[2]), new Map()));
const highest = [false, true].map((hit) => Math.max(1, ...triples.filter(([i, j]) => (i === j) === hit).map(([, , n]) => n)));

/** As Python's middle_out. */
function shortName(number) {
  const whole = printable(cards.classes[number]);
  const letters = [...whole];
  return element("bdi", { title: whole }, letters.length > 24 ? letters.slice(0, 11).join("") + "…" + letters.slice(-12).join("") : whole);
}

function cellOf(i, j) {
  const n = counts.get(i + "," + j);
  if (!n) return element("td", element("span", { className: "zero" }, "·"));
  const shares = { k: n / highest[+(i === j)], r: n / sums[0].get(i), p: n / sums[1].get(j) };
  const level = (share) => Math.min(Math.floor(levels * Math.sqrt(share)), levels - 1);
  const what = { label: i, predicted: j };
  // Others are on a map.
  const here = rowsOf(what).filter((row) => row < items.length).length;
  const why = (i === j ? `${cards.classes[i]}, recognised` : `${cards.classes[i]} taken for ${cards.classes[j]}`)
    + (here < n ? `: ${count(n)} image${n === 1 ? "" : "s"}, ${count(here)} of them on this page` : "");
  const button = element("button", { type: "button" },
    ...["k", "r", "p"].map((by) => element("span", { className: by }, by === "k" ? count(n) : percent(shares[by], 0))),
    element("span", { className: "said why" }, printable(why)));
  button.dataset.select = JSON.stringify(what);
  return element("td", { className: [i === j ? "hit" : "miss", ...Object.entries(shares).map(([by, share]) => by + level(share))].join(" ") }, button);
}

function drawMatrix(numbers) {
  const [heads, feet] = [matrix.tHead.rows[0], matrix.tFoot.rows[0]];
  const end = (...texts) => texts.map((text) => element("td", { className: "sum" }, text.toLocaleString("en")));
  const head = (text, properties = {}) => element("th", { scope: "col", ...properties }, element("span", text));
  heads.replaceChildren(heads.cells[0], ...numbers.map((k) => head(shortName(k))), head("other classes"), head("images", { className: "sum" }));
  matrix.tBodies[0].replaceChildren(...numbers.map((i) => {
    const every = sums[0].get(i) ?? 0;
    const inside = numbers.reduce((sum, j) => sum + (counts.get(i + "," + j) ?? 0), 0);
    return element("tr", element("th", { scope: "row" }, shortName(i)), ...numbers.map((j) => cellOf(i, j)), ...end(every - inside || "·", every));
  }));
  feet.replaceChildren(feet.cells[0], ...end(...numbers.map((j) => sums[1].get(j) ?? 0), "", ""));
  matrix.classList.toggle("many", numbers.length > 8);
}

on(find("[data-zoom]"), "input", ({ target }) => {
  const wanted = target.value.trim().toLowerCase();
  const wrong = new Map();
  for (const [i, j, n] of triples) for (const k of [i, j]) wrong.set(k, (wrong.get(k) ?? 0) + (i === j ? 0 : n));
  const fitting = [...wrong.keys()].filter((k) => printable(cards.classes[k]).toLowerCase().includes(wanted));
  const found = new Set(wanted ? fitting.sort((a, b) => wrong.get(b) - wrong.get(a) || a - b).slice(0, MOST) : []);
  // Of few classes also what they are taken for, and what is taken for them; of all the pairs that are confused most.
  for (const [i, j] of fitting.length < 6 || !wanted ? [...triples].sort((a, b) => b[2] - a[2]) : []) {
    const fits = i !== j && (!wanted || fitting.includes(i) || fitting.includes(j));
    if (fits && new Set([...found, i, j]).size <= MOST) found.add(i).add(j);
  }
  // Without mistakes the first ones, as Python has it.
  const numbers = found.size || wanted ? [...found] : [...fitting].sort((a, b) => a - b).slice(0, MOST);
  drawMatrix(numbers.sort((a, b) => a - b));
  matrix.tHead.hidden = matrix.tFoot.hidden = !numbers.length;
  matrix.caption.replaceChildren(...(numbers.length ? [CAPTION] : ["No name of a class that occurs here contains “", named(target.value.trim()), "”."]));
  find(".matrix-controls output").textContent = wanted ? `${count(fitting.length)} ${fitting.length === 1 ? "class fits" : "classes fit"}` : "";
});
