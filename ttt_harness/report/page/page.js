"use strict";
// Draws the charts and the questions of a report from the JSON in #data.
// Whatever comes from a run reaches the page by textContent or setAttribute only, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { labels, seeds, tasks, strings, questions } = data;
  const total = questions.id.length;
  const methods = Object.keys(data.rows).map(Number).filter((m) => m > 0 && data.rows[m].length);
  const state = {
    method: methods[0] ?? 0, outcome: "", task: "", seed: "", words: [], key: "", down: false,
    list: [], active: 0, order: "gain",
  };
  // with nothing to compare, the only run's right and wrong answers are shown
  const alone = () => state.method === 0;

  const byId = (id) => document.getElementById(id);

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    return fill(node, attributes, children);
  }
  function svg(tag, attributes = {}, ...children) {
    return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  }
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "onclick") node.addEventListener("click", value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  // --- text -------------------------------------------------------------------------------------------------------

  const round = (value, digits) => (value < 0 && Number(value.toFixed(digits)) !== 0 ? "−" : "") + Math.abs(value).toFixed(digits);
  const score = (value, share) => (value === null ? "–" : share ? `${round(100 * value, 1)} %` : String(Number(value.toPrecision(4))));
  function signed(value, share) {
    if (value === null) return "–";
    const text = share ? round(100 * value, 1) : String(Number(value.toPrecision(3))).replace("-", "−");
    return value > 0 && !/^[0.]+$/.test(text) ? `+${text}` : text;
  }
  const chance = (p) => (p === null ? "–" : p < 0.001 ? "<0.001" : p.toFixed(p < 0.1 ? 3 : 2));
  const count = (n) => n.toLocaleString("en");

  // control characters, bidirectional marks and the like would hide or reorder what was answered
  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g;
  const code = (character) => `U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  function putText(node, text) {
    node.replaceChildren();
    let from = 0;
    for (const match of text.matchAll(UNSEEN)) {
      node.append(text.slice(from, match.index), make("span", { class: "mark" }, code(match[0])));
      from = match.index + match[0].length;
    }
    node.append(text.slice(from));
    return node;
  }
  const oneLine = (text) => text.slice(0, 400).replace(/\s+/g, " ").trim().replace(UNSEEN, (c) => `[${code(c)}]`);
  const preview = (i) => oneLine(strings[questions.text[i]].replace(/^\s*Q: ?/, "").replace(/\s*\nA:\s*$/, ""));

  // a long task name breaks after an underscore
  const breakable = (name) => name.split(/(?<=_)/).flatMap((part) => [part, make("wbr")]);

  // --- what became of a question ------------------------------------------------------------------------------------

  const answerOf = (m, i) => questions.methods[m].answer[i];
  const scoreOf = (m, i) => questions.methods[m].score[i];
  const better = (() => {
    const up = new Map();
    for (const rows of Object.values(data.rows)) for (const row of rows) up.set(row.name, row.up);
    return questions.task.map((t) => (up.get(tasks[t].name) === false ? -1 : 1));
  })();
  function outcome(i, m = state.method) {
    const now = scoreOf(m, i);
    if (m === 0) return answerOf(0, i) === null ? "absent" : now === null ? "same" : now > 0 ? "right" : "wrong";
    const before = scoreOf(0, i);
    if (answerOf(0, i) === null || answerOf(m, i) === null) return "absent";
    if (before !== null && now !== null && before !== now) return (now - before) * better[i] > 0 ? "won" : "lost";
    return answerOf(0, i) === answerOf(m, i) ? "same" : "changed";
  }
  const BADGES = {
    won: "▲ won", lost: "▼ lost", changed: "≠ other", same: "= same", right: "✓ right", wrong: "✗ wrong", absent: "– none",
  };
  const verdict = (m, i) => {
    const value = scoreOf(m, i);
    return value === null ? "" : value === 1 ? "✓" : value === 0 ? "✗" : String(Number(value.toPrecision(3)));
  };
  const verdictClass = (m, i) => ({ "✓": "right", "✗": "wrong" })[verdict(m, i)] ?? "";

  // --- tasks --------------------------------------------------------------------------------------------------------

  const sure = (row) => {
    if (!row.diff || row.diff[1] === null || row.seeds > 1) return ""; // a standard deviation is no test
    return row.diff[1] > 0 ? (row.up ? "gain" : "loss") : row.diff[2] < 0 ? (row.up ? "loss" : "gain") : "";
  };

  function drawTasks() {
    const rows = [...(data.rows[state.method] ?? [])];
    const single = rows.filter((row) => row.level === "task");
    const gain = (row) => (row.diff ? row.diff[0] * (row.up ? 1 : -1) : 0);
    const value = (row) => (row.other ?? row.base)[0];
    const orders = {
      gain: (a, b) => gain(b) - gain(a), score: (a, b) => value(b) - value(a), name: (a, b) => (a.short < b.short ? -1 : 1),
    };
    single.sort(orders[state.order]);
    const means = rows.filter((row) => row.level !== "task");
    const span = rows.flatMap((row) => (row.diff ?? []).filter((v) => v !== null)).map(Math.abs);
    const reach = Math.max(...span, 1e-9);
    const share = rows.every((row) => row.share);
    const ends = rows.flatMap((row) => [...row.base, ...(row.other ?? [])]).filter((v) => v !== null);
    const domain = share ? [0, 1] : [Math.min(0, ...ends), Math.max(...ends, 1e-9)];
    const list = byId("task-list");
    list.replaceChildren(axisRow(domain, reach, share), ...[...means, ...single].map((row) => taskRow(row, domain, reach)));
    const published = rows.some((row) => row.pub[0] !== null || row.pub[1] !== null);
    byId("task-legend").replaceChildren(
      make("span", { class: "key k-base" }), labels[0],
      ...(alone() ? [] : [make("span", { class: "key k-other" }), labels[state.method]]),
      ...(published ? [make("span", { class: "key k-pub" }), "published"] : []),
    );
  }

  const percent = (value, [low, high]) => `${((100 * (value - low)) / (high - low)).toFixed(2)}%`;

  function axisRow(domain, reach, share) {
    const bars = svg("svg", { class: "axis bars" });
    for (const part of [0, 0.25, 0.5, 0.75, 1]) {
      const value = domain[0] + part * (domain[1] - domain[0]);
      const anchor = part === 0 ? "start" : part === 1 ? "end" : "middle";
      bars.append(svg("text", { x: `${100 * part}%`, y: 20, "text-anchor": anchor }, share ? String(Math.round(100 * value)) : String(Number(value.toPrecision(2)))));
    }
    const forest = svg("svg", { class: "axis forest" });
    if (!alone()) {
      for (const [at, anchor, value] of [["0%", "start", -reach], ["50%", "middle", 0], ["100%", "end", reach]]) {
        forest.append(svg("text", { x: at, y: 20, "text-anchor": anchor }, signed(value, share)));
      }
    }
    const many = (data.rows[state.method] ?? []).some((row) => row.seeds > 1);
    return make("li", { class: "task head", "aria-hidden": true },
      make("span", { class: "name" }, "task"), bars, forest,
      make("span", { class: "change" }, alone() ? "score" : many ? "difference ± sd" : "difference, 95 % interval"),
      make("span", { class: "p" }, alone() ? "" : "p"), make("span", { class: "wl" }, alone() ? "n" : "won–lost"));
  }

  function taskRow(row, domain, reach) {
    const bars = svg("svg", { class: "bars", "aria-hidden": true });
    for (const at of [0.25, 0.5, 0.75]) bars.append(svg("line", { class: "gridline", x1: `${100 * at}%`, x2: `${100 * at}%`, y1: 0, y2: 30 }));
    const zero = Math.max(0, domain[0]);
    [[row.base, "b-base", row.pub[0]], [row.other, "b-other", row.pub[1]]].forEach(([values, name, published], place) => {
      if (!values) return;
      const y = row.other ? 4 + 12 * place : 9;
      const [low, high] = [Math.min(zero, values[0]), Math.max(zero, values[0])];
      const width = `${((100 * (high - low)) / (domain[1] - domain[0])).toFixed(2)}%`;
      bars.append(svg("rect", { class: name, x: percent(low, domain), y, width, height: 10, rx: 2 }));
      if (values[1] !== null) {
        const [left, right] = [1, 2].map((end) => percent(Math.min(domain[1], Math.max(domain[0], values[end])), domain));
        bars.append(svg("line", { class: "whisker", x1: left, x2: right, y1: y + 5, y2: y + 5 }));
      }
      if (published !== null) {
        const x = percent(published, domain);
        bars.append(svg("line", { class: "published", x1: x, x2: x, y1: y - 1, y2: y + 11 }));
      }
    });
    const forest = svg("svg", { class: "forest", "aria-hidden": true });
    if (row.diff) {
      const around = [-reach, reach];
      forest.append(svg("line", { class: "zero", x1: "50%", x2: "50%", y1: 0, y2: 30 }));
      if (row.diff[1] !== null) forest.append(svg("line", { class: "d-line", x1: percent(row.diff[1], around), x2: percent(row.diff[2], around), y1: 15, y2: 15 }));
      forest.append(svg("circle", { class: "d-dot", cx: percent(row.diff[0], around), cy: 15, r: 4 }));
    }
    const label = `${row.name}: ${labels[0]} ${score(row.base[0], row.share)}` + (row.diff
      ? `, ${labels[state.method]} ${score(row.other[0], row.share)}, difference ${signed(row.diff[0], row.share)}` +
        (row.diff[1] === null ? "" : `, from ${signed(row.diff[1], row.share)} to ${signed(row.diff[2], row.share)}`) +
        (row.p === null ? "" : `, p ${chance(row.p)}`)
      : "");
    const t = tasks.findIndex((task) => task.name === row.name);
    const title = row.level === "task" && questions.task.includes(t)
      ? make("button", { type: "button", class: "name", "aria-label": `${label}. Show its questions`, title: row.name, onclick: () => showTask(t) }, ...breakable(row.short))
      : make("span", { class: "name", title: row.name }, ...breakable(row.short), make("span", { class: "hidden" }, label));
    const star = row.holm !== null && row.holm < 0.05 ? "*" : "";
    const interval = !row.diff || row.diff[1] === null ? "" : row.seeds > 1
      ? ` ± ${signed(row.diff[2] - row.diff[0], row.share).replace("+", "")}`
      : ` [${signed(row.diff[1], row.share)}, ${signed(row.diff[2], row.share)}]`;
    const change = row.diff
      ? make("span", { class: "change" }, make("span", { class: sure(row) }, signed(row.diff[0], row.share)), make("span", { class: "ci" }, interval))
      : make("span", { class: "change" }, score(row.base[0], row.share));
    const counts = row.diff ? (row.won === null ? "" : `${row.won}–${row.lost}`) : row.n === null ? "" : count(row.n);
    return make("li", { class: `task ${row.level === "task" ? "" : "mean"} ${sure(row)}` }, title, bars, forest, change,
      make("span", { class: "p" }, row.diff ? chance(row.p) + star : ""), make("span", { class: "wl" }, counts));
  }

  function showTask(t) {
    state.task = String(t);
    byId("task-filter").value = state.task;
    refresh();
    byId("questions").scrollIntoView();
    byId("rows").focus({ preventScroll: true });
  }

  // --- training -----------------------------------------------------------------------------------------------------

  function drawLosses() {
    const list = byId("losses");
    if (!list) return;
    const m = data.losses[state.method] ? state.method : Number(Object.keys(data.losses)[0]);
    const fits = data.losses[m];
    const top = Math.max(...Object.values(fits).flat(2));
    byId("loss-about").textContent = `Loss per optimizer step of ${labels[m]}, from 0 to ${top.toFixed(2)} in all charts.`;
    list.replaceChildren(...Object.entries(fits).map(([t, curves]) => {
      const picture = svg("svg", { viewBox: "0 0 100 46", preserveAspectRatio: "none", "aria-hidden": true },
        svg("line", { x1: 0, x2: 100, y1: 45.5, y2: 45.5 }));
      for (const curve of curves) {
        const points = curve.map((loss, i) => `${((100 * i) / (curve.length - 1)).toFixed(2)},${(45 - (44 * loss) / top).toFixed(2)}`);
        picture.append(svg("polyline", { points: points.join(" ") }));
      }
      const first = curves[0];
      const ends = `${first[0].toFixed(2)} → ${first[first.length - 1].toFixed(2)}`;
      return make("li", {}, make("span", { class: "name", title: tasks[t].name }, tasks[t].short),
        make("span", { class: "ends" }, `${ends}, ${first.length} steps`), picture);
    }));
  }

  // --- questions ----------------------------------------------------------------------------------------------------

  const body = byId("rows");
  const spacer = make("div", { class: "spacer", role: "presentation" });
  const columns = () => [
    ["", "outcome"], ["task", "task"], ["text", "question"], ["target", "target"], ["base", labels[0]],
    ...(alone() ? [] : [["other", labels[state.method]]]),
  ];
  const RANK = ["won", "lost", "changed", "right", "wrong", "same", "absent"];

  let haystacks = null; // built at the first search: lower-case text of each question
  function haystack(i) {
    haystacks ??= new Array(total);
    haystacks[i] ??= [
      tasks[questions.task[i]].name, strings[questions.text[i]], strings[questions.target[i]],
      ...questions.methods.map((m) => (m.answer[i] === null ? "" : strings[m.answer[i]])),
    ].join("\n").toLowerCase();
    return haystacks[i];
  }

  const SHOWN = { "": (o) => o === "won" || o === "lost", won: (o) => o === "won", lost: (o) => o === "lost",
    answer: (o) => o === "won" || o === "lost" || o === "changed", right: (o) => o === "right", wrong: (o) => o === "wrong",
    all: () => true };

  function matching() {
    const found = [];
    const counts = {};
    for (let i = 0; i < total; i++) {
      if (state.task !== "" && questions.task[i] !== Number(state.task)) continue;
      if (state.seed !== "" && questions.seed[i] !== Number(state.seed)) continue;
      const became = outcome(i);
      if (became === "absent") continue;
      if (state.words.length && !state.words.every((word) => haystack(i).includes(word))) continue;
      for (const [name, shown] of Object.entries(SHOWN)) if (shown(became)) counts[name] = (counts[name] ?? 0) + 1;
      if (SHOWN[state.outcome](became)) found.push(i);
    }
    return [found, counts];
  }

  function sortKey(i) {
    switch (state.key) {
      case "outcome": return RANK.indexOf(outcome(i));
      case "task": return tasks[questions.task[i]].short;
      case "text": return preview(i);
      case "target": return strings[questions.target[i]];
      case "base": return strings[answerOf(0, i)] ?? "";
      default: return strings[answerOf(state.method, i)] ?? "";
    }
  }

  function refresh() {
    if (!body) return;
    const [found, counts] = matching();
    if (state.key) {
      const keys = new Map(found.map((i) => [i, sortKey(i)]));
      const sign = state.down ? -1 : 1;
      found.sort((a, b) => (keys.get(a) < keys.get(b) ? -sign : keys.get(a) > keys.get(b) ? sign : a - b));
    }
    state.list = found;
    state.active = 0;
    for (const node of document.querySelectorAll("#outcomes .n")) node.textContent = count(counts[node.dataset.of] ?? 0);
    byId("shown").textContent = found.length === 1 ? "1 question" : `${count(found.length)} questions`;
    body.scrollTop = 0;
    spacer.style.height = `${found.length * rowHeight()}px`;
    drawHead();
    drawRows();
  }

  let knownHeight = 0;
  const rowHeight = () => (knownHeight ||= parseFloat(getComputedStyle(body).getPropertyValue("--row")) || 44);

  function drawHead() {
    byId("grid-head").replaceChildren(...columns().map(([key, name]) => {
      const sortable = key || "outcome";
      const on = state.key === sortable;
      const arrow = on ? (state.down ? " ↓" : " ↑") : "";
      return make("button", { type: "button", "data-key": sortable, "aria-pressed": on ? "true" : "false", title: `Sort by ${name}`,
        "aria-label": `Sort by ${name}${on ? (state.down ? ", descending" : ", ascending") : ""}`,
        onclick: () => sortBy(sortable) }, name + arrow);
    }));
  }

  function sortBy(key) {
    // ascending, descending, and back to the order in which the questions were asked
    if (state.key !== key) [state.key, state.down] = [key, false];
    else if (!state.down) state.down = true;
    else state.key = "";
    refresh();
    document.querySelector(`#grid-head [data-key="${key}"]`).focus();
  }

  function drawRows() {
    const height = rowHeight();
    const from = Math.max(0, Math.floor(body.scrollTop / height) - 6);
    const to = Math.min(state.list.length, Math.ceil((body.scrollTop + body.clientHeight) / height) + 6);
    const nodes = [];
    for (let place = from; place < to; place++) nodes.push(rowNode(place, height));
    if (!state.list.length) nodes.push(make("p", { class: "none" }, "No question matches."));
    spacer.replaceChildren(...nodes);
    if (state.list.length) body.setAttribute("aria-activedescendant", `row-${state.active}`);
    else body.removeAttribute("aria-activedescendant");
  }

  function rowNode(place, height) {
    const i = state.list[place];
    const became = outcome(i);
    const cell = (name, text, of) => make("span", { class: of === undefined ? name : `${name} ${verdictClass(of, i)}` }, text);
    const answer = (m) => cell("answer", answerOf(m, i) === null ? "–" : `${verdict(m, i)} ${oneLine(strings[answerOf(m, i)]) || "(empty)"}`, m);
    const kind = became === "right" ? "won" : became === "wrong" ? "lost" : became;
    return make("div", {
      class: `row${place === state.active ? " active" : ""}`, id: `row-${place}`, role: "option",
      "aria-selected": place === state.active ? "true" : "false", "aria-setsize": state.list.length, "aria-posinset": place + 1,
      style: `transform: translateY(${place * height}px)`,
      onclick: () => { state.active = place; drawRows(); openDetail(); },
    },
      make("span", {}, make("span", { class: `badge ${kind}` }, BADGES[became])),
      cell("task-name", tasks[questions.task[i]].short + (seeds.length > 1 ? ` · ${seeds[questions.seed[i]]}` : "")),
      cell("question", preview(i)), cell("target", oneLine(strings[questions.target[i]])),
      answer(0), alone() ? null : answer(state.method));
  }

  function move(to) {
    if (!state.list.length) return;
    state.active = Math.min(state.list.length - 1, Math.max(0, to));
    const height = rowHeight();
    const top = state.active * height;
    if (top < body.scrollTop) body.scrollTop = top;
    else if (top + height > body.scrollTop + body.clientHeight) body.scrollTop = top + height - body.clientHeight;
    drawRows();
  }

  function keys(event) {
    const page = Math.max(1, Math.floor(body.clientHeight / rowHeight()) - 1);
    const to = { ArrowDown: state.active + 1, ArrowUp: state.active - 1, PageDown: state.active + page, PageUp: state.active - page,
      Home: 0, End: state.list.length - 1 }[event.key];
    if (to !== undefined) move(to);
    else if (event.key === "Enter" || event.key === " ") openDetail();
    else return;
    event.preventDefault();
  }

  // --- one question -------------------------------------------------------------------------------------------------

  const dialog = byId("detail");

  function openDetail() {
    if (!state.list.length) return;
    drawDetail();
    if (!dialog.open) dialog.showModal();
    byId("detail-title").focus();
  }

  const block = (text, long) => putText(make("div", { class: long ? "text long" : "text", dir: "auto", tabindex: long ? "0" : null }), text);

  function drawDetail() {
    const i = state.list[state.active];
    const [t, s] = [questions.task[i], questions.seed[i]];
    byId("detail-where").textContent = `${state.active + 1} of ${count(state.list.length)} · ${tasks[t].name}` +
      (seeds.length > 1 ? ` · seed ${seeds[s]}` : "");
    byId("detail-title").textContent = `Question ${questions.id[i]}`;
    const answers = make("div", { class: "answers" });
    labels.forEach((label, m) => {
      if (answerOf(m, i) === null) return;
      const raw = questions.methods[m].raw[i];
      const [mark, value] = [verdict(m, i), scoreOf(m, i)];
      const word = value === 1 ? "right" : value === 0 ? "wrong" : value === null ? "" : "scored";
      const badge = m === 0 ? null : make("span", { class: `badge ${outcome(i, m)}` }, BADGES[outcome(i, m)]);
      answers.append(make("div", {},
        make("div", { class: "who" }, make("strong", {}, label), make("span", { class: verdictClass(m, i) }, `${mark} ${word} `, badge)),
        block(strings[answerOf(m, i)] || "(empty)"),
        raw === null ? null : make("details", {}, make("summary", {}, "before the filter"), block(strings[raw], true))));
    });
    const starts = data.prefixes[`${s},${t}`] ?? [];
    const shown = new Map(); // prompt -> the methods that were shown it
    labels.forEach((label, m) => {
      if (answerOf(m, i) === null || !(starts[m] >= 0)) return;
      const key = `${starts[m]},${questions.texts[m][i] ?? questions.text[i]}`;
      shown.set(key, [...(shown.get(key) ?? []), label]);
    });
    const prompts = [...shown].map(([key, of]) => {
      const [start, text] = key.split(",").map((number) => strings[Number(number)]);
      return make("details", {}, make("summary", {}, shown.size > 1 ? `Whole prompt of ${of.join(", ")}` : "Whole prompt: instruction, demonstrations, question"), block(start + text, true));
    });
    byId("detail-body").replaceChildren(
      make("h3", {}, "Question"), block(strings[questions.text[i]], true),
      make("h3", {}, "Target"), block(strings[questions.target[i]]),
      make("h3", {}, "Answers"), answers, ...prompts);
    byId("previous").disabled = state.active === 0;
    byId("next").disabled = state.active === state.list.length - 1;
    dialog.scrollTop = 0;
  }

  function step(by) {
    const to = state.active + by;
    if (to < 0 || to >= state.list.length) return;
    move(to);
    drawDetail();
  }

  // --- controls -----------------------------------------------------------------------------------------------------

  function drawOutcomes() {
    const choices = alone()
      ? [["all", "All"], ["right", "Right"], ["wrong", "Wrong"]]
      : [["", "Changed"], ["won", "Won"], ["lost", "Lost"], ["answer", "Any other answer"], ["all", "All"]];
    state.outcome = choices[0][0];
    const field = byId("outcomes");
    for (const node of field.querySelectorAll("label")) node.remove();
    for (const [value, name] of choices) {
      const input = make("input", { type: "radio", name: "outcome", value, checked: value === state.outcome });
      input.addEventListener("change", () => { state.outcome = value; refresh(); });
      const counter = make("span", { class: "n" });
      counter.dataset.of = value;
      field.append(make("label", {}, input, name, " ", counter));
    }
  }

  function theme() {
    const names = ["auto", "light", "dark"];
    const button = byId("theme");
    const system = matchMedia("(prefers-color-scheme: dark)");
    let chosen = "auto";
    try { chosen = localStorage.getItem("ttt-harness-theme") ?? "auto"; } catch { /* files may have no storage */ }
    if (!names.includes(chosen)) chosen = "auto";
    const apply = () => {
      document.documentElement.dataset.theme = chosen === "auto" ? (system.matches ? "dark" : "light") : chosen;
      button.querySelector("span").textContent = chosen;
      button.setAttribute("aria-label", `Colours: ${chosen === "auto" ? "as the system" : chosen}`);
    };
    button.addEventListener("click", () => {
      chosen = names[(names.indexOf(chosen) + 1) % names.length];
      try { localStorage.setItem("ttt-harness-theme", chosen); } catch { /* the choice then lasts as long as the page */ }
      apply();
    });
    system.addEventListener("change", apply);
    apply();
  }

  function start() {
    theme();
    if (methods.length > 1) {
      const picker = byId("method");
      for (const m of methods) picker.append(make("option", { value: m }, labels[m]));
      byId("pick-method").hidden = false;
      picker.addEventListener("change", () => { state.method = Number(picker.value); drawTasks(); drawLosses(); refresh(); });
    }
    if (alone()) byId("task-order").querySelector('[value="gain"]').remove();
    if (alone()) state.order = "score";
    byId("task-order").addEventListener("change", (event) => { state.order = event.target.value; drawTasks(); });
    drawTasks();
    drawLosses();
    if (!body) return;
    body.append(spacer);
    body.style.setProperty("--total", Math.max(4, total));
    drawOutcomes();
    const used = new Set(questions.task);
    tasks.forEach((task, t) => { if (used.has(t)) byId("task-filter").append(make("option", { value: t }, task.short)); });
    byId("task-filter").addEventListener("change", (event) => { state.task = event.target.value; refresh(); });
    if (seeds.length > 1) {
      seeds.forEach((seed, s) => byId("seed-filter").append(make("option", { value: s }, String(seed))));
      byId("pick-seed").hidden = false;
      byId("seed-filter").addEventListener("change", (event) => { state.seed = event.target.value; refresh(); });
    }
    let waiting = 0;
    byId("search").addEventListener("input", (event) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
        refresh();
      }, 120);
    });
    let frame = 0;
    body.addEventListener("scroll", () => { frame ||= requestAnimationFrame(() => { frame = 0; drawRows(); }); }, { passive: true });
    body.addEventListener("keydown", keys);
    new ResizeObserver(() => {
      const before = rowHeight();
      knownHeight = 0;
      if (rowHeight() !== before) spacer.style.height = `${state.list.length * rowHeight()}px`;
      drawRows();
    }).observe(body);
    byId("close").addEventListener("click", () => dialog.close());
    byId("previous").addEventListener("click", () => step(-1));
    byId("next").addEventListener("click", () => step(1));
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    dialog.addEventListener("close", () => body.focus({ preventScroll: true }));
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    });
    refresh();
  }

  start();
})();
