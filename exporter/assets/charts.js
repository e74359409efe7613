// Charts of a report, as SVG at the width they have: the report page and the status page draw with the same functions.
// Everything drawn as text goes through textContent: class names come from the stream and are not to be trusted.
"use strict";

const gapstream = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  function node(name, attributes = {}, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function html(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const known = value => value !== null && value !== undefined;
  const percent = value => known(value) ? (100 * value).toFixed(1) + " %" : "-";
  const share = value => Math.round(100 * value) + " %";
  const number = value => known(value) ? value.toFixed(3) : "-";

  // Draws again whenever the width changes; `draw(width)` returns an SVG element.
  function responsive(box, draw) {
    box.classList.add("chart");
    let width = 0;
    const redraw = () => {
      if (!box.clientWidth || box.clientWidth === width) return;
      width = box.clientWidth;
      box.replaceChildren(draw(width));
    };
    box.watcher?.disconnect();
    box.watcher = new ResizeObserver(redraw);
    box.watcher.observe(box);
    width = 0;
    redraw();
  }

  function tip(box, x, y, lines) {
    box.querySelector(".tip")?.remove();
    if (!lines) return;
    const made = html("div", "tip");
    for (const line of lines) made.append(html("div", "", line));
    box.append(made);
    const left = Math.min(Math.max(0, x - made.offsetWidth / 2), box.clientWidth - made.offsetWidth);
    made.style.left = left + "px";
    made.style.top = Math.max(0, y - made.offsetHeight - 12) + "px";
  }

  function ticks(low, high) {
    const raw = (high - low) / 4, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 2.5, 5, 10].find(factor => factor * power >= raw);
    const made = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) made.push(at);
    return made;
  }

  function legend(box, entries) {
    if (!box.previousElementSibling?.classList.contains("legend")) box.before(html("div", "legend"));
    box.previousElementSibling.replaceChildren(...entries.map(([name, color]) => {
      const entry = html("span"), mark = html("i");
      mark.style.background = color;
      entry.append(mark, name);
      return entry;
    }));
  }

  // spec: {x: [names], series: [{name, color, values, dash, quiet}], format, low, high, span, limit: {name, value}}; `span`:
  // of the axis where all values are the same. A quiet series has no label beside its end.
  function lines(box, spec) {
    const format = spec.format || percent, axis = spec.axis || share;
    const values = spec.series.flatMap(one => one.values).filter(known).concat(spec.limit ? [spec.limit.value] : []);
    if (!values.length) { box.replaceChildren(html("p", "note", "Nothing measured yet.")); return; }
    let low = spec.low ?? Math.min(...values), high = spec.high ?? Math.max(...values);
    if (high === low) high = low + (spec.span ?? 1);
    if (spec.low === undefined) low -= (high - low) * .08;
    if (spec.high === undefined) high += (high - low) * .08;
    responsive(box, width => {
      const height = Math.max(200, Math.min(270, width * .52));
      const names = width > 380;
      legend(box, names ? [] : spec.series.filter(one => !one.quiet).map(one => [one.name, one.color]));
      const edge = { left: 44, right: names ? 14 + 7.2 * Math.max(...spec.series.filter(one => !one.quiet).map(one => one.name.length)) : 14, top: 10, bottom: 26 };
      const count = spec.x.length;
      const x = index => edge.left + (width - edge.left - edge.right) * (count > 1 ? index / (count - 1) : .5);
      const y = value => edge.top + (height - edge.top - edge.bottom) * (1 - (value - low) / (high - low));
      const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.title || "" });
      for (const at of ticks(low, high)) {
        svg.append(node("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(at), y2: y(at) }));
        svg.append(node("text", { x: edge.left - 8, y: y(at) + 4, "text-anchor": "end" }, axis(at)));
      }
      const every = Math.ceil(count / Math.max(1, Math.floor((width - edge.left - edge.right) / 44)));
      spec.x.forEach((name, index) => {
        if (index % every === 0) svg.append(node("text", { x: x(index), y: height - 6, "text-anchor": "middle" }, name));
      });
      if (spec.limit) {
        const at = y(spec.limit.value);
        svg.append(node("line", { x1: edge.left, x2: width - edge.right, y1: at, y2: at, stroke: "var(--limit)", "stroke-width": 1.5, "stroke-dasharray": "2 4" }));
        svg.append(node("text", { x: edge.left + 4, y: at - 6, style: "fill: var(--limit)" }, spec.limit.name));
      }
      const labels = [];
      for (const one of spec.series) {
        let path = "", pen = "M";
        one.values.forEach((value, index) => {
          if (!known(value)) { pen = "M"; return; }
          path += `${pen}${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
          pen = "L";
        });
        svg.append(node("path", { class: "series", d: path, stroke: one.color, "stroke-dasharray": one.dash || "none" }));
        const last = one.values.reduce((found, value, index) => known(value) ? index : found, -1);
        one.values.forEach((value, index) => {
          if (known(value) && (count < 25 || index === last)) svg.append(node("circle", { cx: x(index), cy: y(value), r: 3.5, fill: one.color, stroke: "var(--surface)", "stroke-width": 1.5 }));
        });
        if (last >= 0 && !one.quiet) labels.push({ at: y(one.values[last]), name: one.name, color: one.color });
      }
      if (names) {
        labels.sort((one, other) => one.at - other.at);
        for (let index = 1; index < labels.length; index++) labels[index].at = Math.max(labels[index].at, labels[index - 1].at + 15);
        const over = labels.length ? labels.at(-1).at - (height - edge.bottom) : 0;
        for (let index = labels.length - 1; over > 0 && index >= 0; index--) {
          labels[index].at = Math.min(labels[index].at, height - edge.bottom - 15 * (labels.length - 1 - index));
        }
        for (const label of labels) svg.append(node("text", { class: "end", x: width - edge.right + 10, y: label.at + 4, style: `fill: ${label.color}` }, label.name));
      }
      const cursor = node("line", { class: "grid", y1: edge.top, y2: height - edge.bottom, visibility: "hidden" });
      svg.append(cursor);
      svg.addEventListener("pointermove", event => {
        const place = svg.getBoundingClientRect();
        const inner = width - edge.left - edge.right;
        const index = Math.max(0, Math.min(count - 1, Math.round((event.clientX - place.left - edge.left) / inner * (count - 1)))) || 0;
        cursor.setAttribute("x1", x(index)); cursor.setAttribute("x2", x(index)); cursor.setAttribute("visibility", "visible");
        tip(box, x(index), event.clientY - place.top, [`${spec.xName || "Task"} ${spec.x[index]}`,
          ...spec.series.filter(one => known(one.values[index])).map(one => `${one.name}: ${format(one.values[index])}`)]);
      });
      svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); tip(box); });
      return svg;
    });
  }

  // matrix[t][i]: accuracy on task i after task t, null where there is none; tasks: their numbers; names: their classes.
  function heatMap(box, matrix, tasks, names) {
    const count = matrix.length;
    if (!count) { box.replaceChildren(html("p", "note", "Nothing learned yet.")); return; }
    responsive(box, width => {
      const edge = { left: 44, top: 24 };
      const cell = Math.min(64, (width - edge.left) / count), tall = Math.min(cell, Math.max(cell * .74, 12));
      const gap = cell > 14 ? 3 : cell > 5 ? 1 : 0;
      const svg = node("svg", { viewBox: `0 0 ${width} ${edge.top + tall * count}`, height: edge.top + tall * count, role: "img", "aria-label": "accuracy matrix" });
      const every = Math.ceil(26 / cell);
      for (let index = 0; index < count; index++) {
        if (index % every) continue;
        svg.append(node("text", { x: edge.left + cell * (index + .5), y: 14, "text-anchor": "middle" }, tasks[index]));
        svg.append(node("text", { x: edge.left - 10, y: edge.top + tall * (index + .5) + 4, "text-anchor": "end" }, tasks[index]));
      }
      matrix.forEach((row, task) => row.forEach((value, other) => {
        if (!known(value)) return;
        const group = node("g");
        group.append(node("rect", { x: edge.left + cell * other + gap / 2, y: edge.top + tall * task + gap / 2, width: Math.max(1, cell - gap), height: Math.max(1, tall - gap), rx: Math.min(6, cell / 6),
          style: `fill: color-mix(in oklab, var(--learned) ${Math.round(5 + 95 * value ** 1.6)}%, var(--surface))` }));
        if (cell > 30) group.append(node("text", { x: edge.left + cell * (other + .5), y: edge.top + tall * (task + .5) + 4, "text-anchor": "middle",
          style: `fill: ${value > .72 ? "var(--on-learned)" : "var(--ink)"}` }, Math.round(100 * value)));
        group.addEventListener("pointerenter", () => tip(box, edge.left + cell * (other + .5), edge.top + tall * task,
          [`After task ${tasks[task]}, on task ${tasks[other]}: ${percent(value)}`, shortList(names[other])]));
        group.addEventListener("pointerleave", () => tip(box));
        svg.append(group);
      }));
      return svg;
    });
  }

  // rows: [{name, parts: {phase: seconds}}]
  function bars(box, rows, phases) {
    const total = row => phases.reduce((sum, phase) => sum + (row.parts[phase] || 0), 0);
    const most = Math.max(...rows.map(total), 1e-9);
    responsive(box, width => {
      const tall = rows.length > 20 ? 14 : 26, edge = { left: 44, right: 60 };
      const svg = node("svg", { viewBox: `0 0 ${width} ${tall * rows.length}`, height: tall * rows.length, role: "img", "aria-label": "seconds per phase" });
      rows.forEach((row, index) => {
        let at = edge.left;
        svg.append(node("text", { x: edge.left - 10, y: tall * (index + .5) + 4, "text-anchor": "end" }, row.name));
        phases.forEach((phase, which) => {
          const long = (width - edge.left - edge.right) * (row.parts[phase] || 0) / most;
          if (!long) return;
          const part = node("rect", { x: at, y: tall * index + 3, width: Math.max(.5, long - 1), height: tall - 6, rx: 2, fill: `var(--phase-${which % 6 + 1})` });
          const middle = at + long / 2;
          part.addEventListener("pointerenter", () => tip(box, middle, tall * index, [`Task ${row.name}, ${phase}: ${row.parts[phase].toFixed(1)} s`]));
          part.addEventListener("pointerleave", () => tip(box));
          svg.append(part);
          at += long;
        });
        svg.append(node("text", { x: at + 8, y: tall * (index + .5) + 4 }, total(row).toFixed(1) + " s"));
      });
      return svg;
    });
    legend(box, phases.map((phase, which) => [phase, `var(--phase-${which % 6 + 1})`]));
  }

  const shortList = names => names.slice(0, 4).join(", ") + (names.length > 4 ? `, … (${names.length})` : "");

  // What was decided about a task's new adapters, as in the log.
  function adapted(entry) {
    const { kept, epochs, drift, budget, images, gain, error } = entry.adaptation;
    const parts = [kept ? "kept" : epochs ? "refused" : "undone", epochs === 1 ? "1 epoch" : `${epochs || "no"} epochs`];
    if (known(drift)) parts.push(`${Math.round(100 * drift / budget)} % of the gap budget`);
    if (known(gain)) parts.push(`gain ${gain.toFixed(4)} ± ${error.toFixed(4)} nats on ${images} images held back`);
    return `Task ${entry.task} adapted: ${parts.join(", ")}.`;
  }

  // The four pictures of a report; `boxes` maps accuracy, matrix, drift, similarity, seconds to elements (missing ones are left out),
  // and adaptation to where the newest one is told in words.
  function report(data, boxes) {
    const history = data.history || [], x = history.map(entry => entry.task);
    const gap = (entry, name) => entry.gap?.[name]?.after ?? null;
    if (boxes.accuracy) lines(boxes.accuracy, { title: "accuracy over tasks", x, low: 0, high: 1, series: [
      { name: "learned", color: "var(--learned)", values: history.map(entry => entry.accuracy) },
      { name: "untouched", color: "var(--untouched)", values: history.map(entry => entry.zero_shot), dash: "5 5" },
      { name: "before learning", color: "var(--before)", values: history.map(entry => entry.predict_before_learn), dash: "1 6" } ] });
    if (boxes.matrix) heatMap(boxes.matrix, data.matrix || [], x, history.map(entry => entry.classes));
    if (boxes.drift) lines(boxes.drift, { title: "gap drift over tasks", x, low: 0, span: .1, axis: share, limit: known(data.gap?.drift?.budget) ? { name: "budget", value: data.gap.drift.budget } : undefined,
      series: [{ name: "drift", color: "var(--learned)", values: history.map(entry => gap(entry, "drift")) }] });
    const newest = history.filter(entry => entry.adaptation).at(-1);
    if (boxes.adaptation) boxes.adaptation.textContent = newest ? adapted(newest) : "";
    const untouched = (entry, name) => entry.gap?.[name]?.untouched ?? null;
    if (boxes.similarity) lines(boxes.similarity, { title: "similarities over tasks", x, format: number, axis: value => value.toFixed(2),
      series: [["positive", "right name", "var(--learned)"], ["negative", "other names", "var(--before)"]].flatMap(([pair, name, color]) => [
        { name: name + ", untouched", color, values: history.map(entry => untouched(entry, pair)), dash: "1 6", quiet: true },
        { name, color, values: history.map(entry => gap(entry, pair)) } ]) });
    if (boxes.seconds) {
      const order = ["decode", "train", "compensate", "evaluate", "export"];
      const phases = [...new Set([...order, ...history.flatMap(entry => Object.keys(entry.seconds || {}))])]
        .filter(phase => history.some(entry => entry.seconds?.[phase]));
      if (phases.length) bars(boxes.seconds, history.map(entry => ({ name: entry.task, parts: entry.seconds || {} })), phases);
    }
  }

  return { report, lines, heatMap, bars, html, percent, number, shortList };
})();
