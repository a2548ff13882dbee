"use strict";
// Without this script all tables are there. It sorts, filters and folds the results, and draws the figures.
const root = document.documentElement;
root.classList.add("js");
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

// Results: a <tbody> per record, with its row and the row that opens below it.
const table = document.getElementById("results-table");
if (table) {
  const controls = document.getElementById("controls");
  const status = document.getElementById("status");
  const { needle, fold } = controls.elements;
  const selects = $$("select", controls);
  const bodies = [...table.tBodies];
  const heads = $$("thead th", table);
  let order = "";

  const show = () => {
    const wanted = needle.value.toLowerCase();
    for (const body of bodies) {
      const fits = (select) => select.value === "" || body.dataset[select.name] === select.value;
      body.hidden =
        body.classList.contains("folded") !== fold.checked ||
        !selects.every(fits) ||
        !body.textContent.toLowerCase().includes(wanted);
    }
    const kind = bodies.filter((body) => body.classList.contains("folded") === fold.checked);
    status.textContent = `${kind.filter((body) => !body.hidden).length} of ${kind.length} rows${order}`;
  };

  const sort = (column, head) => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const numeric = head.dataset.kind === "number";
    const key = (body) => {
      const cell = body.rows[0].cells[column];
      if (!numeric) return cell.textContent;
      return "value" in cell.dataset ? Number(cell.dataset.value) : parseFloat(cell.textContent);
    };
    const missing = (value) => numeric && Number.isNaN(value);
    bodies.sort((a, b) => {
      const [left, right] = [key(a), key(b)];
      if (missing(left) || missing(right)) return missing(left) - missing(right); // last, either way
      return direction * (numeric ? left - right : left.localeCompare(right));
    });
    table.append(...bodies);
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    order = `, sorted by ${head.textContent.trim()}, ${head.getAttribute("aria-sort")}`;
    show();
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(column, head));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  });
  for (const body of bodies) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...body.querySelector("th").childNodes);
    button.setAttribute("aria-expanded", "false");
    button.title = "Recipe and conditions";
    button.addEventListener("click", () => {
      const open = body.classList.toggle("open");
      body.querySelector("details").open = open;
      button.setAttribute("aria-expanded", String(open));
    });
    body.querySelector("th").append(button);
  }
  controls.addEventListener("input", show);
  controls.addEventListener("submit", (event) => event.preventDefault());
  show();
}

// Figures, in the colours of the page.
const plots = JSON.parse(document.getElementById("plots").textContent);
const drawn = $$(".plot");
const touch = matchMedia("(pointer: coarse)").matches; // there a drag has to scroll the page

// Plotly's template: what all figures look alike in. The figures themselves have only what differs.
const look = () => {
  const css = getComputedStyle(root);
  const [text, line, grid, paper] = ["--text", "--line", "--grid", "--paper"].map((name) => css.getPropertyValue(name));
  const family = getComputedStyle(document.body).fontFamily;
  const axis = {
    title: { standoff: 12 }, automargin: true, zeroline: false, showline: true, linecolor: line, gridcolor: grid, ticks: "outside", tickcolor: line,
  };
  const edge = { nticks: 5, zeroline: false, showline: true, ticks: "outside", linecolor: line, gridcolor: grid, tickcolor: line };
  return {
    layout: {
      margin: { l: 60, r: 16, t: 24, b: 48 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family, size: 12, color: text },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", itemsizing: "constant" },
      showlegend: true,
      hovermode: "closest",
      hoverlabel: { bgcolor: paper, font: { family, color: text } },
      xaxis: axis,
      yaxis: axis,
      scene: { xaxis: edge, yaxis: edge, zaxis: edge },
    },
    data: {
      surface: [{
        // Cividis, dense where values are small, at the squares of even steps: after a rotation all would be one colour else.
        colorscale: [[0, "#00204d"], [0.0625, "#414d6b"], [0.25, "#7c7b78"], [0.5625, "#bcaf6f"], [1, "#ffea46"]],
        showscale: false,
        lighting: { ambient: 0.75, diffuse: 0.5, specular: 0.05 },
      }],
    },
  };
};
const recolour = () => drawn.forEach((plot) => plot.data && Plotly.relayout(plot, { template: look() }));

const draw = (plot) => {
  const { data, layout } = plots[plot.id];
  layout.template = look();
  if (touch && !layout.scene) layout.dragmode = false;
  if (layout.scene) {
    const away = Math.max(1, 520 / plot.clientWidth); // a narrow view would cut the axes off
    const camera = { eye: { x: -1.2 * away, y: -1.75 * away, z: 0.85 * away }, center: { x: -0.06, y: 0.04, z: -0.2 } };
    // Plotly writes these two back, so that a template cannot have them.
    Object.assign(layout.scene, { camera, aspectmode: "manual", aspectratio: { x: 1.5, y: 1, z: 0.75 } });
  }
  return Plotly.newPlot(plot, data, layout, { responsive: true, displayModeBar: false, scrollZoom: false });
};
const all = (async () => {
  for (const plot of drawn) {
    await draw(plot);
    await new Promise((next) => setTimeout(next)); // the page answers in between
  }
  root.dataset.drawn = "yes";
})();

for (const box of $$("input[data-log]")) {
  box.addEventListener("change", () => {
    Plotly.relayout(box.dataset.log, { "xaxis.type": box.checked ? "log" : "linear", "xaxis.autorange": true });
  });
}

// Surfaces turn with the arrow keys too.
for (const plot of drawn.filter((one) => plots[one.id].layout.scene)) {
  plot.tabIndex = 0;
  plot.addEventListener("keydown", (event) => {
    const [turn, lift] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] || [0, 0];
    if (!turn && !lift) return;
    event.preventDefault();
    const { x, y, z } = plot.layout.scene.camera.eye;
    const angle = Math.atan2(y, x) + (turn * Math.PI) / 18;
    const away = Math.hypot(x, y);
    const eye = { x: away * Math.cos(angle), y: away * Math.sin(angle), z: Math.min(2, Math.max(0.1, z + lift * 0.15)) };
    Plotly.relayout(plot, { "scene.camera.eye": eye });
  });
}

// Light and dark: as the system has it, until the reader chooses.
const theme = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
const label = () => theme.setAttribute("aria-pressed", String(isDark()));
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  label();
  recolour();
});
system.addEventListener("change", () => { label(); recolour(); });
label();

// On paper: light, every row open, figures as wide as the sheet. A figure's data is printed if the reader has opened it.
let before = null;
addEventListener("beforeprint", () => {
  before = { theme: root.dataset.theme, closed: $$(".more details:not([open])") };
  root.dataset.theme = "light";
  before.closed.forEach((details) => (details.open = true));
  for (const plot of drawn) {
    if (plot.data) Plotly.relayout(plot, { template: look(), width: 670 });
  }
});
addEventListener("afterprint", () => {
  if (before.theme) root.dataset.theme = before.theme;
  else delete root.dataset.theme;
  before.closed.forEach((details) => (details.open = false));
  for (const plot of drawn) if (plot.data) Plotly.relayout(plot, { template: look(), width: null, autosize: true });
});
