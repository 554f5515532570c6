// Curves under the pointer, and runs that are switched off and on. The page is whole without it.
// No less-than sign and no ampersand stand in this file: the page is XML, too.
"use strict";
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);

  // Which run's lines are shown. A button a run, at the top of the page.
  const bar = document.querySelector(".runs");
  if (bar) {
    bar.hidden = false;
    bar.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      for (const part of document.querySelectorAll(`[data-run="${button.value}"]`)) {
        part.style.display = on ? "" : "none";
      }
    });
  }

  // The points of a line as [x, y] pairs, read once.
  const read = new WeakMap();
  const pointsOf = (group) => {
    if (!read.has(group)) {
      const lines = [...group.querySelectorAll("polyline:not(.noise)")];
      const points = lines.flatMap((line) => [...line.points].map((p) => [p.x, p.y]));
      for (const dot of group.querySelectorAll("circle")) {
        points.push([dot.cx.baseVal.value, dot.cy.baseVal.value]);
      }
      read.set(group, points);
    }
    return read.get(group);
  };
  const nearest = (points, x) =>
    points.reduce((a, b) => (Math.abs(a[0] - x) > Math.abs(b[0] - x) ? b : a));

  const show = (event) => {
    const chart = event.currentTarget;
    const [x0, x1, y0, y1] = chart.dataset.axes.split(" ").map(Number);
    const box = chart.viewBox.baseVal;
    const grid = chart.querySelector(".grid");
    const left = grid.x1.baseVal.value;
    const right = grid.x2.baseVal.value;
    const rows = [...chart.querySelectorAll(".grid")].map((line) => line.y1.baseVal.value);
    const [top, bottom] = [Math.min(...rows), Math.max(...rows)];
    const frame = chart.getBoundingClientRect();
    const at = ((event.clientX - frame.left) / frame.width) * box.width;
    const x = Math.min(Math.max(at, left), right);
    const groups = [...chart.querySelectorAll("g[data-name]")].filter((group) => {
      return group.style.display === "" ? pointsOf(group).length : false;
    });
    if (!groups.length) return;
    const found = groups.map((group) => [group, nearest(pointsOf(group), x)]);
    const place = nearest(found.map((pair) => pair[1]), x)[0];
    let cursor = chart.querySelector(".cursor");
    if (!cursor) {
      cursor = document.createElementNS(chart.namespaceURI, "line");
      cursor.setAttribute("class", "cursor");
      chart.append(cursor);
    }
    for (const [key, value] of [["x1", place], ["x2", place], ["y1", top], ["y2", bottom]]) {
      cursor.setAttribute(key, value);
    }
    const step = x0 + ((place - left) / (right - left)) * (x1 - x0);
    const head = document.createElement("div");
    head.textContent = `${chart.dataset.across} ${Math.round(step)}`;
    tip.replaceChildren(head);
    for (const [group, point] of found) {
      const value = y1 - ((point[1] - top) / (bottom - top)) * (y1 - y0);
      const row = document.createElement("div");
      const mark = document.createElement("i");
      mark.className = group.getAttribute("class");
      row.append(mark, `${group.dataset.name}: ${Number(value.toPrecision(3))}`);
      tip.append(row);
    }
    tip.hidden = false;
    const over = event.clientX + 16 + tip.offsetWidth - innerWidth;
    tip.style.left = `${Math.max(4, event.clientX + 16 - Math.max(0, over + 8))}px`;
    tip.style.top = `${Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8)}px`;
  };
  const hide = (event) => {
    tip.hidden = true;
    event.currentTarget.querySelector(".cursor")?.remove();
  };
  for (const chart of document.querySelectorAll("svg.curves")) {
    chart.addEventListener("pointermove", show);
    chart.addEventListener("pointerdown", show);
    chart.addEventListener("pointerleave", hide);
  }
})();
