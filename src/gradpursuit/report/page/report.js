"use strict";
(() => {
  const theme = document.getElementById("theme");
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.style.colorScheme || (prefersDark.matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.style.colorScheme = isDark() ? "light" : "dark"; label(); });
  prefersDark.addEventListener("change", label);
  label();

  const table = document.getElementById("row-table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, data: row.dataset, text: row.textContent.toLowerCase() }));
  const [search, sort, count, none] = ["search", "sort", "count", "none"].map((id) => document.getElementById(id));
  const heads = [...table.querySelectorAll("th[data-key]")].filter((head) => head.dataset.key !== "text");
  const numeric = new Set(["rank", "weight", "tokens"]);
  const falling = new Set(["weight", "tokens"]);
  const more = document.getElementById("more");
  const first = 25;
  let shown = { key: "rank", down: false };
  let all = rows.length <= first;

  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter(({ text }) => words.every((word) => text.includes(word)));
    const seen = new Set(all || words.length ? found : found.slice(0, first));
    for (const each of rows) each.row.hidden = !seen.has(each);
    count.textContent = seen.size < rows.length ? `${seen.size} of ${rows.length} rows` : `${rows.length} rows`;
    none.hidden = found.length > 0;
    more.hidden = all || words.length > 0;
  };
  const order = (key, down) => {
    shown = { key, down };
    const value = ({ data }) => (numeric.has(key) ? Number(data[key]) : data[key]);
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      const difference = numeric.has(key) ? x - y : x.localeCompare(y);
      return (down ? -difference : difference) || a.data.rank - b.data.rank;
    };
    rows.sort(compare);
    body.append(...rows.map(({ row }) => row));
    for (const head of heads) {
      if (head.dataset.key === key) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    sort.value = key;
    show();
  };
  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const key = head.dataset.key;
    button.addEventListener("click", () => order(key, shown.key === key ? !shown.down : falling.has(key)));
  }
  more.addEventListener("click", () => { all = true; show(); });
  search.addEventListener("input", show);
  sort.addEventListener("change", () => order(sort.value, falling.has(sort.value)));
  document.getElementById("row-tools").hidden = false;
  show();
})();
