"use strict";
// Makes tables sortable, by a button in every heading, and filterable, by words. Without scripts they are plain tables in
// the order of the run.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  if (original.length >= 8) table.parentElement.before(filter(table, original));
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" };
      const order = next[heading.getAttribute("aria-sort") || "none"];
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      if (order !== "none") heading.setAttribute("aria-sort", order);
      body.append(...(order === "none" ? original : sorted(original, column, order === "ascending" ? 1 : -1)));
    });
  });
}

// A row stays where each word is in its text; a word after a minus sign must not be.
function filter(table, rows) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  const count = document.createElement("output");
  input.type = "search";
  input.placeholder = "words, -not these";
  label.className = "filter";
  label.append("Filter ", input, " ", count);
  const texts = rows.map((row) => row.textContent.toLowerCase());
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter((word) => word.replace("-", ""));
    const keep = (text, word) => (word.startsWith("-") ? !text.includes(word.slice(1)) : text.includes(word));
    rows.forEach((row, i) => { row.hidden = !words.every((word) => keep(texts[i], word)); });
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  });
  return label;
}

function sorted(rows, column, sign) {
  const missing = (cell) => cell.dataset.key === undefined && (cell.matches(".number") || cell.textContent === "–");
  const compare = (one, other) => {
    const a = one.cells[column], b = other.cells[column];
    if (missing(a) || missing(b)) return missing(a) - missing(b); // last, whatever the order
    if (a.dataset.key !== undefined && b.dataset.key !== undefined) return sign * (a.dataset.key - b.dataset.key);
    return sign * a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
  };
  return [...rows].sort(compare);
}
