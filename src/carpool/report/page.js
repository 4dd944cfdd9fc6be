// Tabs, choosers, tables that sort, legends on narrow screens, and the time that a step needs at least to read weights.
const NARROW = 700; // pixels

function fit(figure) {
  const narrow = window.innerWidth < NARROW;
  if (narrow !== (figure.dataset.narrow === "true")) {
    figure.dataset.narrow = narrow;
    const entries = figure.data.filter((trace) => trace.name).length;
    figure.dataset.height ||= figure.layout.height;
    const below = narrow && entries > 1 ? 19 * entries + 20 : 0;
    const change = {
      height: Number(figure.dataset.height) + below,
      "margin.b": 60 + below,
      "legend.orientation": narrow ? "h" : "v",
      "legend.y": narrow ? -70 / (Number(figure.dataset.height) - 140) : 1,
      "legend.yanchor": "top",
      "legend.x": narrow ? 0 : 1.02,
    };
    if ((figure.layout.updatemenus || []).length === 2) {
      const top = narrow ? 150 : 80;
      Object.assign(change, {
        "margin.t": top, height: change.height + top - 80, "updatemenus[0].direction": narrow ? "down" : "right",
        "updatemenus[1].direction": narrow ? "down" : "right",
      });
    }
    figure.style.height = `${change.height}px`;
    Plotly.relayout(figure, change);
  }
  Plotly.Plots.resize(figure);
}

function choose(parent, chosen) {
  const panes = parent.querySelectorAll(":scope > div");
  panes.forEach((pane, index) => { pane.hidden = index !== chosen; });
  // plotly draws hidden figures at a width of its own
  panes[chosen].querySelectorAll(".plotly-graph-div").forEach(fit);
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

const fitAll = () => document.querySelectorAll(".plotly-graph-div").forEach((one) => one.offsetParent && fit(one));
window.addEventListener("resize", fitAll);
fitAll();

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

const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("calculator");
form.megabytes.value = data.megabytes.toPrecision(3);
form.layers.value = data.layers;
form.other.value = 2;
form.bandwidth.value = data.bandwidth;
form.batch.value = data.batch;

function update() {
  const number = (name) => Math.max(Number(form[name].value) || 0, 0);
  const rows = data.rows.filter((row) => row.batch === number("batch"));
  const beats = (one, other) => one.union <= other.union && one.kl <= other.kl && (one.union < other.union || one.kl < other.kl);
  const shown = form.all.checked ? rows : rows.filter((row) => !rows.some((other) => beats(other, row)));
  const gigabytes = (row) => row.union * number("megabytes") * number("layers") / 1e3 + number("other");
  const time = (row) => 1e3 * gigabytes(row) / Math.max(number("bandwidth"), 1e-9);
  const stock = time(rows.find((row) => row.policy === "stock"));
  const cell = (text) => Object.assign(document.createElement("td"), { textContent: text });
  const table = document.getElementById("steps");
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
    bar.append(` ${time(row).toFixed(1)}`);
    const gain = time(row) > 0 ? stock / time(row) : 1;
    line.append(cell(row.policy), cell(gigabytes(row).toFixed(2)), bar, cell(`× ${gain.toFixed(2)}`), cell(row.kl.toFixed(4)));
  }
}
form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
update();
