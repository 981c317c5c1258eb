"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // Tables: a button in each head; a third click brings the first order back.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    const body = table.tBodies[0];
    const first = [...body.rows];
    const key = (row, index) => {
      const cell = row.cells[index];
      if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
      const text = cell.textContent.trim();
      return text === "" || text === "\u2013" ? null : text;
    };
    heads.forEach((head, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const numeric = head.classList.contains("number");
        const steps = numeric ? ["none", "descending", "ascending"] : ["none", "ascending", "descending"];
        const now = steps[(steps.indexOf(before) + 1) % 3];
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", now);
        const sign = now === "descending" ? -1 : 1;
        const rows = [...first];
        if (now !== "none") {
          rows.sort((one, other) => {
            const [a, b] = [key(one, index), key(other, index)];
            if (a === null || b === null) return (a === null) - (b === null);
            if (typeof a === "number" && typeof b === "number") return sign * (a - b);
            return sign * String(a).localeCompare(String(b), "en", { numeric: true });
          });
        }
        body.append(...rows);
      });
    });
  }

  // Charts: the still picture gives way to a live one; print shows the still one again.
  const onDark = { "#000000": "#ffffff", "#6B6B6B": "#a0a0a0", "#5D3A9B": "#a98fd8",
    "#7A6A00": "#c9b400", "#0072B2": "#3aa0dc" };
  const recolour = (value) => {
    if (typeof value === "string" && value.startsWith("#")) {
      const plain = value.slice(0, 7);
      return (onDark[plain] || plain) + value.slice(7);
    }
    if (Array.isArray(value) || value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, recolour(v)]));
  };
  const draw = () => {
    if (!window.Plotly) return;
    for (const panel of document.querySelectorAll("[data-chart]")) {
      const spec = data.charts[panel.dataset.chart];
      const live = panel.querySelector(".live");
      live.hidden = false;
      panel.querySelector(".still").hidden = true;
      const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false,
        automargin: true };
      const layout = {
        ...spec.layout,
        xaxis: { ...axis, ...spec.layout.xaxis,
          title: { ...spec.layout.xaxis.title, standoff: 6 } },
        yaxis: { ...axis, ...spec.layout.yaxis,
          title: { ...spec.layout.yaxis.title, standoff: 6 } },
        paper_bgcolor: css("--page"), plot_bgcolor: css("--page"),
        font: { color: css("--text"), family: "system-ui, sans-serif", size: 13 },
        hoverlabel: { namelength: -1 },
        hovermode: "closest",
        margin: { l: 56, r: 12, t: 12, b: 48 },
        legend: { orientation: "h", y: -0.24, yanchor: "top" },
      };
      const traces = isDark() ? spec.data.map(recolour) : spec.data;
      const options = { responsive: true, displaylogo: false,
        modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]] };
      window.Plotly.react(live, structuredClone(traces), layout, options);
    }
  };

  // The theme: as the system says, until the button says otherwise.
  const button = document.querySelector("button.theme");
  const name = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };
  const remember = (theme) => { try { localStorage.setItem("mim-theme", theme); } catch { } };
  try {
    const kept = localStorage.getItem("mim-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { }  // a page that may not store anything asks the system each time
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    name();
    draw();
  });
  prefersDark.addEventListener("change", () => { name(); draw(); });
  name();
  draw();

  // The viewer: one image, one ratio, every encoder.
  const viewer = document.querySelector(".viewer");
  if (!viewer || !data.viewer) return;
  const shown = data.viewer;
  const load = (source) => new Promise((done, fail) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => fail(new Error("a sheet of reconstructions cannot be decoded"));
    image.src = source;
  });
  const canvas = () => {
    const made = document.createElement("canvas");
    made.width = shown.width;
    made.height = shown.height;
    if (shown.small) made.classList.add("small");
    return made;
  };
  const tile = (context, sheet, row, column) => context.drawImage(sheet,
    column * shown.width, row * shown.height, shown.width, shown.height,
    0, 0, shown.width, shown.height);
  const overPatches = (group, place, image, paint) => {
    const mask = shown.masks[group.mask[place][image]];
    const [rows, columns] = group.grid;
    const [h, w] = [shown.height / rows, shown.width / columns];
    for (let patch = 0; patch < mask.length; patch += 1) {
      const [row, column] = [Math.floor(patch / columns), patch % columns];
      const box = [Math.round(column * w), Math.round(row * h)];
      const size = [Math.round((column + 1) * w) - box[0], Math.round((row + 1) * h) - box[1]];
      paint(mask[patch] === "1", ...box, ...size);
    }
  };
  const sources = [shown.originals, ...shown.groups.map((group) => group.sheet)];
  Promise.all(sources.map(load)).then(([originals, ...sheets]) => {
    const state = { image: shown.first, place: shown.start };
    const same = (place) => new Set(shown.groups.map((group) =>
      group.mask[place] === null ? "" : group.mask[place].join() + group.grid.join())).size === 1;
    const views = viewer.querySelector(".views");
    const slider = viewer.querySelector("input[type=range]");
    const output = viewer.querySelector("output");
    const block = (title, colour) => {
      const made = document.createElement("div");
      const head = document.createElement("p");
      head.textContent = title;
      head.style.borderBottomColor = colour || "";
      const row = document.createElement("div");
      made.append(head, row);
      views.append(made);
      return row;
    };
    const add = (row, caption, alt, paint) => {
      const figure = document.createElement("figure");
      const text = document.createElement("figcaption");
      text.textContent = caption;
      const made = canvas();
      made.setAttribute("role", "img");
      made.setAttribute("aria-label", `Image ${state.image + 1}, ${alt}`);
      paint(made.getContext("2d"));
      figure.append(made, text);
      row.append(figure);
    };
    const render = () => {
      const { image, place } = state;
      const ratio = shown.ratios[place];
      output.textContent = ratio.toFixed(2);
      slider.setAttribute("aria-valuetext", `${Math.round(ratio * 100)} percent hidden`);
      views.replaceChildren();
      const overlay = (row, group, alt) => add(row, "mask", `${alt}mask, ratio ${ratio}`, (context) => {
        tile(context, originals, 0, image);
        context.fillStyle = "rgba(213, 94, 0, .72)";
        overPatches(group, place, image, (hidden, ...box) => {
          if (hidden) context.fillRect(...box);
        });
      });
      const shared = same(place);
      const given = block("image", "");
      add(given, "original", "original", (context) => tile(context, originals, 0, image));
      if (shared && shown.groups[0].row[place] !== null) overlay(given, shown.groups[0], "");
      shown.groups.forEach((group, index) => {
        const row = block(group.label, group.colour);
        const line = group.row[place];
        if (line === null) {
          row.textContent = "not drawn at this ratio";
          return;
        }
        if (!shared) overlay(row, group, `${group.label}, `);
        add(row, "prediction", `${group.label}, prediction at ratio ${ratio}`,
          (context) => tile(context, sheets[index], line, image));
        add(row, "with visible", `${group.label}, with visible patches at ratio ${ratio}`,
          (context) => {
            tile(context, sheets[index], line, image);
            overPatches(group, place, image, (hidden, x, y, w, h) => {
              if (!hidden) context.drawImage(originals, image * shown.width + x, y, w, h, x, y, w, h);
            });
          });
      });
    };
    const picker = viewer.querySelector(".picker");
    for (let image = 0; image < shown.count; image += 1) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      input.type = "radio";
      input.name = "image";
      input.checked = image === shown.first;
      input.setAttribute("aria-label", `Image ${image + 1}`);
      input.addEventListener("change", () => { state.image = image; render(); });
      const thumb = canvas();
      tile(thumb.getContext("2d"), originals, 0, image);
      label.append(input, thumb);
      picker.append(label);
    }
    slider.addEventListener("input", () => { state.place = Number(slider.value); render(); });
    slider.disabled = shown.ratios.length < 2;
    viewer.hidden = false;
    render();
  });
})();
