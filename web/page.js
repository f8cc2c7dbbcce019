"use strict";
// The page at /: what the service is doing, and a playground. Texts of callers and names of models are hostile:
// they become text nodes and attribute values, never markup. Colours and lengths are custom properties of the style
// sheet, since the page's policy allows no style attributes.

(() => {
  // --- elements ------------------------------------------------------------------------------------------

  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("--")) element.style.setProperty(name, value);
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null));
    return element;
  }
  const make = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
  const draw = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
  const show = (id, ...children) => byId(id).replaceChildren(...children.flat());
  const facts = (pairs) => pairs.flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]);
  const bar = (fraction, label) => make("progress", { max: 1, value: Math.max(0, Math.min(1, fraction)), "aria-label": label });

  // --- numbers -------------------------------------------------------------------------------------------

  const grouped = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, roundingPriority: "morePrecision", maximumFractionDigits: 0 });
  const percent = (fraction) => `${Math.round(100 * fraction)} %`;
  const count = (number, thing) => `${grouped.format(number)} ${thing}${number === 1 ? "" : "s"}`;
  const fixed = (number, digits) => (Number.isFinite(number) ? number.toFixed(digits).replace("-", "−") : "–");
  const gigabytes = (mib) => `${fixed(mib / 1024, 1)} GiB`;

  function duration(seconds) {
    if (seconds < 1) return `${fixed(1000 * seconds, seconds < 0.01 ? 1 : 0)} ms`;
    if (seconds < 60) return `${fixed(seconds, 1)} s`;
    return seconds < 3600 ? `${Math.round(seconds / 60)} min` : `${fixed(seconds / 3600, 1)} h`;
  }

  // --- asking the service --------------------------------------------------------------------------------

  const KEY_NAME = "gpu-service-key"; // the sign-in form keeps it there
  const key = storedKey();

  function storedKey() {
    try {
      return sessionStorage.getItem(KEY_NAME);
    } catch {
      return null; // the browser keeps nothing for this page; a service without a key works all the same
    }
  }

  function forgetKey() {
    sessionStorage.removeItem(KEY_NAME);
    location.reload();
  }

  const addressOf = (path) => new URL(path, document.baseURI).href;

  async function ask(path, body = null, signal = AbortSignal.timeout(10_000)) {
    const headers = { Accept: "application/json", ...(key && { "X-API-Key": key }), ...(body && { "Content-Type": "application/json" }) };
    const sent = body ? { method: "POST", body: JSON.stringify(body) } : {};
    const answer = await fetch(path, { headers, signal, cache: "no-store", ...sent });
    if (answer.status === 401 && key) forgetKey(); // it was changed: the form asks for the new one
    const data = await answer.json();
    return { ok: answer.ok, status: answer.status, data, retryAfter: answer.headers.get("Retry-After"), date: answer.headers.get("Date") };
  }

  // --- live ----------------------------------------------------------------------------------------------

  const PACE_MS = { working: 1000, idle: 2500, hidden: 20_000, down: 5000 };
  const WINDOW_S = 300; // of the charts
  const MOST_JOBS = 20; // active ones in the list
  const MOST_MARKS = 600; // in the chart of latencies
  const BIN_S = 5;
  const past = { counters: [], jobs: new Map(), skewS: 0 };
  let polls = 0;
  let timer = 0;
  let health = null;
  let ready = null;

  async function poll() {
    clearTimeout(timer);
    let pace = PACE_MS.down;
    try {
      const slow = polls++ % 4 === 0 || !health?.ok || !ready?.ok;
      const [status, info, ...rest] = await Promise.all(["status", "info", ...(slow ? ["health", "ready"] : [])].map((path) => ask(path)));
      if (slow) [health, ready] = rest;
      if (!status.ok || !info.ok) throw new Error(`the service answers ${status.ok ? info.status : status.status}`);
      remember(status, info.data);
      showLive(status.data, info.data);
      const works = status.data.active_jobs.length || status.data.loading_models.length;
      pace = works ? PACE_MS.working : PACE_MS.idle;
    } catch (error) {
      health = null;
      showState("bad", error.name === "Error" ? error.message : "The service does not answer");
    }
    clearTimeout(timer);
    timer = setTimeout(poll, document.hidden ? PACE_MS.hidden : pace);
  }

  function remember(status, info) {
    if (status.date) past.skewS = (Date.parse(status.date) - Date.now()) / 1000; // jobs have the service's clock
    const now = Date.now() / 1000;
    const last = past.counters.at(-1);
    if (last && info.counters.texts < last.texts) past.counters = []; // a new engine counts from 0
    if (info.counters.texts !== undefined) past.counters.push({ at: now, ...info.counters }); // a new engine has not counted yet
    past.counters = past.counters.filter((sample) => sample.at > now - WINDOW_S - 30);
    for (const job of status.data.recent_jobs.toReversed()) {
      const at = Date.parse(job.started_at) / 1000 + job.duration_seconds - past.skewS;
      if (!past.jobs.has(job.id) && at > now - WINDOW_S) past.jobs.set(job.id, { at: Math.min(at, now), ...job });
    }
    for (const [id, job] of past.jobs) if (job.at < now - WINDOW_S || past.jobs.size > MOST_MARKS) past.jobs.delete(id);
  }

  function showState(kind, words) {
    const state = byId("state");
    state.dataset.state = kind;
    if (state.textContent !== words) state.textContent = words; // a live region speaks when it changes
  }

  function showLive(status, info) {
    const loading = status.loading_models.length > 0;
    if (!health.ok) showState("bad", health.data.detail || "No engine");
    else if (ready.ok) showState("good", "Ready");
    else showState(loading ? "waiting" : "bad", loading ? "Loading models" : "Not ready");
    showDevice(info);
    showQueue(status.queue, info);
    showModels(status, info);
    showCharts();
    const jobs = status.active_jobs.slice(0, MOST_JOBS).map(jobRow);
    const more = status.active_jobs.length - jobs.length;
    if (more > 0) jobs.push(make("li", { class: "empty" }, `and ${more} more`));
    show("jobs", jobs.length ? jobs : make("li", { class: "empty" }, "No job at the moment."));
    const recent = status.recent_jobs.map(recentRow);
    show("recent", recent.length ? recent : make("tr", {}, make("td", { colspan: 6, class: "empty" }, "None yet.")));
  }

  function showDevice(info) {
    show("device-name", info.device_name || info.device);
    const total = info.vram_total_mb;
    const used = info.vram_used_mb;
    if (Number.isFinite(total) && Number.isFinite(used)) {
      const words = `${gigabytes(used)} of ${gigabytes(total)} in use`;
      show("memory", bar(used / total, `Device memory: ${words}`), make("p", { class: "under" }, words, make("span", {}, percent(used / total))));
    } else show("memory", make("p", { class: "under" }, "No GPU memory to show: this device is the processor."));
    const platform = info.cuda_version ? `CUDA ${info.cuda_version}` : info.rocm_version ? `ROCm ${info.rocm_version}` : `${info.threads ?? "?"} threads`;
    const own = Number.isFinite(info.vram_allocated_mb) ? [["Own", gigabytes(info.vram_allocated_mb)]] : [];
    show("device-facts", facts([["Device", `${info.device}, ${platform}`], ...own, ["torch", info.pytorch_version ?? "–"]]));
    show("about", `GPU Service ${info.version}`);
  }

  function showQueue(queue, info) {
    show("queue-now", `${queue.in_flight} of ${count(queue.max_concurrent, "slot")} in use, ${queue.waiting_estimate} waiting`);
    const slots = Math.min(queue.max_concurrent, 32);
    const taken = Math.ceil((queue.in_flight * slots) / queue.max_concurrent);
    show("queue-slots", Array.from({ length: slots }, (_, index) => make("i", { class: index < taken ? "taken" : "" })));
    const { limits, counters } = info;
    const restarts = counters.engine_restarts ? [["Engine restarts", String(counters.engine_restarts)]] : [];
    const recoveries = counters.out_of_memory_recoveries ? [["Out of memory", `${counters.out_of_memory_recoveries} recovered`]] : [];
    show("queue-facts", facts([
      ["May wait", `${limits.max_queue}, for ${duration(limits.queue_timeout_seconds)}`],
      ["Since the engine's start", `${count(counters.texts, "text")}, ${count(counters.cache_hits, "cache hit")}`],
      ...restarts, ...recoveries,
    ]));
  }

  function showModels(status, info) {
    const loading = status.loading_models.map((model) => modelRow(`${model.type}:${model.model}`, "waiting",
      `${model.phase} ${percent(model.progress)}`, bar(model.progress, `${model.model}: ${model.phase}`)));
    const failed = Object.entries(ready.data.models ?? {}).filter(([, model]) => model.state === "failed")
      .map(([id, model]) => modelRow(id, "bad", "failed", make("p", { class: "reason" }, model.reason ?? "")));
    const loaded = info.models.map((model) => modelRow(model.id, "good", "ready", make("p", { class: "under" }, modelFacts(model))));
    const rows = [...failed, ...loading, ...loaded];
    show("models", rows.length ? rows : make("li", { class: "empty" }, "None loaded."));
    offerModels(info.models.map((model) => model.id));
  }

  function modelFacts(model) {
    const measured = model.dtype === "float32" ? {} : model.deviation ?? {}; // else it is that of the type not taken
    const worst = Math.max(0, ...Object.values(measured).filter(Number.isFinite));
    const idle = model.idle_seconds >= 1 ? `idle ${duration(model.idle_seconds)}` : "in use";
    const precision = worst ? `${model.dtype} (off by ${worst.toPrecision(2)} at most)` : model.dtype;
    const layers = model.default_layers ? `layer ${model.default_layers} of ${model.layers}` : `${model.layers} layers`;
    return [precision, layers, model.dimensions && `${model.dimensions} dimensions`, model.default ? "default" : idle].filter(Boolean).join(" · ");
  }

  function modelRow(id, state, words, more) {
    const [kind, ...name] = id.split(":");
    const head = [make("span", { class: "kind" }, kind), make("span", { class: "name" }, name.join(":")), make("span", { class: "state", "data-state": state }, words)];
    return make("li", {}, make("div", { class: "head" }, head), more);
  }

  function jobRow(job) {
    const eta = job.eta_seconds === null ? "" : `, ${duration(job.eta_seconds)} left`;
    const words = job.state === "running" ? `${percent(job.progress)}${eta}` : job.state;
    const head = [make("span", { class: "kind" }, job.type), make("span", { class: "name" }, `${count(job.items, "item")} on ${job.model}`), make("span", { class: "amount" }, words)];
    return make("li", {}, make("div", { class: "head" }, head), bar(job.progress, `${job.type} job ${job.id}: ${words}`));
  }

  function recentRow(job) {
    const time = new Date(job.started_at).toLocaleTimeString("en-GB");
    const good = job.outcome === "done";
    return make("tr", {},
      make("td", { class: "time" }, time), make("td", {}, job.type), make("td", { class: "number" }, grouped.format(job.items)), make("td", { class: "number" }, duration(job.duration_seconds)),
      make("td", {}, make("span", { class: "state", "data-state": good ? "good" : "bad" }, job.outcome)), make("td", { class: "name" }, job.model));
  }

  // --- charts --------------------------------------------------------------------------------------------

  const WIDTH = 320;
  const HEIGHT = 96;

  // What a counter grew by in each bin of the window, a second: the difference of two samples is spread over them.
  function rates(name) {
    const bins = new Array(WINDOW_S / BIN_S).fill(null);
    const end = Math.ceil((past.counters.at(-1)?.at ?? 0) / BIN_S);
    past.counters.forEach((sample, index, all) => {
      if (index === 0) return;
      const before = all[index - 1];
      const rate = (sample[name] - before[name]) / Math.max(0.001, sample.at - before.at);
      for (let bin = Math.floor(before.at / BIN_S); bin * BIN_S < sample.at; bin++) {
        const shared = Math.min(sample.at, (bin + 1) * BIN_S) - Math.max(before.at, bin * BIN_S);
        const place = bins.length - (end - bin);
        if (place >= 0 && place < bins.length) bins[place] += (rate * shared) / BIN_S;
      }
    });
    return bins;
  }

  const last = (bins) => bins.slice(0, -1).findLast((rate) => rate !== null) ?? bins.at(-1) ?? 0;

  function showCharts() {
    const texts = rates("texts");
    const now = last(texts);
    const peak = Math.max(0, ...texts);
    const words = `${grouped.format(now)} texts/s`;
    show("throughput", chart(words, `${grouped.format(last(rates("tokens")))} tokens/s`, `${words} now, ${grouped.format(peak)} at most`, bars(texts, peak || 1), `${grouped.format(peak)} texts/s`));
    const busy = rates("busy_s").map((rate) => rate === null ? null : Math.min(1, rate));
    show("busy", chart(percent(last(busy)), "of the time", `${percent(last(busy))} of the time now`, bars(busy, 1), "100 %"));
    showLatency();
  }

  function showLatency() {
    const jobs = [...past.jobs.values()];
    const sorted = jobs.map((job) => job.duration_seconds).sort((a, b) => a - b);
    if (!sorted.length) return show("latency", chart("–", "no job in the last 5 minutes", "no job in the last 5 minutes", [], ""));
    const [low, high] = [Math.floor(Math.log10(sorted[0] || 1e-4)), Math.floor(Math.log10(sorted.at(-1) || 1e-4)) + 1]; // decades
    const height = (seconds) => HEIGHT * (1 - (Math.log10(Math.max(seconds, 10 ** low)) - low) / (high - low));
    const decades = Array.from({ length: high - low }, (_, index) => draw("path", { class: "base", d: `M0 ${height(10 ** (low + index + 1)).toFixed(1)}H${WIDTH}` }));
    const at = (part) => duration(sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))]);
    const kinds = [...new Set(jobs.map((job) => job.type))].sort();
    const legend = make("p", { class: "legend" }, kinds.map((kind) => make("span", {}, draw("svg", { viewBox: "-6 -6 12 12", "aria-hidden": "true" }, mark(kind, 0, 0)), kind)));
    const now = Date.now() / 1000;
    const marks = jobs.map((job) => mark(job.type, WIDTH * (1 - (now - job.at) / WINDOW_S), height(job.duration_seconds), job.outcome));
    const words = `${at(0.5)} median, ${at(0.95)} 95th percentile`;
    return show("latency", chart(at(0.5), `median · 95 %: ${at(0.95)}`, `${words}, ${count(jobs.length, "job")}`, [...decades, ...marks], round(10 ** high), round(10 ** low)), legend);
  }

  const round = (seconds) => seconds < 1 ? `${Number((1000 * seconds).toPrecision(1))} ms` : `${seconds} s`;

  function chart(now, unit, words, marks, most, least = "") {
    const base = draw("path", { class: "base", d: `M0 ${HEIGHT - 0.5}H${WIDTH}M0 .5H${WIDTH}` });
    const picture = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `Last 5 minutes: ${words}` }, base, marks);
    return make("figure", {}, make("p", { class: "now" }, make("strong", {}, now), ` ${unit}`), make("div", { class: "plot" }, make("span", { class: "most", "aria-hidden": "true" }, most), make("span", { class: "most least", "aria-hidden": "true" }, least), picture),
      make("figcaption", { "aria-hidden": "true" }, make("span", {}, "5 min ago"), make("span", {}, "now")));
  }

  function bars(bins, most) {
    const step = WIDTH / bins.length;
    const path = bins.map((rate, index) => {
      if (!rate) return "";
      const height = Math.max(1.5, (rate / most) * (HEIGHT - 2));
      return `M${(index * step + 0.5).toFixed(2)} ${HEIGHT}v${(-height).toFixed(2)}h${(step - 1).toFixed(2)}v${height.toFixed(2)}z`;
    });
    return [draw("path", { class: "bars", d: path.join("") })];
  }

  // Kinds differ in shape as well as in colour; a cross is a job that was not done.
  function mark(kind, x, y, outcome = "done") {
    const shapes = { embed: "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0", bertscore: "M0-4.5L4.5 0L0 4.5L-4.5 0z", rerank: "M0-4L4.2 3.5H-4.2z" };
    const known = outcome === "done" ? kind : "failed";
    return draw("path", { class: `mark ${known}`, d: shapes[known] ?? "M-3.5-3.5L3.5 3.5M3.5-3.5L-3.5 3.5", transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` });
  }

  // --- heat maps -----------------------------------------------------------------------------------------

  const MOST_SHOWN = 48; // rows and columns: a table of 512 by 512 cells would hold the browser for seconds

  // A grid with one tab stop, in which the arrow keys move. rows, columns: [{head, label, dim}]. mark(r, c): the
  // cell's match. told(r, c): called for the cell under the pointer or with the focus; with null when it is left.
  function heatMap({ label, rows, columns, values, markOf = () => "", tell = () => {} }) {
    const across = columns.slice(0, MOST_SHOWN);
    const head = across.map((column) => make("th", { scope: "col", class: column.dim ? "dim" : "" }, make("span", {}, column.head)));
    const body = rows.slice(0, MOST_SHOWN).map((row, r) => make("tr", {},
      make("th", { scope: "row", class: row.dim ? "dim" : "" }, row.head), across.map((column, c) => cell(row, column, values[r][c], markOf(r, c), r, c))));
    const table = make("table", { class: "heat", role: "grid", "aria-label": label }, make("thead", {}, make("tr", {}, make("td", { role: "presentation" }), head)), make("tbody", {}, body));
    const cells = body.map((line) => [...line.querySelectorAll("td")]);
    walk(table, cells);
    const told = (event) => { const at = event.target.closest?.("td[data-r]"); if (at) tell(Number(at.dataset.r), Number(at.dataset.c)); };
    for (const kind of ["pointerover", "focusin"]) table.addEventListener(kind, told);
    table.addEventListener("pointerleave", () => tell(null, null));
    const note = rows.length > MOST_SHOWN || columns.length > MOST_SHOWN ? `The first ${MOST_SHOWN} of ${rows.length} by ${columns.length} are shown.` : "";
    return [make("div", { class: "scroll" }, table), make("p", { class: "under" }, note)];
  }

  function cell(row, column, value, marked, r, c) {
    const words = { both: ", each other's best match", row: ", the row's best match", column: ", the column's best match", "": "" }[marked];
    const strength = Math.max(0, Math.min(1, value));
    return make("td", { class: `${strength > 0.58 ? "strong " : ""}${row.dim || column.dim ? "dim " : ""}${marked}`, "--v": strength.toFixed(3), "data-r": r, "data-c": c, tabindex: r + c === 0 ? 0 : -1,
      "aria-label": `${row.label}, ${column.label}: ${fixed(value, 2)}${words}` }, fixed(value, 2));
  }

  // One tab stop for a grid of elements; arrow keys, Home and End move in it.
  function walk(container, lines) {
    const place = (element) => { for (let r = 0; r < lines.length; r++) { const c = lines[r].indexOf(element); if (c >= 0) return [r, c]; } return null; };
    container.addEventListener("focusin", (event) => {
      if (!place(event.target)) return;
      for (const element of lines.flat()) element.tabIndex = element === event.target ? 0 : -1;
    });
    container.addEventListener("keydown", (event) => {
      const at = place(event.target);
      if (!at) return;
      const [r, c] = at;
      const next = { ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1], Home: [r, 0], End: [r, lines[r].length - 1] }[event.key];
      if (!next) return;
      event.preventDefault();
      lines[next[0]]?.[next[1]]?.focus();
    });
  }

  // --- score ---------------------------------------------------------------------------------------------

  const MOST_EXPLAINED = 5;

  function scoreBody(form) {
    const [candidates, references] = [form.candidates, form.references].map((field) => field.value.replace(/\s+$/, "").split("\n"));
    const body = { candidates, references };
    if (form.model.value.trim()) body.model = form.model.value.trim();
    if (form.idf.checked) body.idf = true;
    if (form.rescale_with_baseline.checked) body.rescale_with_baseline = true;
    if (candidates.length <= MOST_EXPLAINED) body.explain = true;
    return body;
  }

  function showScores(answer, body) {
    const measures = ["precision", "recall", "f1"];
    const head = make("tr", {}, ["", "Candidate and reference", "P", "R", "F1"].map((name, index) => make("th", { scope: "col", class: index > 1 ? "number" : "" }, name)));
    const lines = body.candidates.map((candidate, index) => make("tr", {}, make("th", { scope: "row" }, String(index + 1)),
      make("td", { class: "texts" }, make("p", {}, candidate), make("p", {}, body.references[index])), measures.map((name) => scoreCell(answer[name][index], name))));
    show("score-answer", make("div", { class: "scroll card" }, make("table", { class: "list scores" }, make("thead", {}, head), make("tbody", {}, lines))));
    showAlignments(answer.explanations ?? [], body);
    return [`${answer.model}, layer ${answer.num_layers}`, ...noticed(answer, "pair")];
  }

  function scoreCell(value, name) {
    return make("td", { class: "number", "data-name": { precision: "P", recall: "R", f1: "F1" }[name] }, make("span", { class: "value" }, fixed(value, 3)), make("span", { class: `meter ${name}`, "--v": Math.max(0, Math.min(1, value)).toFixed(3), "aria-hidden": "true" }));
  }

  function showAlignments(explanations) {
    if (!explanations.length) return show("alignment", make("p", { class: "under" }, `The alignment of tokens is shown for up to ${MOST_EXPLAINED} pairs.`));
    const picture = make("div", {});
    const choose = (index) => picture.replaceChildren(...alignment(explanations[index]));
    const choices = explanations.map((_, index) => {
      const input = make("input", { type: "radio", name: "pair", value: index, checked: index === 0 });
      input.addEventListener("change", () => choose(index));
      return make("label", {}, input, make("span", {}, String(index + 1)));
    });
    const chooser = explanations.length > 1 ? make("fieldset", { class: "choice" }, make("legend", {}, "Pair"), choices) : "";
    show("alignment", make("section", { class: "card", "aria-labelledby": "alignment-title" }, make("div", { class: "head" }, make("h3", { id: "alignment-title" }, "Alignment of tokens"), chooser), picture));
    return choose(0);
  }

  function alignment(pair) {
    if (!pair.similarity.length) return [make("p", { class: "under" }, "One of the texts has no tokens that count: there is nothing to align.")];
    const candidates = side(pair.candidate_tokens, pair.candidate_weights);
    const references = side(pair.reference_tokens, pair.reference_weights);
    const told = make("p", { class: "told", role: "status" }, "Point at a token, or move to it with Tab and the arrow keys: it shows its partner.");
    const strips = make("div", { class: "strips" });
    const marked = (name, index) => strips.querySelector(`[data-side="${name}"][data-index="${index}"]`);
    const light = (candidate, reference) => {
      for (const element of strips.querySelectorAll(".lit")) element.classList.remove("lit");
      if (candidate !== null) for (const element of [marked("candidate", candidate), marked("reference", reference)]) element?.classList.add("lit");
    };
    const match = (name, index) => name === "candidate" ? [index, pair.candidate_matches[index]] : [pair.reference_matches[index], index];
    const tell = (name, index) => {
      const [c, r] = match(name, index);
      light(c, r);
      const [own, other] = name === "candidate" ? [candidates[c], references[r]] : [references[r], candidates[c]];
      told.textContent = `${own.label} is closest to ${other.label}: ${fixed(pair.similarity[c][r], 3)}${own.dim ? " (does not count: its weight is 0)" : ""}`;
    };
    strips.append(strip("candidate", candidates, pair, match), strip("reference", references, pair, match));
    for (const kind of ["pointerover", "focusin"]) strips.addEventListener(kind, (event) => { const at = event.target.closest("button"); if (at) tell(at.dataset.side, Number(at.dataset.index)); });
    strips.addEventListener("pointerleave", () => light(null, null));
    walk(strips, [...strips.querySelectorAll(".strip")].map((line) => [...line.querySelectorAll("button")]));
    const map = heatMap({ label: "Similarity of each candidate token (rows) to each reference token (columns)", rows: candidates, columns: references, values: pair.similarity, markOf: (c, r) => matched(pair, c, r),
      tell: (c, r) => {
        light(c, r);
        if (c !== null) told.textContent = `${candidates[c].label} and ${references[r].label}: ${fixed(pair.similarity[c][r], 3)}${{ both: ", each other's closest", row: `, the closest to ${candidates[c].label}`, column: `, the closest to ${references[r].label}`, "": "" }[matched(pair, c, r)]}`;
      } });
    const signs = { row: "best of its row: counts for precision", column: "best of its column: for recall", both: "both" };
    const legend = Object.entries(signs).map(([sign, words]) => make("span", {}, make("i", { class: `sample ${sign}` }), words));
    return [strips, told, ...map, make("p", { class: "under key" }, legend, make("span", {}, "faded: weight 0"))];
  }

  const side = (tokens, weights) => tokens.map((token, index) => ({ head: token, label: `“${token}”`, dim: weights[index] === 0 }));

  function matched(pair, candidate, reference) {
    const forRow = pair.candidate_matches[candidate] === reference && pair.candidate_weights[candidate] > 0;
    const forColumn = pair.reference_matches[reference] === candidate && pair.reference_weights[reference] > 0;
    return forRow && forColumn ? "both" : forRow ? "row" : forColumn ? "column" : "";
  }

  function strip(name, tokens, pair, match) {
    const buttons = tokens.map((token, index) => {
      const [c, r] = match(name, index);
      const value = Math.max(0, Math.min(1, pair.similarity[c][r]));
      const partner = name === "candidate" ? pair.reference_tokens[r] : pair.candidate_tokens[c];
      return make("button", { type: "button", class: `token${value > 0.58 ? " strong" : ""}${token.dim ? " dim" : ""}`, "--v": value.toFixed(3), "data-side": name, "data-index": index, tabindex: index ? -1 : 0,
        "aria-label": `${token.head}: closest to ${partner}, ${fixed(pair.similarity[c][r], 2)}${token.dim ? ", weight 0" : ""}` }, token.head);
    });
    return make("div", { class: "strip", role: "group", "aria-label": `Tokens of the ${name}` }, make("span", { class: "side" }, name === "candidate" ? "Candidate" : "Reference"), make("div", { class: "tokens" }, buttons));
  }

  // --- embed ---------------------------------------------------------------------------------------------

  const linesOf = (field) => field.value.split("\n").filter((line) => line.trim());
  const withModel = (form, body) => form.model.value.trim() ? { ...body, model: form.model.value.trim() } : body;
  const embedBody = (form) => withModel(form, { texts: linesOf(form.texts) });

  function showCosines(answer, body) {
    const vectors = answer.embeddings;
    const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
    const lengths = vectors.map((vector) => Math.sqrt(dot(vector, vector)));
    const values = vectors.map((a, r) => vectors.map((b, c) => dot(a, b) / (lengths[r] * lengths[c])));
    const rows = body.texts.map((text, index) => ({ head: make("span", { class: "text", title: text }, make("b", {}, String(index + 1)), ` ${text}`), label: `${index + 1}` }));
    const columns = rows.map((row, index) => ({ head: String(index + 1), label: row.label }));
    const told = make("p", { class: "told", role: "status" }, "Point at a cell, or move with Tab and the arrow keys.");
    const tell = (r, c) => { if (r !== null) told.textContent = `“${body.texts[r]}” and “${body.texts[c]}”: ${fixed(values[r][c], 3)}`; };
    show("cosines", vectors.length ? make("section", { class: "card" }, make("h3", {}, "Cosine of each text to each other"), told, heatMap({ label: "Cosines of the texts", rows, columns, values, tell })) : "");
    return [`${answer.model}, ${count(answer.dimensions, "dimension")}`, ...noticed(answer, "text")];
  }

  // --- rerank --------------------------------------------------------------------------------------------

  function rerankBody(form) {
    const body = withModel(form, { query: form.elements.query.value, documents: linesOf(form.documents) });
    return form.elements.method.value ? { ...body, method: form.elements.method.value } : body;
  }

  function showRanking(answer, body) {
    const scores = answer.results.map((result) => result.relevance_score);
    const most = Math.max(1, ...scores);
    const items = answer.results.map((result, place) => make("tr", {}, make("th", { scope: "row" }, String(place + 1)), make("td", { class: "texts" }, make("p", {}, body.documents[result.index])),
      make("td", { class: "number" }, make("span", { class: "value" }, fixed(result.relevance_score, 3)), make("span", { class: "meter f1", "--v": Math.max(0, Math.min(1, result.relevance_score / most)).toFixed(3), "aria-hidden": "true" }))));
    const head = make("tr", {}, ["", "Document", "Relevance"].map((name, index) => make("th", { scope: "col", class: index > 1 ? "number" : "" }, name)));
    show("rerank-answer", make("div", { class: "scroll card" }, make("table", { class: "list scores" }, make("thead", {}, head), make("tbody", {}, items))));
    return [`${answer.model}, ${answer.method}`, ...noticed(answer, "document")];
  }

  // --- playground ----------------------------------------------------------------------------------------

  function noticed(answer, thing) {
    const cut = answer.truncated?.length ? [`${count(answer.truncated.length, thing)} cut to what the model reads`] : [];
    return [...cut, ...(answer.warnings ?? [])];
  }

  // A form that asks `path` with what `bodyOf` reads from it, and the curl line that does the same beside it. places:
  // the ids of what holds its answer, which an error empties.
  function playground(name, path, bodyOf, showAnswer, places) {
    const form = byId(`${name}-form`);
    const note = byId(`${name}-note`);
    const say = (words, bad = false) => {
      note.textContent = words;
      note.dataset.state = bad ? "bad" : "";
      if (bad) for (const place of places) show(place, "");
    };
    let running = null;
    const update = curlBlock(byId(`${name}-curl`));
    const refresh = () => update(curlLine(path, bodyOf(form)));
    async function run(event) {
      event.preventDefault();
      running?.abort();
      const own = running = new AbortController();
      form.setAttribute("aria-busy", "true");
      say("Working …");
      let answered = false;
      try {
        const body = bodyOf(form);
        const began = performance.now();
        const answer = await ask(path, body, own.signal);
        answered = true;
        if (!answer.ok) return say(`${answer.data.detail ?? answer.status}${answer.retryAfter ? ` (again in ${answer.retryAfter} s)` : ""}`, true);
        const took = duration((performance.now() - began) / 1000);
        return say([...showAnswer(answer.data, body), took].join(" · "));
      } catch (error) {
        return own.signal.aborted ? null : say(error instanceof TypeError && !answered ? "The service does not answer." : String(error.message), true);
      } finally {
        if (running === own) form.removeAttribute("aria-busy");
      }
    }
    form.addEventListener("submit", run);
    form.addEventListener("input", refresh);
    form.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); });
    refresh();
  }

  function offerModels(ids) {
    const names = (wanted) => [...new Set(ids.filter((id) => wanted(id.split(":")[0])).map((id) => id.slice(id.indexOf(":") + 1)))];
    const lists = { "bertscore-models": (kind) => kind === "bertscore", "embed-models": (kind) => kind === "embed", "all-models": () => true };
    for (const [id, wanted] of Object.entries(lists)) {
      if (byId(id).children.length !== names(wanted).length) show(id, names(wanted).map((name) => make("option", { value: name })));
    }
  }

  // --- curl ----------------------------------------------------------------------------------------------

  const MOST_IN_A_LINE = 100_000; // bytes: systems bound an argument at 128 KiB
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

  function curlLine(path, body) {
    const headers = ["Content-Type: application/json", ...(key ? ["X-API-Key: YOUR_KEY"] : [])].map((header) => ` \\\n  -H ${quoted(header)}`);
    const sent = JSON.stringify(body);
    const data = new Blob([sent]).size > MOST_IN_A_LINE ? `-d @- <<'EOF'\n${sent}\nEOF` : `-d ${quoted(sent)}`;
    return `curl -s ${quoted(addressOf(path))}${headers.join("")} \\\n  ${data}`;
  }

  function curlBlock(place) {
    const code = make("code");
    const button = make("button", { type: "button", class: "plain" }, "Copy");
    const said = make("span", { class: "hidden", role: "status" });
    let timeout = 0;
    button.addEventListener("click", async () => {
      const done = await copy(code.textContent);
      button.textContent = done ? "Copied" : "Select it by hand";
      said.textContent = done ? "Copied" : "The browser did not copy it";
      button.focus();
      clearTimeout(timeout);
      timeout = setTimeout(() => { button.textContent = "Copy"; said.textContent = ""; }, 2000);
    });
    place.replaceChildren(make("div", { class: "head" }, make("h3", {}, "The same with curl"), button, said), make("pre", {}, code));
    return (line) => { code.textContent = line; };
  }

  // Over plain HTTP in a network browsers have no navigator.clipboard: then by way of a selection.
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const area = make("textarea", { class: "copied", readonly: true, "aria-hidden": "true" });
      area.value = text;
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  }

  // --- views ---------------------------------------------------------------------------------------------

  const VIEWS = ["live", "score", "embed", "rerank"];

  function showView() {
    const wanted = location.hash.slice(1);
    const view = VIEWS.includes(wanted) ? wanted : VIEWS[0];
    for (const name of VIEWS) byId(name).hidden = name !== view;
    for (const link of document.querySelectorAll("nav a[href^='#']")) {
      if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  playground("score", "bertscore", scoreBody, showScores, ["score-answer", "alignment"]);
  playground("embed", "embed", embedBody, showCosines, ["cosines"]);
  playground("rerank", "rerank", rerankBody, showRanking, ["rerank-answer"]);
  byId("sign-out").hidden = !key;
  byId("sign-out").addEventListener("click", forgetKey);
  document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); byId("main").focus(); });
  window.addEventListener("hashchange", showView);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
  showView();
  poll();
})();
