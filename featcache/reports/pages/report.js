
/* ==== Reports of models: the matrix shows counts or shares; words above the columns of tables sort them */
for (const button of all("button[data-by]")) {
  on(button, "click", () => {
    find("table.matrix").dataset.by = button.dataset.by;
    for (const other of all("button[data-by]")) other.ariaPressed = String(other === button);
  });
}

for (const table of all("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const figures = head.matches(".n");
    const value = (row) => {
      const text = row.cells[column].textContent.trim();
      const number = parseFloat(text.replace(/[,<>]/g, ""));
      return figures ? (isNaN(number) ? -Infinity : number) : text;
    };
    head.append(element("button", { type: "button", className: "plain" }, ...head.childNodes));
    on(head.firstChild, "click", () => {
      // Figures: the largest first.
      const down = head.ariaSort ? head.ariaSort === "ascending" : figures;
      for (const other of heads) other.ariaSort = null;
      head.ariaSort = down ? "descending" : "ascending";
      const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}
