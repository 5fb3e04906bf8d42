"use strict";
// A heading sorts the rows of its table: once up, once down. Texts that begin with a number are sorted by it.
const numberIn = (text) => parseFloat(text.replaceAll(",", ""));
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const body = heading.closest("table").tBodies[0];
    const up = heading.getAttribute("aria-sort") !== "ascending";
    const key = (row) => row.cells[heading.cellIndex].textContent;
    const compare = (one, other) => {
      const [a, b] = [numberIn(key(one)), numberIn(key(other))];
      if (isNaN(a) !== isNaN(b)) return isNaN(a) ? 1 : -1; // words after numbers, whichever way
      const order = isNaN(a) ? key(one).localeCompare(key(other), "en", { numeric: true }) : a - b;
      return up ? order : -order;
    };
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort(compare));
  });
}
