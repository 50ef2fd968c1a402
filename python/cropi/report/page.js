// The prompt browser: search, filter, sort, one prompt in full. Text enters the page as text, never as markup.
"use strict";
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = JSON.parse(await new Response(stream).text());
  const n = data.columns.id.length, page = 50;
  const shown = { tab: "chosen", text: "", task: "", sort: "rank", down: false, start: 0, rows: [] };
  const byId = new Map(data.columns.id.map((name, i) => [name, i]));
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    if (text !== null) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const number = (x, digits) => (x === null || x === undefined ? "–" : x.toFixed(digits));
  const heads = [
    ["rank", "rank", 0], ["id", "prompt", null], ["task", "task", null],
    ...data.sets.map((name, v) => ["score" + v, name, 4]),
    ["p", "p selected", 2], ["pass", "pass rate", 2], ["norm", "norm", 3], ["ratio", "ratio", 3], ["ess", "ESS", 2],
    ["tokens", "tokens", 0],
  ].filter(([key]) => data.columns[key] !== undefined);
  const isText = (key) => ["id", "task"].includes(key);

  function value(key, i) {
    const column = data.columns[key];
    return column[i];
  }

  function keeps(i) {
    const c = data.columns, rank = c.rank[i];
    switch (shown.tab) {
      case "chosen": return rank !== null && rank <= data.chosen;
      case "cut": return rank !== null && Math.abs(rank - data.chosen) <= data.near;
      case "worst": return rank !== null && rank > data.ranked - 50;
      case "failed": return c.status[i] !== 0;
      default: return true;
    }
  }

  function update() {
    const words = shown.text.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [];
    for (let i = 0; i < n; i++) {
      if (!keeps(i)) continue;
      if (shown.task !== "" && data.columns.task[i] !== shown.task) continue;
      if (words.length) {
        const text = (data.columns.id[i] + " " + (data.columns.text ? data.columns.text[i] : "")).toLowerCase();
        if (!words.every((word) => text.includes(word))) continue;
      }
      rows.push(i);
    }
    const sign = shown.down ? -1 : 1;
    rows.sort((a, b) => {
      const x = value(shown.sort, a), y = value(shown.sort, b);
      if (x === y) return a - b;
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      return (x < y ? -1 : 1) * sign;
    });
    shown.rows = rows;
    shown.start = Math.min(shown.start, Math.max(0, Math.floor((rows.length - 1) / page) * page));
    draw();
  }

  function under(i) {
    const c = data.columns;
    return c.status[i] !== 0 ? data.statuses[c.status[i]] : c.text ? c.text[i] : "";
  }

  function draw() {
    const head = make("tr", null);
    for (const [key, name] of heads) {
      const cell = make("th", null, isText(key) ? { class: "text", scope: "col" } : { scope: "col" });
      const button = make("button", name + (shown.sort === key ? (shown.down ? "\u00a0▾" : "\u00a0▴") : ""), { type: "button" });
      if (shown.sort === key) cell.setAttribute("aria-sort", shown.down ? "descending" : "ascending");
      button.addEventListener("click", () => {
        shown.down = shown.sort === key ? !shown.down : !(isText(key) || key === "rank");
        shown.sort = key;
        update();
      });
      cell.append(button);
      head.append(cell);
    }
    $("head").replaceChildren(head);
    const body = shown.rows.slice(shown.start, shown.start + page).map((i) => {
      const row = make("tr", null, { tabindex: "0", "data-id": data.columns.id[i] });
      for (const [key, , digits] of heads) {
        const x = value(key, i);
        const cell = make("td", null, isText(key) ? { class: "text" } : {});
        cell.append(make("bdi", isText(key) ? (x ?? "–") : number(x, digits)));
        // Under its id and not in a last column: that one lay outside of the page, and ids alone say little.
        if (key === "id") cell.append(make("bdi", under(i), { class: "soft under" }));
        row.append(cell);
      }
      row.addEventListener("click", () => open(i));
      row.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(i); }
        if (event.key === "ArrowDown") { event.preventDefault(); (row.nextElementSibling || row).focus(); }
        if (event.key === "ArrowUp") { event.preventDefault(); (row.previousElementSibling || row).focus(); }
      });
      return row;
    });
    $("rows").replaceChildren(...body);
    const last = Math.min(shown.start + page, shown.rows.length);
    $("count").textContent = shown.rows.length
      ? `${shown.start + 1} to ${last} of ${shown.rows.length} prompts` : "no prompt fits";
    $("back").disabled = shown.start === 0;
    $("next").disabled = last >= shown.rows.length;
  }

  // Long texts are in the page up to some length.
  function begun(one) {
    return one.size <= one.text.length ? one.text : `${one.text} … (${one.size} characters in all)`;
  }

  function open(i) {
    const c = data.columns, detail = data.details[c.id[i]], box = $("detail");
    for (const row of $("rows").children) row.setAttribute("aria-selected", row.dataset.id === c.id[i]);
    const facts = [
      c.rank[i] === null ? data.statuses[c.status[i]] : `rank ${c.rank[i]} of ${data.ranked}`,
      c.rank[i] !== null && c.rank[i] <= data.chosen ? "chosen" : "not chosen",
      ...data.sets.map((name, v) => `${name} ${number(c["score" + v][i], 4)}` +
        (c["se" + v] ? ` ± ${number(c["se" + v][i], 4)}` : "")),
      c.p ? `chosen in ${number(c.p[i] === null ? null : 100 * c.p[i], 0)} % of the draws` : "",
      `pass rate ${number(c.pass[i], 2)}`, `norm ${number(c.norm[i], 3)}`,
      c.ratio ? `ratio ${number(c.ratio[i], 3)}` : "", `${c.tokens[i]} scored tokens`,
    ].filter(Boolean);
    box.replaceChildren(make("h3", c.id[i]), make("p", facts.join(" · "), { class: "soft" }));
    if (!detail) {
      box.append(make("p", (c.text ? c.text[i] + " … " : "") + data.nodetail));
    } else {
      box.append(make("h3", "Prompt"), make("pre", begun(detail), { dir: "auto" }));
      const list = make("div", null, { class: "responses" });
      detail.responses.forEach((response, k) => {
        const card = make("div", null, { class: "response" });
        card.append(make("div", `reward ${response.reward} · advantage ${number(response.advantage, 2)}`, { class: "soft" }));
        card.append(make("pre", begun(response), { dir: "auto" }));
        list.append(card);
      });
      box.append(make("h3", `Responses (${detail.responses.length})`), list);
    }
    box.hidden = false;
    box.scrollIntoView({ block: "nearest" });
  }

  for (const button of document.querySelectorAll(".tabs button")) {
    button.addEventListener("click", () => {
      shown.tab = button.dataset.tab;
      shown.start = 0;
      if (shown.tab === "norm") { shown.sort = "norm"; shown.down = true; }
      else { shown.sort = "rank"; shown.down = shown.tab === "worst"; }
      for (const other of document.querySelectorAll(".tabs button"))
        other.setAttribute("aria-pressed", other === button);
      update();
    });
  }
  $("search").addEventListener("input", (event) => { shown.text = event.target.value; shown.start = 0; update(); });
  $("task").addEventListener("change", (event) => { shown.task = event.target.value; shown.start = 0; update(); });
  $("back").addEventListener("click", () => { shown.start = Math.max(0, shown.start - page); draw(); });
  $("next").addEventListener("click", () => { shown.start += page; draw(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement.tagName !== "INPUT") { event.preventDefault(); $("search").focus(); }
  });
  for (const link of document.querySelectorAll("[data-open]")) {
    link.addEventListener("click", (event) => {
      const i = byId.get(link.dataset.open);
      if (i !== undefined) { event.preventDefault(); open(i); $("detail").scrollIntoView(); }
    });
  }
  update();
})();
