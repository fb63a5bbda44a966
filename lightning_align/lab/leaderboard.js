"use strict";
(() => {
  const board = document.getElementById("leaderboard");
  const body = board.tBodies[0];
  board.querySelectorAll("button.sort").forEach((button, index) => {
    button.addEventListener("click", () => {
      const down = button.getAttribute("aria-sort") !== "descending";
      board.querySelectorAll("button.sort").forEach((other) => other.removeAttribute("aria-sort"));
      button.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => parseFloat(row.cells[index + 1].firstElementChild.dataset.value);
      const known = (row) => !Number.isNaN(value(row));
      const rows = [...body.rows].sort((a, b) =>
        known(a) && known(b) ? (down ? value(b) - value(a) : value(a) - value(b)) : known(b) - known(a));
      body.append(...rows);
    });
  });
  const picks = document.querySelectorAll("input.pick");
  const show = () => {
    const shown = new Set([...picks].filter((box) => box.checked).map((box) => box.value));
    document.querySelectorAll(".card[data-method]").forEach((card) => {
      card.hidden = !shown.has(card.dataset.method);
    });
  };
  picks.forEach((box) => box.addEventListener("change", show));
  show();
})();
