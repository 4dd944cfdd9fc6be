// Tabs, choosers, tables that sort, and the time that a step needs at least to read weights.
function choose(parent, chosen) {
  const panes = parent.querySelectorAll(":scope > div");
  panes.forEach((pane, index) => { pane.hidden = index !== chosen; });
  seeAll(panes[chosen]);
}

for (const tabs of document.querySelectorAll(".tabs")) {
  const buttons = tabs.querySelectorAll(":scope > nav > button");
  const show = (chosen) => {
    buttons.forEach((button, index) => button.setAttribute("aria-selected", index === chosen));
    choose(tabs, chosen);
  };
  buttons.forEach((button, index) => button.addEventListener("click", () => show(index)));
  show(Number(tabs.dataset.opened));
}

for (const chooser of document.querySelectorAll(".chooser")) {
  const select = chooser.querySelector(":scope > select");
  select.addEventListener("change", () => choose(chooser, select.selectedIndex));
  choose(chooser, select.selectedIndex);
}

window.addEventListener("resize", () => seeAll(document));
seeAll(document);

for (const table of document.querySelectorAll("table.sorts")) {
  const value = (row, column) => {
    const text = row.cells[column].textContent;
    return Number.isNaN(parseFloat(text)) ? text : parseFloat(text);
  };
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = (a, b) => (value(a, column) > value(b, column) ? 1 : -1) * (up ? 1 : -1);
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }));
}

for (const form of document.querySelectorAll("form.bandwidth")) {
  const data = JSON.parse(form.querySelector("script").textContent);
  const table = form.parentElement.querySelector("table.steps");
  const short = (value) => String(Number(value.toPrecision(3))); // three digits, none of them written as e-7
  for (const name of ["megabytes", "other"]) form[name].value = short(data[name]);
  for (const name of ["layers", "bandwidth", "batch"]) form[name].value = data[name];

  const update = () => {
    const number = (name) => Math.max(Number(form[name].value) || 0, 0);
    const rows = data.rows.filter((row) => row.batch === number("batch"));
    const beats = (one, other) => one.union <= other.union && one.kl <= other.kl && (one.union < other.union || one.kl < other.kl);
    const shown = form.all.checked ? rows : rows.filter((row) => !rows.some((other) => beats(other, row)));
    const gigabytes = (row) => row.union * number("megabytes") * number("layers") / 1e3 + number("other");
    const time = (row) => 1e3 * gigabytes(row) / Math.max(number("bandwidth"), 1e-9);
    const stock = time(rows.find((row) => row.policy === "stock"));
    const cell = (text) => Object.assign(document.createElement("td"), { textContent: text });
    table.replaceChildren();
    const head = table.insertRow();
    for (const name of ["policy", "GB a step", "ms a step, at least", "throughput, at most", "KL"]) {
      head.append(Object.assign(document.createElement("th"), { textContent: name }));
    }
    for (const row of shown) {
      const line = table.insertRow();
      line.className = row.control ? "control" : "";
      const bar = cell("");
      const width = stock > 0 ? 100 * time(row) / stock : 0;
      bar.append(Object.assign(document.createElement("span"), { className: "bar", style: `width: ${0.7 * width}%` }));
      bar.append(` ${short(time(row))}`);
      const gain = time(row) > 0 ? stock / time(row) : 1;
      const name = Object.assign(cell(row.policy), { className: "policy" });
      line.append(name, cell(short(gigabytes(row))), bar, cell(`× ${gain.toFixed(2)}`), cell(row.kl.toFixed(4)));
    }
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
}
