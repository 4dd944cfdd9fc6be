// Figures: drawn when first seen, at the width that they have then; their names and choices stand beside them or below.
const NARROW = 700; // pixels, as in the style sheet
const CONFIG = { displaylogo: false, responsive: false, displayModeBar: false };
const specs = new Map(); // of every figure, once it is drawn

function draw(figure) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  spec.height = spec.layout.height;
  specs.set(figure, spec);
  delete spec.layout.height;
  fit(figure);
  legend(figure, spec.data); // before the figure, which gets the width that is left
  Plotly.newPlot(plot, spec.data, spec.layout, CONFIG);
  relayout(figure);
  figure.querySelectorAll(".menus select").forEach((select, place) => select.addEventListener("change", () => {
    const [traces, layout, which] = spec.menus[place][select.selectedIndex];
    Plotly.update(plot, traces, layout, which);
  }));
}

function fit(figure) {
  const spec = specs.get(figure);
  const narrow = window.innerWidth < NARROW;
  const changed = spec.isNarrow !== narrow;
  spec.isNarrow = narrow;
  const low = spec.narrow_height || Math.min(spec.height, 360);
  figure.querySelector(".plot").style.height = `${narrow ? low : spec.height}px`;
  return changed;
}

function relayout(figure) {
  const spec = specs.get(figure);
  const change = spec.isNarrow ? spec.narrow : spec.wide;
  if (Object.keys(change).length) Plotly.relayout(figure.querySelector(".plot"), change);
}

function see(figure) {
  if (!specs.has(figure)) return draw(figure);
  if (fit(figure)) relayout(figure);
  Plotly.Plots.resize(figure.querySelector(".plot"));
}

function legend(figure, traces) {
  const plot = figure.querySelector(".plot");
  const named = traces.map((trace, index) => ({ trace, index })).filter(({ trace }) => trace.name);
  if (named.length < 2) return;
  const hidden = new Set();
  const buttons = named.map(({ trace, index }) => {
    const button = document.createElement("button");
    button.type = "button";
    const mark = document.createElement("span");
    mark.className = `mark ${trace.line ? trace.line.dash || "solid" : "bar"}`;
    mark.style.color = (trace.line || trace.marker).color;
    button.append(mark, trace.name);
    button.addEventListener("click", (event) => {
      if (event.detail === 2) {
        const alone = hidden.size === named.length; // it was, until the first click of the two hid it
        hidden.clear();
        if (!alone) named.forEach((one) => one.index !== index && hidden.add(one.index));
      } else if (!hidden.delete(index)) {
        hidden.add(index);
      }
      buttons.forEach((one, place) => one.setAttribute("aria-pressed", !hidden.has(named[place].index)));
      Plotly.restyle(plot, { visible: named.map((one) => !hidden.has(one.index)) }, named.map((one) => one.index));
    });
    button.setAttribute("aria-pressed", true);
    return button;
  });
  figure.querySelector(".legend").append(...buttons);
}

const seeAll = (inside) => inside.querySelectorAll(".figure").forEach((one) => one.offsetParent && see(one));
