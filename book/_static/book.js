// The sliders: a control for each parameter of a chart, its picture drawn by Vega-Lite, its sentence looked up.

async function start(figure) {
  const { spec, controls, says } = JSON.parse(figure.querySelector("script").textContent);
  const picture = figure.querySelector(".picture");
  const fitted = { ...spec, width: picture.clientWidth, autosize: { type: "fit-x", contains: "padding" } };
  const { view } = await vegaEmbed(picture, fitted, { renderer: "svg", actions: false });
  new ResizeObserver(() => view.width(picture.clientWidth).runAsync()).observe(picture);
  const values = Object.fromEntries(controls.map((control) => [control.name, control.start]));

  function show(control, value) {
    values[control.name] = value;
    view.signal(control.name, value).runAsync();
    figure.querySelector(".says").textContent = says[Object.values(values).join("|")];
  }

  for (const control of controls) {
    const label = document.createElement("label");
    const box = figure.querySelector(".controls");
    label.append(control.label, " ");
    const input = document.createElement(control.kind === "choice" ? "select" : "input");
    label.append(input);
    box.append(label);
    if (control.kind === "choice") {
      input.append(...control.values.map((value) => new Option(value, value)));
      input.value = control.start;
      input.addEventListener("change", () => show(control, control.values[input.selectedIndex]));
      continue;
    }
    const output = document.createElement("output");
    label.append(output);
    Object.assign(input, { type: "range", min: 0, max: control.values.length - 1, step: 1 });
    input.value = control.values.indexOf(control.start);
    const tell = () => {
      const value = control.values[input.value];
      output.textContent = value;
      input.setAttribute("aria-valuetext", `${control.label} ${value}`);
      return value;
    };
    input.addEventListener("input", () => show(control, tell()));
    tell();
  }
}

// A chart is drawn when it comes near the window; one in a closed fold when the fold opens.
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((each) => each.isIntersecting)) {
      seen.unobserve(entry.target);
      start(entry.target);
    }
  },
  { rootMargin: "300px" },
);
document.querySelectorAll("figure.chart").forEach((figure) => seen.observe(figure));

// What scrolls sideways can be reached with the keyboard.
function reachable() {
  for (const part of document.querySelectorAll("pre, .cell_output, .cell_output table, mjx-container")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
  }
}
window.addEventListener("load", () => {
  reachable();
  window.MathJax?.startup?.promise?.then(reachable);
  document.addEventListener("toggle", reachable, true);
});

// A link into a fold opens it; a search opens “Going further” where the words stand in it.
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const sought = (localStorage.getItem("sphinx_highlight_terms") ?? "").split(" ").filter(Boolean);
  localStorage.removeItem("sphinx_highlight_terms");
  for (const fold of document.querySelectorAll("details:not([open])")) {
    const text = fold.matches(".further") ? fold.textContent.toLowerCase() : "";
    fold.open = fold.contains(target) || sought.some((word) => text.includes(word));
  }
  target?.scrollIntoView();
}
if (!document.querySelector("#search-results")) {
  window.addEventListener("load", reveal);
  window.addEventListener("hashchange", reveal);
}
