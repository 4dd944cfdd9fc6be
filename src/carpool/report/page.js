// Tabs, and the time that a decoding step needs at least to read its weights.
for (const tabs of document.querySelectorAll(".tabs")) {
  const buttons = tabs.querySelectorAll(":scope > nav > button");
  const panes = tabs.querySelectorAll(":scope > div");
  const show = (chosen) => {
    buttons.forEach((button, index) => button.setAttribute("aria-selected", index === chosen));
    panes.forEach((pane, index) => { pane.hidden = index !== chosen; });
    // plotly draws hidden figures at a width of its own
    panes[chosen].querySelectorAll(".plotly-graph-div").forEach((figure) => Plotly.Plots.resize(figure));
  };
  buttons.forEach((button, index) => button.addEventListener("click", () => show(index)));
  show(panes.length - 1);
}

const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("calculator");
form.megabytes.value = data.megabytes.toPrecision(3);
form.layers.value = data.layers;
form.other.value = 2;
form.bandwidth.value = data.bandwidth;
form.batch.value = data.rows[data.rows.length - 1].batch;

function update() {
  const number = (name) => Math.max(Number(form[name].value) || 0, 0);
  const rows = data.rows.filter((row) => row.batch === number("batch"));
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
  for (const row of rows) {
    const line = table.insertRow();
    line.className = row.control ? "control" : "";
    const bar = cell("");
    const width = stock > 0 ? 220 * time(row) / stock : 0;
    bar.append(Object.assign(document.createElement("span"), { className: "bar", style: `width: ${width}px` }));
    bar.append(` ${time(row).toFixed(1)}`);
    const gain = time(row) > 0 ? stock / time(row) : 1;
    line.append(cell(row.policy), cell(gigabytes(row).toFixed(2)), bar, cell(`× ${gain.toFixed(2)}`), cell(row.kl.toFixed(4)));
  }
}
form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
update();
