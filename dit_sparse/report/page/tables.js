/** A number with as many digits as it needs. */
function digits(value) {
  const size = Math.abs(value);
  if (Number.isInteger(value)) return String(value);
  if (size < 1e-3) return value.toExponential(1);
  return value.toFixed(size < 10 ? 3 : size < 100 ? 2 : 1);
}

const MANY_ROWS = 24;

/** A table that sorts by the column whose heading is pressed. */
function makeTable(table) {
  const numeric = table.columns.map((_, column) => table.rows.some((row) => typeof row[column] === "number"));
  const most = table.columns.map((_, column) => Math.max(...table.rows.map((row) => Math.abs(Number(row[column])) || 0)));
  const body = make("tbody");
  const show = (rows) => body.replaceChildren(...rows.map((row) => make("tr", {}, ...row.map((value, column) => {
    const cell = make("td", { class: numeric[column] ? "number" : null });
    const text = value === null ? "–" : typeof value === "number" ? digits(value) : value;
    if (table.bars.includes(table.columns[column]) && typeof value === "number") {
      const bar = make("i", { class: "bar" });
      bar.style.width = `${(100 * Math.abs(value)) / (most[column] || 1)}%`;
      cell.append(bar);
    }
    cell.append(make("span", { text }));
    return cell;
  }))));
  const heads = table.columns.map((name, column) => {
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      show([...table.rows].sort((a, b) => (down ? -1 : 1) * compareCells(a[column], b[column])));
    };
    const head = make("th", { scope: "col", class: numeric[column] ? "number" : null }, make("button", { type: "button", text: name, onclick: sort }));
    return head;
  });
  show(table.rows);
  const parts = [
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": table.title }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body)),
    table.note ? make("p", { class: "hint", text: table.note }) : null,
  ];
  if (table.rows.length <= MANY_ROWS) return make("section", { class: "table" }, make("h2", { text: table.title }), ...parts);
  return make("details", { class: "table" }, make("summary", { text: `${table.title} (${table.rows.length} rows)` }), ...parts);
}

function compareCells(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}
