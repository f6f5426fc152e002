// The board: draws what recurgolf/compare/board.py has put into the page. Needs plotly.js.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs.map((run, index) => ({ ...run, index, group_label: data.groups[run.group] }));
  const colours = ["#3b76c4", "#d1731f", "#2e9a66", "#c24141", "#7d5bb5", "#8a6146", "#c9599b",
    "#6f7782", "#a39a1e", "#1e9bb0"];
  const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "star"];
  const NAMED_GROUPS = 12, CURVES = 40, ROWS = 200;
  const state = { filter: "", sort: "val_bpb", descending: false, all: false, open: null };
  const $ = (id) => document.getElementById(id);
  const colour = (n) => colours[n % colours.length];
  const symbol = (n) => symbols[Math.floor(n / colours.length) % symbols.length];
  const known = (value) => value !== null && value !== undefined;
  const fixed = (digits) => (value) => (known(value) ? value.toFixed(digits) : "-");
  const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en-US") : "-");
  const plain = (value) => (known(value) ? String(value) : "-");

  for (const run of runs) {
    run.gap = known(run.val_bpb) ? run.val_bpb - run.pre_quant_val_bpb : null;
    const settings = Object.entries({ ...data.common, ...run.settings });
    run.config = Object.fromEntries(settings);
    run.words = [run.group_label, run.name, `seed=${run.seed}`, run.status, run.hardware, run.folder,
      ...Object.entries(run.settings).map(([k, v]) => `${k}=${v}`)].join(" ").toLowerCase();
  }

  const columns = [
    ["group_label", "setting", plain],
    ["seed", "seed", plain],
    ["val_bpb", "val_bpb", fixed(4)],
    ["pre_quant_val_bpb", "before packing", fixed(4)],
    ["gap", "packing costs", fixed(4)],
    ["artifact_bytes", "bytes", whole],
    ["status", "status", plain],
    ["audit", "audit", plain],
    ["steps", "steps", whole],
    ["tokens", "tokens", whole],
    ["train_seconds", "seconds", whole],
    ["tokens_per_second", "tokens/s", whole],
    ["params", "parameters", whole],
    ["name", "experiment", plain],
    ["hardware", "hardware", plain],
  ];

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  // ---- filtering and sorting

  const comparisons = {
    "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b,
  };

  function test(word) {
    const match = /^([\w./]+)(<=|>=|<|>|=)(.+)$/.exec(word);
    const has = (run, key) => key in run.config || (key in run && typeof run[key] !== "object");
    if (match && runs.some((run) => has(run, match[1]))) {
      const [, key, sign, wanted] = match;
      return (run) => {
        const value = key in run.config ? run.config[key] : run[key];
        if (sign === "=") return String(value).toLowerCase() === wanted.toLowerCase();
        return known(value) && value !== "-" && comparisons[sign](Number(value), Number(wanted));
      };
    }
    return (run) => run.words.includes(word.toLowerCase());
  }

  function shown() {
    const tests = state.filter.split(/\s+/).filter(Boolean).map(test);
    return runs.filter((run) => tests.every((passes) => passes(run)));
  }

  function compare(a, b) {
    const [x, y] = [a[state.sort], b[state.sort]];
    if (!known(x) || !known(y)) return known(y) - known(x); // what is not known goes last, always
    const numbers = typeof x === "number" && typeof y === "number";
    const order = numbers ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return state.descending ? -order : order;
  }

  // ---- tables

  const rows = new Map();

  function buildTable() {
    const head = element("tr");
    for (const [key, title] of columns) {
      const cell = element("th", undefined, { scope: "col", "data-key": key });
      const button = element("button", title, { type: "button" });
      button.addEventListener("click", () => {
        state.descending = state.sort === key ? !state.descending : false;
        state.sort = key;
        fillTable(shown());
      });
      cell.append(button);
      head.append(cell);
    }
    $("runs").tHead.append(head);
  }

  function rowOf(run) {
    if (rows.has(run.index)) return rows.get(run.index);
    const row = element("tr", undefined, { tabindex: "0", "data-run": run.index });
    columns.forEach(([key, , form], place) => {
      const cell = element("td", undefined, { "data-key": key });
      if (place === 0) {
        const dot = element("span", undefined, { class: "dot" });
        dot.style.background = colour(run.group);
        cell.append(dot);
      }
      cell.append(form(run[key]));
      if (key === "status" && run[key] !== "finished") cell.className = "bad";
      row.append(cell);
    });
    row.addEventListener("click", () => openRun(run, true));
    row.addEventListener("keydown", (event) => event.key === "Enter" && openRun(run, true));
    rows.set(run.index, row);
    return row;
  }

  function fillTable(chosen) {
    const sorted = [...chosen].sort(compare);
    const some = state.all ? sorted : sorted.slice(0, ROWS);
    $("runs").tBodies[0].replaceChildren(...some.map(rowOf));
    $("all").hidden = some.length === sorted.length;
    $("all").textContent = `show all ${whole(sorted.length)} rows`;
    for (const cell of $("runs").tHead.rows[0].cells) {
      const own = cell.dataset.key === state.sort;
      cell.setAttribute("aria-sort", own ? (state.descending ? "descending" : "ascending") : "none");
    }
    const finished = chosen.filter((run) => known(run.val_bpb)).length;
    $("counts").textContent = `${whole(chosen.length)} of ${whole(runs.length)} runs, `
      + `${whole(finished)} of them finished, ${whole(data.groups.length)} setting(s)`;
  }

  function spread(values, form) {
    if (!values.length) return "-";
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    if (values.length === 1) return form(mean);
    const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    return `${form(mean)} ± ${form(Math.sqrt(squares / (values.length - 1)))}`;
  }

  function fillGroups(chosen) {
    const titles = ["setting", "n", "val_bpb", "before packing", "bytes", "over budget",
      "not finished", "steps", "hardware"];
    $("groups").tHead.replaceChildren(element("tr"));
    for (const title of titles) $("groups").tHead.rows[0].append(element("th", title));
    const body = [];
    data.groups.forEach((label, number) => {
      const own = chosen.filter((run) => run.group === number);
      if (!own.length) return;
      const done = own.filter((run) => known(run.val_bpb) && !run.repeated);
      const of = (key, form) => spread(done.map((run) => run[key]), form);
      const different = (key) => [...new Set(done.map((run) => run[key]))];
      const row = element("tr", undefined, { "data-group": number });
      const cells = [label, done.length, of("val_bpb", fixed(4)), of("pre_quant_val_bpb", fixed(4)),
        of("artifact_bytes", whole), done.filter((run) => run.status === "over_budget").length,
        own.filter((run) => !known(run.val_bpb) && !run.repeated).length, different("steps").map(whole).join(", ") || "-",
        different("hardware").join("; ") || "-"];
      cells.forEach((text) => row.append(element("td", text)));
      const dot = element("span", undefined, { class: "dot" });
      dot.style.background = colour(number);
      row.cells[0].prepend(dot);
      body.push(row);
    });
    $("groups").tBodies[0].replaceChildren(...body);
  }

  // ---- plots

  function draw(place, traces, layout) {
    const style = getComputedStyle(document.documentElement);
    const [front, line] = ["--front", "--line"].map((name) => style.getPropertyValue(name).trim());
    const axis = { gridcolor: line, zerolinecolor: line, automargin: true };
    Plotly.react(place, traces, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: front, size: 12 },
      margin: { l: 56, r: 14, t: 14, b: 46 }, hovermode: "closest", showlegend: false,
      ...layout,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
    }, { responsive: true, displayModeBar: false });
  }

  const title = (text) => ({ title: { text } });

  function front(finished) {
    const best = [];
    const bySize = [...finished].sort((a, b) => a.artifact_bytes - b.artifact_bytes || a.val_bpb - b.val_bpb);
    for (const run of bySize) {
      if (!best.length || run.val_bpb < best[best.length - 1].val_bpb) best.push(run);
    }
    return best;
  }

  function byGroup(chosen, make) {
    return data.groups.flatMap((label, number) => {
      const own = chosen.filter((run) => run.group === number);
      return own.length ? [make(own, label, number)] : [];
    });
  }

  function drawPareto(chosen) {
    const finished = chosen.filter((run) => known(run.val_bpb));
    const named = data.groups.length <= NAMED_GROUPS;
    const dots = (own, name, shade, shape) => ({
      type: "scatter", mode: "markers", name,
      x: own.map((run) => run.artifact_bytes), y: own.map((run) => run.val_bpb),
      customdata: own.map((run) => run.index),
      text: own.map((run) =>
        `${run.group_label}<br>seed ${run.seed}, ${whole(run.steps)} steps<br>${run.hardware}`),
      hovertemplate: "%{text}<br>%{y:.4f} bpb, %{x:,} bytes<extra></extra>",
      marker: { color: shade, symbol: shape, size: 9, opacity: 0.85 },
    });
    // Without a legend all dots are one trace: hundreds of traces take seconds.
    const traces = named
      ? byGroup(finished, (own, label, number) => dots(own, label, colour(number), symbol(number)))
      : [dots(finished, "", finished.map((run) => colour(run.group)),
        finished.map((run) => symbol(run.group)))];
    const best = front(finished);
    traces.push({
      type: "scatter", mode: "lines", name: "best of each size", hoverinfo: "skip",
      x: best.map((run) => run.artifact_bytes), y: best.map((run) => run.val_bpb),
      line: { color: "#888888", width: 1, dash: "dot" },
    });
    const sizes = finished.map((run) => run.artifact_bytes);
    const budgets = [...new Set(finished.map((run) => run.budget_bytes))]
      .filter((budget) => budget < 1.1 * Math.max(...sizes));
    const shapes = budgets.map((budget) => ({
      type: "line", x0: budget, x1: budget, y0: 0, y1: 1, yref: "paper",
      line: { color: "#d0453e", width: 1, dash: "dash" },
    }));
    draw("pareto", traces, {
      shapes, showlegend: named && data.groups.length > 1,
      xaxis: { ...title("artifact bytes"), tickformat: ",.4~s" }, yaxis: title("val_bpb"),
    });
  }

  function drawCurves(chosen) {
    const [key, axis] = [$("curve").value, $("axis").value];
    const having = chosen.filter((run) => run.curves[key] && run.curves[key].y.length);
    const some = having.slice(0, CURVES);
    $("curves-shown").textContent = having.length > some.length
      ? `(${some.length} of ${whole(having.length)} runs: filter to see others)` : "";
    const named = new Set();
    const traces = some.map((run) => {
      const curve = run.curves[key];
      const first = !named.has(run.group);
      named.add(run.group);
      return {
        type: "scatter", mode: curve.y.length < 30 ? "lines+markers" : "lines", name: run.group_label,
        legendgroup: run.group, showlegend: first, x: curve[axis], y: curve.y,
        text: `${run.group_label}, seed ${run.seed}`,
        hovertemplate: "%{text}<br>%{y:.4f} at %{x:,}<extra></extra>",
        line: { color: colour(run.group), width: 1.5 }, marker: { size: 5 },
      };
    });
    const names = { step: "steps", tokens: "tokens", seconds: "training seconds" };
    draw("curves", traces, {
      showlegend: named.size > 1 && named.size <= NAMED_GROUPS / 2,
      xaxis: title(names[axis]), yaxis: title(key),
    });
  }

  function drawPasses(chosen) {
    const some = chosen.filter((run) => Object.keys(run.by_passes).length
      || Object.keys(run.sampled_passes).length).slice(0, CURVES);
    const sampled = some.some((run) => !Object.keys(run.by_passes).length);
    $("passes-kind").textContent = !some.length ? "(no such evaluation)"
      : sampled ? "(dashed: first windows of the text only)" : "";
    draw("passes", some.map((run) => {
      const whole = Object.keys(run.by_passes).length > 0;
      const points = Object.entries(whole ? run.by_passes : run.sampled_passes)
        .map(([passes, bpb]) => [Number(passes), bpb]).sort((a, b) => a[0] - b[0]);
      return {
        type: "scatter", mode: "lines+markers", x: points.map((p) => p[0]), y: points.map((p) => p[1]),
        text: `${run.group_label}, seed ${run.seed}`, hovertemplate: "%{text}<br>%{x} passes: %{y:.4f}<extra></extra>",
        line: { color: colour(run.group), width: 1.5, dash: whole ? "solid" : "dash" },
      };
    }), { xaxis: { ...title("passes"), dtick: 1 }, yaxis: title("bits per byte") });
  }

  function drawBytes(run) {
    const lines = run.bytes;
    const bar = (key, shade) => ({
      type: "bar", orientation: "h", name: key, y: lines.map((line) => line.component),
      x: lines.map((line) => line[key]), marker: { color: shade },
      hovertemplate: `%{y}, ${key}: %{x:,.0f} bytes<extra></extra>`,
    });
    draw("bytes", [bar("planned", "#9aa5b0"), bar("actual", colour(run.group))], {
      barmode: "group", showlegend: true, xaxis: title("bytes"), yaxis: { autorange: "reversed" },
    });
  }

  const figures = {
    residual_rms: ["Root mean square of the state", "visit"],
    cosine: ["Cosine to the state before", "visit"],
    grad_norm: ["Norm of the loss's gradient", "visit"],
    adapter_norm: ["Norm of the adapters", "visit"],
    contraction: ["Change of a pass over that of the pass before", "pass"],
  };

  function drawVisits(run) {
    const having = Object.entries(figures).filter(([key]) => run.visits.some((moment) => moment[key]));
    const plots = having.map(([key, [text]]) => {
      const figure = element("figure");
      figure.append(element("figcaption", text), element("div", undefined,
        { class: "plot", id: `visits-${key}` }));
      return figure;
    });
    $("visits").replaceChildren(...plots); // all of them first: each takes its width from the rest
    for (const [key, [, unit]] of having) {
      const moments = run.visits.filter((moment) => moment[key]);
      draw(`visits-${key}`, moments.map((moment, number) => ({
        type: "scatter", mode: "lines+markers", name: `step ${whole(moment.step)}`,
        x: Object.keys(moment[key]).map(Number), y: Object.values(moment[key]),
        line: { color: colour(run.group), width: 1.5 }, opacity: (number + 1) / moments.length,
        hovertemplate: `${unit} %{x}: %{y:.4g}`,
      })), { showlegend: moments.length > 1, xaxis: { ...title(unit), dtick: 1 }, yaxis: {} });
    }
  }

  // ---- one run, and two

  function openRun(run, scroll) {
    rows.get(state.open)?.classList.remove("open");
    state.open = run.index;
    rowOf(run).classList.add("open");
    $("run").hidden = false;
    $("run-name").textContent = `${run.name}, seed ${run.seed}: ${run.group_label}`;
    $("run-links").replaceChildren(...Object.entries(run.links).map(([name, address]) =>
      element("a", name, { href: address })));
    const gap = known(run.gap) ? ` (packing costs ${fixed(4)(run.gap)})` : "";
    const facts = {
      folder: run.folder, status: run.status, audit: run.audit, hardware: run.hardware,
      val_bpb: fixed(6)(run.val_bpb) + gap, "val_bpb of raw text": fixed(6)(run.val_bpb_raw),
      "artifact bytes": `${whole(run.artifact_bytes)} = ${whole(run.bytes_model)} model + `
        + `${whole(run.bytes_code)} code; budget ${whole(run.budget_bytes)}`,
      parameters: `${whole(run.params)}, ${whole(run.effective_params)} with every visit counted`,
      training: `${whole(run.steps)} steps, ${whole(run.tokens)} tokens, ${whole(run.train_seconds)} s`,
      memory: known(run.peak_memory_bytes) ? `${(run.peak_memory_bytes / 1e9).toFixed(2)} GB` : "-",
      protocol: run.protocol,
      evaluations: Object.entries(run.evals).map(([name, bpb]) => `${name} ${fixed(4)(bpb)}`).join(", "),
    };
    $("run-facts").tBodies[0].replaceChildren(...Object.entries(facts).map(([name, text]) => {
      const row = element("tr");
      row.append(element("td", name), element("td", text, { "data-fact": name }));
      return row;
    }));
    drawBytes(run);
    drawVisits(run);
    if (scroll) $("run").scrollIntoView({ behavior: "instant", block: "start" });
  }

  function fillDifference() {
    const [one, other] = [runs[$("one").value], runs[$("other").value]];
    const head = element("tr");
    head.append(element("th", "setting"), ...[one, other].map((run) => element("th", describe(run))));
    $("difference").tHead.replaceChildren(head);
    const pairs = [["seed", one.seed, other.seed], ["experiment", one.name, other.name]];
    for (const key of Object.keys({ ...one.settings, ...other.settings })) {
      pairs.push([key, one.settings[key] ?? "-", other.settings[key] ?? "-"]);
    }
    const rowsOf = pairs.filter(([, a, b]) => a !== b).map((texts) => {
      const row = element("tr");
      row.append(...texts.map((text) => element("td", text)));
      return row;
    });
    const none = element("tr");
    none.append(element("td", "nothing differs", { colspan: "3" }));
    $("difference").tBodies[0].replaceChildren(...(rowsOf.length ? rowsOf : [none]));
  }

  const describe = (run) => `${run.index + 1}: ${run.group_label}, seed ${run.seed}`;

  // ---- together

  function update() {
    const chosen = shown();
    fillTable(chosen);
    fillGroups(chosen);
      drawPareto(chosen);
    drawCurves(chosen);
    drawPasses(chosen);
  }

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
  }

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => { setTheme(dark.matches ? "dark" : "light"); redraw(); });

  function redraw() {
    update();
    if (state.open !== null) openRun(runs[state.open], false);
  }

  $("title").textContent = data.title;
  $("made").textContent = `Made ${data.made} by recurgolf board. Bits per byte are of the packed file.`;
  const curves = new Set(runs.flatMap((run) => Object.keys(run.curves)));
  for (const key of [...curves].sort()) $("curve").append(element("option", key, { value: key }));
  const often = runs.some((run) => run.curves["val/bpb"] && run.curves["val/bpb"].y.length > 1);
  if (curves.size) $("curve").value = often || !curves.has("train/loss") ? "val/bpb" : "train/loss";
  for (const id of ["one", "other"]) {
    for (const run of runs) $(id).append(element("option", describe(run), { value: run.index }));
    $(id).addEventListener("change", fillDifference);
  }
  $("other").value = Math.min(1, runs.length - 1);
  let waiting;
  $("filter").addEventListener("input", () => {
    state.filter = $("filter").value;
    clearTimeout(waiting);
    waiting = setTimeout(update, 80);
  });
  $("all").addEventListener("click", () => {
    state.all = true;
    fillTable(shown());
  });
  $("curve").addEventListener("change", () => drawCurves(shown()));
  $("axis").addEventListener("change", () => drawCurves(shown()));
  $("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    redraw();
  });
   buildTable();
  update();
  fillDifference();
  $("pareto").on("plotly_click", (event) => {
    const index = event.points[0].customdata;
    if (index !== undefined) openRun(runs[index], true);
  });
  performance.mark("board-ready");
  document.body.dataset.ready = "yes";
})();
