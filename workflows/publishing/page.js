"use strict";
// Everything is in the page without this script; it adds sorting, filters and the interactive figures.

function sortTable(table, column, direction) {
  const body = table.tBodies[0];
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1;  // what is missing stays at the end
    const numbers = x !== "" && !isNaN(x) && !isNaN(y);
    return direction * (numbers ? x - y : x.localeCompare(y));
  });
  body.append(...rows);
  [...table.tHead.rows[0].cells].forEach((cell, index) => {
    if (cell.querySelector("button"))
      cell.setAttribute("aria-sort", index !== column ? "none" : direction > 0 ? "ascending" : "descending");
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    if (!cell.dataset.sort) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...cell.childNodes);
    cell.append(button);
    cell.setAttribute("aria-sort", "none");
    button.addEventListener("click", () =>
      sortTable(table, column, cell.getAttribute("aria-sort") === "ascending" ? -1 : 1));
  });
}

for (const form of document.querySelectorAll("form.filters")) {
  const table = document.getElementById(form.dataset.table);
  const count = form.querySelector("output");
  const apply = () => {
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = form.elements.status.value;
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = (status && row.dataset.status !== status) || !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${table.tBodies[0].rows.length} shown`;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", event => event.preventDefault());
}

async function drawPlots() {
  const source = document.getElementById("plotly-gzip");
  if (!source) return;
  const bytes = Uint8Array.from(atob(source.textContent.trim()), character => character.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);

  const plots = [...document.querySelectorAll(".plot")].map(element => ({
    element, ...JSON.parse(element.nextElementSibling.textContent),
  }));
  const themed = (layout, print) => {
    const style = getComputedStyle(document.documentElement);
    const colour = name => print ? {"--text": "#1b1f24", "--line": "#d0d7de", "--background": "#ffffff"}[name]
      : style.getPropertyValue(name).trim();
    const axis = {gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line")};
    const result = structuredClone(layout);
    for (const name of Object.keys(result).filter(name => /^[xy]axis/.test(name))) {
      Object.assign(result[name], axis);
      if (result[name].title) result[name].title.font = {size: 13};
    }
    return Object.assign(result, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {family: "system-ui, sans-serif", size: 13, color: colour("--text")},
      hoverlabel: {bgcolor: colour("--background"), font: {color: colour("--text")}},
      // A finger that scrolls the page must not zoom a figure.
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      autosize: !print,
    });
  };
  const options = {responsive: true, displaylogo: false, displayModeBar: false};
  const draw = print => Promise.all(plots.map(({element, data, layout}) => {
    const size = print ? {width: element.classList.contains("wide-plot") ? 680 : 330} : {};
    return Plotly.react(element, data, {...themed(layout, print), ...size}, options);
  }));
  await draw(false);
  document.documentElement.dataset.plots = "drawn";
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(false));
  addEventListener("beforeprint", () => draw(true));
  addEventListener("afterprint", () => draw(false));
}

drawPlots().catch(error => {
  document.documentElement.dataset.plots = "failed";
  for (const note of document.querySelectorAll(".no-script")) note.style.display = "block";
  console.error(error);
});
