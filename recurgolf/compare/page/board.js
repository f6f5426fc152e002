// The board: draws what recurgolf/compare/board.py has put into the page. Needs plotly.js.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs.map((run, index) => ({ ...run, index, group_label: data.groups[run.group] }));
  const colours = ["#3b76c4", "#d1731f", "#2e9a66", "#c24141", "#7d5bb5", "#8a6146", "#c9599b",
    "#6f7782", "#a39a1e", "#1e9bb0"];
  const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "star"];
  const NAMED_GROUPS = 24, CURVES = 40, ROWS = 200;
  const state = { filter: "", sort: "val_bpb", descending: false, all: false, open: null,
    groupSort: "val_bpb", groupDescending: false, opened: new Set(), hidden: new Set() };
  const $ = (id) => document.getElementById(id);
  const colour = (n) => colours[n % colours.length];
  const symbol = (n) => symbols[Math.floor(n / colours.length) % symbols.length];
  const known = (value) => value !== null && value !== undefined;
  // Adding 0 turns the -0 of a cost that rounds to nothing into 0.
  const fixed = (digits) => (value) =>
    known(value) ? (Number(value.toFixed(digits)) + 0).toFixed(digits) : "-";
  const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en-US") : "-");
  const counted = (number, what) => `${whole(number)} ${what}${number === 1 ? "" : "s"}`;
  const plain = (value) => (known(value) ? String(value) : "-");

  for (const run of runs) {
    run.gap = known(run.val_bpb) ? run.val_bpb - run.pre_quant_val_bpb : null;
    const settings = Object.entries({ ...data.common, ...run.settings });
    run.config = Object.fromEntries(settings);
    run.words = [run.group_label, run.name, `seed=${run.seed}`, run.status, run.hardware, run.folder,
      ...Object.entries(run.settings).map(([k, v]) => `${k}=${v}`)].join(" ").toLowerCase();
  }

  // A column that says the same of every run is left out; the opened run tells it.
  const differs = (key) => new Set(runs.map((run) => run[key]).filter((value) => known(value) && value !== "-")).size > 1;
  // key, title, how it is written, whether it is text (else a number, to the right)
  const columns = [
    ["group_label", "setting", plain, true],
    ["seed", "seed", plain],
    ["val_bpb", "val_bpb", fixed(4)],
    ["pre_quant_val_bpb", "before packing", fixed(4)],
    ["gap", "packing costs", fixed(4)],
    ["artifact_bytes", "bytes", whole],
    ["status", "status", plain, true],
    ["train_seconds", "seconds", whole],
    ["tokens_per_second", "tokens/s", whole],
    ...[
      ["audit", "audit", plain, true],
      ["steps", "steps", whole],
      ["tokens", "tokens", whole],
      ["params", "parameters", whole],
      ["name", "experiment", plain, true],
      ["hardware", "hardware", plain, true],
    ].filter(([key]) => differs(key)),
  ];

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  // A label breaks between its settings; one that is wider than its column, behind a dot or a =.
  function labelled(cell, label) {
    for (const part of label.split(" ")) {
      const own = element("span", undefined, { class: "part" });
      part.split(/(?<=\.)(?=[a-z_])|(?<==)(?=.{9})/).forEach((piece) => own.append(piece, element("wbr")));
      cell.append(own, " ");
    }
    return cell;
  }

  function dotOf(number) {
    const dot = element("span", undefined, { class: "dot" });
    dot.style.background = colour(number);
    return dot;
  }

  // ---- filtering and sorting

  const comparisons = {
    "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b,
  };

  const has = (run, key) => key in run.config || (key in run && typeof run[key] !== "object") || run[key] === null;
  const valueOf = (run, key) => (key in run.config ? run.config[key] : run[key]);

  // One word of the filter as a function; what is wrong with it goes to `troubles`.
  function test(word, troubles) {
    const match = /^([\w./]+)(<=|>=|!=|<|>|=)(.*)$/.exec(word);
    if (!match) {
      if (/^-./.test(word)) {
        const without = test(word.slice(1), troubles);
        return (run) => !without(run);
      }
      return (run) => run.words.includes(word.toLowerCase());
    }
    const [, key, sign, text] = match;
    const wanted = text.toLowerCase();
    const order = sign in comparisons;
    const number = Number(wanted.replaceAll(",", ""));
    if (!runs.some((run) => has(run, key))) {
      troubles.push(`no setting or figure is called ${key}`);
      return () => true;
    }
    if (!wanted || (order && Number.isNaN(number))) {
      troubles.push(`${key} ${sign} what${order ? " number" : ""}?`);
      return () => true;
    }
    if (order) {
      return (run) => {
        const value = valueOf(run, key);
        return known(value) && value !== "-" && comparisons[sign](Number(value), number);
      };
    }
    return (run) => (String(valueOf(run, key)).toLowerCase() === wanted) === (sign === "=");
  }

  function shown() {
    const troubles = [];
    const words = state.filter.replace(/\s*(<=|>=|!=|<|>|=)\s*/g, "$1").split(/\s+/).filter(Boolean);
    const tests = words.map((word) => test(word, troubles));
    $("trouble").textContent = troubles.join("; ");
    return runs.filter((run) => tests.every((passes) => passes(run)));
  }

  const by = (key, descending) => (a, b) => {
    const [x, y] = [a[key], b[key]];
    if (!known(x) || !known(y)) return known(y) - known(x); // what is not known goes last, always
    const numbers = typeof x === "number" && typeof y === "number";
    const order = numbers ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return descending ? -order : order;
  };

  // ---- tables

  const rows = new Map();

  // Headings that sort: which key and direction stand in the state under the names given.
  function buildHead(table, titles, sort, descending) {
    const head = element("tr");
    for (const [key, title, , text] of titles) {
      const cell = element("th", undefined, { scope: "col", "data-key": key, class: text ? "text" : "" });
      const button = element("button", title, { type: "button" });
      button.addEventListener("click", () => {
        state[descending] = state[sort] === key ? !state[descending] : false;
        state[sort] = key;
        update();
      });
      cell.append(button);
      head.append(cell);
    }
    $(table).tHead.append(head);
  }

  function markSorted(table, key, descending) {
    for (const cell of $(table).tHead.rows[0].cells) {
      const own = cell.dataset.key === key;
      cell.setAttribute("aria-sort", own ? (descending ? "descending" : "ascending") : "none");
    }
  }

  function rowOf(run) {
    if (rows.has(run.index)) return rows.get(run.index);
    const row = element("tr", undefined, { tabindex: "0", "data-run": run.index });
    columns.forEach(([key, , form, text], place) => {
      const cell = element("td", undefined, { "data-key": key, class: text ? "text" : "" });
      if (place === 0) {
        cell.append(dotOf(run.group));
        cell.classList.add("label");
        labelled(cell, run.group_label);
      } else cell.append(form(run[key]));
      if (key === "hardware") cell.classList.add("wide");
      if (key === "status" && run[key] !== "finished") cell.classList.add("bad");
      row.append(cell);
    });
    row.addEventListener("click", () => openRun(run, true));
    row.addEventListener("keydown", (event) => event.key === "Enter" && openRun(run, true));
    rows.set(run.index, row);
    return row;
  }

  function fillTable(chosen) {
    const sorted = [...chosen].sort(by(state.sort, state.descending));
    const some = state.all ? sorted : sorted.slice(0, ROWS);
    $("runs").tBodies[0].replaceChildren(...some.map(rowOf));
    $("all").hidden = some.length === sorted.length;
    $("all").textContent = `show all ${whole(sorted.length)} rows`;
    markSorted("runs", state.sort, state.descending);
    const finished = chosen.filter((run) => known(run.val_bpb)).length;
    $("counts").textContent = `${whole(chosen.length)} of ${whole(runs.length)} runs, `
      + `${whole(finished)} of them finished, ${counted(data.groups.length, "setting")}`;
    $("empty").hidden = chosen.length > 0;
  }

  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

  function deviation(values) {
    if (values.length < 2) return null;
    const middle = mean(values);
    return Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1));
  }

  function spread(values, form) {
    if (!values.length) return "-";
    const same = values.every((value) => value === values[0]);
    return form(mean(values)) + (same ? "" : ` ± ${form(deviation(values))}`);
  }

  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4);
  const figure = (key, form) => (group, run) => (run ? form(run[key])
    : spread(group.done.map((one) => one[key]).filter(known), form));
  // As `columns`, of a setting; without a run the cell of the setting, else of that seed.
  const groupColumns = [
    ["label", "setting", null, true],
    ["n", "seeds", (group, run) => (run ? "" : String(group.n))],
    ["val_bpb", "val_bpb", figure("val_bpb", fixed(4))],
    ["gain", "gain", (group, run) => (run || !known(group.gain) ? "" : signed(group.gain))],
    ["verdict", "verdict", null, true],
    ["gap", "packing", figure("gap", fixed(4))],
    ["artifact_bytes", "bytes", figure("artifact_bytes", whole)],
    ["bytes_planned", "planned", figure("bytes_planned", whole)],
    ["bytes_code", "code", figure("bytes_code", whole)],
    ...(runs.some((run) => run.status === "over_budget") ? [["over", "over budget", (group, run) =>
      (run ? (run.status === "over_budget" ? "yes" : "") : String(group.over))]] : []),
    ...(runs.some((run) => !known(run.val_bpb)) ? [["lost", "unfinished", (group, run) =>
      (run ? "" : String(group.lost))]] : []),
    ...(differs("steps") ? [["steps", "steps", figure("steps", whole)]] : []),
    ["train_seconds", "seconds", figure("train_seconds", whole)],
  ];

  // What the table says of every setting that the filter leaves, for its finished seeds.
  function settingsOf(chosen) {
    const base = Number($("baseline").value);
    const owned = data.groups.map(() => []);
    for (const run of chosen) owned[run.group].push(run);
    const complete = data.groups.map((_, number) => owned[number].length === counts[number]);
    return owned.flatMap((own, number) => {
      if (!own.length) return [];
      const done = own.filter((run) => known(run.val_bpb) && !run.repeated);
      const found = { number, own, done, label: data.groups[number], n: new Set(done.map((run) => run.seed)).size,
        over: done.filter((run) => run.status === "over_budget").length,
        lost: own.filter((run) => !known(run.val_bpb)).length, verdict: "", why: "" };
      for (const [key] of groupColumns) {
        if (key in found || key === "gain") continue;
        const values = done.map((run) => run[key]).filter(known);
        found[key] = values.length ? mean(values) : null;
      }
      const told = (data.verdicts[base] ?? {})[number];
      if (number === base) found.verdict = "baseline";
      else if (!done.length) found.verdict = "";
      else if (data.sets[number] !== data.sets[base]) {
        found.verdict = "not comparable";
        found.why = "scored on another text, with another tokenizer or protocol";
      } else if (!complete[number] || !complete[base]) {
        found.verdict = "filtered";
        found.why = "verdicts are of all seeds: filter settings, not seeds, to see them";
      } else if (told) Object.assign(found, { verdict: told.word, why: told.why, gain: told.gain, interval: told.interval });
      return [found];
    });
  }

  function fillGroups(groups) {
    const sorted = [...groups].sort(by(state.groupSort, state.groupDescending));
    markSorted("groups", state.groupSort, state.groupDescending);
    $("groups").tBodies[0].replaceChildren(...sorted.flatMap((group) => {
      const opened = state.opened.has(group.number);
      const seeds = opened ? [...group.own].sort(by("seed", false)) : [];
      return [groupRow(group, opened), ...seeds.map((run) => seedRow(group, run))];
    }));
    $("answer").textContent = answer(groups);
    $("legend").replaceChildren(...(groups.length > NAMED_GROUPS ? [] : groups).map(({ number, label }) =>
      hider(number, "", label)));
  }

  // The answer in a sentence: what is better than the baseline, or that nothing is.
  function answer(groups) {
    const base = groups.find((group) => group.verdict === "baseline");
    const told = groups.filter((group) => known(group.gain)).sort(by("val_bpb", false));
    if (!base || !told.length) return "";
    const better = told.filter((group) => group.verdict === "better");
    const counts = new Map();
    for (const { verdict } of told) if (verdict !== "better") counts.set(verdict, (counts.get(verdict) ?? 0) + 1);
    const rest = [...counts].map(([word, count]) => `${count} ${word === "cannot tell" ? "cannot be told from it" : word}`).join(", ");
    const first = !better.length ? `No setting is better than ${base.label}`
      : `${better[0].label} is better than ${base.label} by ${better[0].gain.toFixed(4)} bits per byte`
        + ` (95% interval ${better[0].interval.map(signed).join(" to ")})${better.length > 1 ? `; so ${better.length > 2 ? "are" : "is"} ${better.slice(1, 4).map(({ label }) => label).join(", ")}${better.length > 4 ? ` and ${better.length - 4} more` : ""}` : ""}`;
    return `${first}${rest ? `; ${rest}` : ""}.`;
  }

  function hider(number, kind, label) {
    const name = `show ${data.groups[number]}`;
    const button = element("button", undefined, { type: "button", class: kind, "data-hide": number, title: name,
      "aria-label": name, "aria-pressed": String(!state.hidden.has(number)) });
    button.append(dotOf(number), label);
    button.addEventListener("click", () => {
      if (!state.hidden.delete(number)) state.hidden.add(number);
      update();
    });
    return button;
  }

  function groupRow(group, opened) {
    const row = element("tr", undefined, { "data-group": group.number });
    for (const [key, , form, text] of groupColumns) {
      const cell = element("td", undefined, { "data-key": key, class: text ? "text" : "" });
      if (key === "label") {
        const toggle = element("button", opened ? "▾" : "▸", { type: "button", class: "toggle",
          "aria-expanded": String(opened), "aria-label": `seeds of ${group.label}` });
        toggle.addEventListener("click", () => {
          if (!state.opened.delete(group.number)) state.opened.add(group.number);
          update();
        });
        cell.classList.add("label");
        cell.append(toggle, hider(group.number, "hide", ""));
        labelled(cell, group.label);
      } else if (key === "verdict") {
        const kind = { better: "better", worse: "worse", baseline: "baseline" }[group.verdict] ?? "none";
        if (group.verdict) cell.append(element("span", group.verdict, { class: `verdict ${kind}`, title: group.why }));
      } else cell.append(form(group, null));
      if (key === "gain" && group.interval) {
        cell.title = `95% interval ${group.interval.map(signed).join(" to ")}`;
      }
      row.append(cell);
    }
    return row;
  }

  function seedRow(group, run) {
    const row = element("tr", undefined, { class: "seed", tabindex: "0", "data-seed": run.index });
    for (const [key, , form, text] of groupColumns) {
      const words = key === "label" ? `seed ${run.seed}${run.repeated ? ", repeated: does not count" : ""}`
        : key === "verdict" ? (run.status === "finished" ? "" : run.status) : form(group, run);
      row.append(element("td", words, { "data-key": key, class: key === "label" ? "text label" : text ? "text" : "" }));
    }
    row.addEventListener("click", () => openRun(run, true));
    row.addEventListener("keydown", (event) => event.key === "Enter" && openRun(run, true));
    return row;
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
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ticksuffix: " ", ...layout.yaxis },
    }, { responsive: true, displayModeBar: false });
  }

  const title = (text) => ({ title: { text, standoff: 8 } });

  function front(points) {
    const best = [];
    for (const point of [...points].sort((a, b) => a.artifact_bytes - b.artifact_bytes || a.val_bpb - b.val_bpb)) {
      if (!best.length || point.val_bpb < best[best.length - 1].val_bpb) best.push(point);
    }
    return best;
  }

  // Seeds faint, means full, and for every set of settings that compare the best means joined.
  function drawPareto(groups) {
    const done = groups.filter((group) => group.done.length && !state.hidden.has(group.number));
    const seeds = done.flatMap((group) => group.done);
    const dots = (name, some, number, text, marker) => ({
      type: "scatter", mode: "markers", name, x: some.map((one) => one.artifact_bytes), y: some.map((one) => one.val_bpb),
      customdata: some.map((one) => one.index ?? null), text: some.map(text),
      hovertemplate: "%{text}<br>%{y:.4f} bpb, %{x:,.0f} bytes<extra></extra>",
      marker: { color: some.map((one) => colour(number(one))), symbol: some.map((one) => symbol(number(one))), ...marker },
    });
    const traces = [
      dots("seeds", seeds, (run) => run.group, (run) => `${run.group_label}<br>seed ${run.seed}, ${whole(run.steps)} steps`,
        { size: 6, opacity: 0.45 }),
      dots("means", done, (group) => group.number, (group) => `${group.label}<br>mean of ${counted(group.n, "seed")}`, { size: 11 }),
    ];
    const sets = [...new Set(done.map((group) => data.sets[group.number]))];
    for (const set of sets) {
      const best = front(done.filter((group) => data.sets[group.number] === set));
      traces.push({
        type: "scatter", mode: "lines", name: "best of each size", hoverinfo: "skip",
        x: best.map((group) => group.artifact_bytes), y: best.map((group) => group.val_bpb),
        line: { color: "#888888", width: 1, dash: "dot" },
      });
    }
    $("pareto-note").textContent = !done.length ? "no finished run"
      : `means; faint: seeds; dotted: best of each size${sets.length > 1 ? ", a line per text and protocol" : ""}`;
    const largest = Math.max(...seeds.map((run) => run.artifact_bytes));
    const budgets = [...new Set(seeds.map((run) => run.budget_bytes))].filter((budget) => known(budget) && budget < 1.15 * largest);
    draw("pareto", traces, {
      shapes: budgets.map((budget) => ({
        type: "line", x0: budget, x1: budget, y0: 0, y1: 1, yref: "paper", line: { color: "#d0453e", width: 1, dash: "dash" },
      })),
      annotations: budgets.map((budget) => ({
        x: budget, y: 1, yref: "paper", xanchor: "right", yanchor: "top", showarrow: false, text: `budget ${whole(budget)}`,
        font: { color: getComputedStyle(document.documentElement).getPropertyValue("--bad").trim() },
      })),
      xaxis: { ...title("artifact bytes, code included"), tickformat: ",.4~s" }, yaxis: title("val_bpb"),
    });
  }

  // An average that forgets: each value weighs `weight` times the one after it.
  function smoothed(values, weight) {
    let [sum, total] = [0, 0];
    return values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + value;
      total = weight * total + 1;
      return sum / total;
    });
  }

  // Mean and deviation over the seeds that were measured at a step.
  function meanCurve(curves, axis) {
    const places = new Map();
    for (const curve of curves) {
      curve.step.forEach((step, place) => {
        if (!places.has(step)) places.set(step, { x: [], y: [] });
        if (!known(curve.y[place])) return;
        places.get(step).x.push(curve[axis][place]);
        places.get(step).y.push(curve.y[place]);
      });
    }
    const points = [...places].sort((a, b) => a[0] - b[0]).map(([, point]) => point).filter(({ y }) => y.length);
    return { x: points.map(({ x }) => mean(x)), y: points.map(({ y }) => mean(y)), off: points.map(({ y }) => deviation(y) ?? 0) };
  }

  // Of every setting one line, its mean with a band over the seeds, or a line for every seed.
  // `measured` gives what is known of a run: { step, …, y }.
  function linesOf(groups, measured, axis, dashed = () => false) {
    const having = groups.filter((group) => !state.hidden.has(group.number)).map((group) => ({ ...group,
      own: group.own.filter((run) => !run.repeated).map((run) => ({ run, curve: measured(run) })).filter(({ curve }) => curve?.y.length) }))
      .filter((group) => group.own.length);
    const units = $("lines").value === "mean"
      ? having.map(({ label, number, own }) => ({ name: `${label}, mean of ${own.length}`, number, run: own[0].run,
        seeds: own.length, curve: meanCurve(own.map(({ curve }) => curve), axis) }))
      : having.flatMap(({ label, number, own }) => own.map(({ run, curve }) => ({ name: `${label}, seed ${run.seed}`, number, run,
        seeds: 1, curve: { x: curve[axis], y: curve.y } })));
    const traces = units.slice(0, CURVES).flatMap(({ name, number, run, seeds, curve: { x, y, off } }) => [
      ...(seeds > 1 ? [{
        type: "scatter", mode: "lines", name: "deviation", hoverinfo: "skip", line: { width: 0 }, fill: "toself",
        fillcolor: `${colour(number)}30`, x: [...x, ...[...x].reverse()],
        y: [...y.map((value, i) => value - off[i]), ...y.map((value, i) => value + off[i]).reverse()],
      }] : []),
      {
        type: "scatter", mode: y.length < 30 ? "lines+markers" : "lines", name, x, y,
        text: name, hovertemplate: "%{text}<br>%{y:.4f} at %{x:,}<extra></extra>",
        line: { color: colour(number), width: 1.8, dash: dashed(run) ? "dash" : "solid" }, marker: { size: 4 },
      },
    ]);
    const left = units.length - CURVES;
    const note = !units.length ? "nothing measured" : left > 0 ? `${CURVES} of ${whole(units.length)}: filter to see others`
      : units.some(({ seeds }) => seeds > 1) ? "means; bands: ± deviation over seeds" : "a line per seed";
    return [traces, note];
  }

  function drawCurves(groups) {
    const [key, axis, weight] = [$("curve").value, $("axis").value, Number($("smooth").value)];
    const [traces, note] = linesOf(groups, (run) => run.curves[key] && { ...run.curves[key], y: smoothed(run.curves[key].y, weight) }, axis);
    $("curves-note").textContent = note;
    const names = { step: "steps", tokens: "tokens", seconds: "training seconds" };
    draw("curves", traces, {
      xaxis: title(names[axis]), yaxis: { ...title(key), type: $("log").checked ? "log" : "linear" },
    });
  }

  function drawPasses(groups) {
    const ofText = (run) => Object.keys(run.by_passes).length > 0;
    const measured = (run) => {
      const points = Object.entries(ofText(run) ? run.by_passes : run.sampled_passes).sort((a, b) => a[0] - b[0]);
      return { step: points.map(([passes]) => Number(passes)), y: points.map(([, bpb]) => bpb) };
    };
    const [traces, note] = linesOf(groups, measured, "step", (run) => !ofText(run));
    $("passes-figure").hidden = !traces.length;
    if (!traces.length) return;
    $("passes-note").textContent = note + (traces.some(({ line }) => line.dash === "dash") ? "; dashed: first windows" : "");
    draw("passes", traces, { xaxis: { ...title("passes"), dtick: 1 }, yaxis: title("bits per byte") });
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
    drawVisits(run); // makes the columns that the plot of bytes stands among
    drawBytes(run);
    remember();
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
    const groups = settingsOf(chosen);
    fillTable(chosen);
    fillGroups(groups);
    drawPareto(groups);
    drawCurves(groups);
    drawPasses(groups);
    remember();
  }

  // ---- the state, in the address: a link shows what one saw

  const fields = ["filter", "curve", "axis", "lines", "smooth", "baseline"];
  const initial = {};
  const asList = (set) => [...set].map((number) => data.groups[number]).sort();

  function stateNow() {
    const told = Object.fromEntries(fields.map((id) => [id, $(id).value]));
    told.baseline = data.groups[told.baseline] ?? "";
    return { ...told, log: $("log").checked ? "1" : "", sort: state.sort, down: state.descending ? "1" : "",
      order: state.groupSort, orderdown: state.groupDescending ? "1" : "", hidden: asList(state.hidden),
      opened: asList(state.opened), run: state.open === null ? "" : runs[state.open].folder };
  }

  function remember() {
    const changed = new URLSearchParams();
    for (const [key, value] of Object.entries(stateNow())) {
      if (Array.isArray(value)) value.forEach((one) => changed.append(key, one));
      else if (value !== initial[key]) changed.set(key, value);
    }
    const address = `#${changed}`;
    if (address !== (location.hash || "#")) history.replaceState(null, "", address);
  }

  function recall() {
    const told = new URLSearchParams(location.hash.slice(1));
    const value = (key) => told.get(key) ?? initial[key];
    for (const id of fields) $(id).value = id === "baseline" ? data.groups.indexOf(value(id)) : value(id);
    $("log").checked = value("log") === "1";
    const numbers = (key) => new Set(told.getAll(key).map((label) => data.groups.indexOf(label)).filter((n) => n >= 0));
    Object.assign(state, { filter: value("filter"), sort: value("sort"), descending: value("down") === "1",
      groupSort: value("order"), groupDescending: value("orderdown") === "1", hidden: numbers("hidden"), opened: numbers("opened") });
    const run = runs.find((one) => one.folder === told.get("run"));
    if (run) openRun(run, false);
    update();
  }

  // ---- CSV of the runs that are shown

  function download() {
    const settings = Object.keys(runs[0].settings);
    const figures = ["name", "seed", "status", "repeated", "val_bpb", "pre_quant_val_bpb", "gap", "artifact_bytes", "bytes_planned",
      "bytes_model", "bytes_code", "budget_bytes", "params", "steps", "tokens", "train_seconds", "hardware", "protocol", "text", "folder"];
    const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
    const line = (values) => values.map((value) => quoted(String(value ?? ""))).join(",");
    const sorted = shown().sort(by(state.sort, state.descending));
    const text = [line(["setting", ...settings, ...figures]), ...sorted.map((run) =>
      line([run.group_label, ...settings.map((key) => run.settings[key]), ...figures.map((key) => run[key])]))].join("\n");
    const link = element("a", undefined, { download: "runs.csv", href: URL.createObjectURL(new Blob([`${text}\n`], { type: "text/csv" })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
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
  for (const id of ["curve", "axis", "lines", "smooth", "log", "baseline"]) $(id).addEventListener("change", update);
  $("clear").addEventListener("click", () => {
    state.filter = $("filter").value = "";
    update();
  });
  $("csv").addEventListener("click", download);
  $("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    redraw();
  });
  data.groups.forEach((label, number) => {
    if (number in data.verdicts) $("baseline").append(element("option", label, { value: number }));
  });
  if (known(data.baseline)) $("baseline").value = data.baseline;
  $("rules").textContent = `Verdicts are those of recurgolf compare (${data.rules}).`;
  const machines = [...new Set(runs.filter((run) => known(run.val_bpb)).map((run) => run.hardware))];
  $("measured").textContent = machines.length === 1 ? `Measured on ${machines[0]}.`
    : machines.length ? `Measured on ${machines.length} kinds of hardware: ${machines.slice(0, 3).join("; ")}` : "";
  const counts = data.groups.map(() => 0);
  for (const run of runs) counts[run.group] += 1;
  buildHead("runs", columns, "sort", "descending");
  buildHead("groups", groupColumns, "groupSort", "groupDescending");
  Object.assign(initial, stateNow());
  recall();
  window.addEventListener("hashchange", recall);
  if (data.reload_seconds) setTimeout(() => location.reload(), data.reload_seconds * 1000);
  fillDifference();
  $("pareto").on("plotly_click", (event) => {
    const index = event.points[0].customdata;
    if (known(index)) openRun(runs[index], true);
  });
  performance.mark("board-ready");
  document.body.dataset.ready = "yes";
})();
