"use strict";
// The picture is complete without this script; it adds reading off values, and zoom.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plot = document.querySelector(".plot");
  if (!data || !plot) return;
  const find = (selector) => document.querySelector(selector);
  const svg = plot.querySelector("svg");
  const cursor = find(".cursor"), chosen = find(".chosen"), readout = find(".tools output");
  const values = document.querySelectorAll(".legend b");
  const times = data.micros, span = Math.max(1, times[times.length - 1]);
  const peakAt = data.peak * span;
  let from = 0, to = span, at = indexOf(peakAt), pressed = null;

  // As attnprof.units.format_bytes has it.
  function formatBytes(size) {
    if (size < 1024) return size + " B";
    const units = [["KiB", 1024, 1], ["MiB", 1048576, 1], ["GiB", 1073741824, 2]];
    for (const [unit, factor, digits] of units) {
      const text = (size / factor).toFixed(digits);
      if (Number(text) < 1024) return text + " " + unit;
    }
    return (size / 1099511627776).toFixed(2) + " TiB";
  }

  function unitOf(micros) {
    return micros >= 1e6 ? [1e6, "s"] : micros >= 1e3 ? [1e3, "ms"] : [1, "µs"];
  }

  function indexOf(micros) {
    let low = 0, high = times.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (times[middle] <= micros) low = middle; else high = middle - 1;
    }
    // Several instants may share a microsecond; the highest of them is the one to read.
    let best = low;
    for (let i = low; i >= 0 && times[i] === times[low]; i--) {
      if (total(i) > total(best)) best = i;
    }
    return best;
  }

  function total(index) {
    let sum = 0;
    for (const row of data.sizes) sum += row[index];
    return sum;
  }

  const share = (micros) => (micros - from) / (to - from);
  const percent = (part) => (100 * part).toFixed(3) + "%";

  function place(element, micros) {
    const part = share(micros);
    element.hidden = part < 0 || part > 1;
    element.style.left = percent(part);
    return part;
  }

  function showInstant(index, isPeak) {
    at = index;
    const [factor, unit] = unitOf(span);
    const when = (times[index] / factor).toFixed(unit === "µs" ? 0 : 3) + " " + unit;
    readout.textContent = (isPeak ? "At the peak, " : "At ") + when + ": " + formatBytes(total(index));
    values.forEach((element, row) => { element.textContent = formatBytes(data.sizes[row][index]); });
    place(cursor, times[index]);
    if (isPeak) cursor.hidden = true;
  }

  const showPeak = () => showInstant(indexOf(peakAt), true);

  function drawAxis() {
    const axis = find(".xaxis");
    axis.textContent = "";
    const [factor, unit] = unitOf(to - from);
    const most = Math.max(2, Math.floor(plot.clientWidth / 70));
    const raw = (to - from) / factor / most;
    const power = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = [1, 2, 5, 10].find((s) => s * power >= raw * 0.999) * power;
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    for (let n = Math.ceil(from / factor / step - 1e-9); n * step * factor <= to * 1.000001; n++) {
      const label = document.createElement("span");
      label.textContent = (n * step).toFixed(digits) + " " + unit;
      label.style.left = percent(share(n * step * factor));
      axis.append(label);
    }
  }

  function drawSteps() {
    document.querySelectorAll(".steps i").forEach((element, n) => {
      const [number, begin, end] = data.steps[n];
      const left = Math.max(0, share(begin * span)), right = Math.min(1, share(end * span));
      element.hidden = right <= left;
      element.style.left = percent(left);
      element.style.width = percent(right - left);
      const room = (right - left) * plot.clientWidth;
      element.textContent = room > 10 + 7 * String(number).length ? number : "";
    });
  }

  function draw() {
    svg.setAttribute("viewBox", data.width * from / span + " 0 " + data.width * (to - from) / span + " " + data.height);
    drawAxis();
    drawSteps();
    const part = place(find(".peakline"), peakAt);
    const flag = find(".flag span");
    flag.hidden = part < 0 || part > 1;
    flag.style.left = percent(part);
    flag.style.transform = "translateX(" + percent(-part) + ")";
    if (!cursor.hidden) place(cursor, times[at]);
  }

  function zoom(begin, end) {
    const least = Math.max(1, span / 5000);
    from = Math.max(0, begin);
    to = Math.min(span, Math.max(end, from + least));
    from = Math.max(0, Math.min(from, to - least));
    draw();
  }

  function timeAt(event) {
    const box = plot.getBoundingClientRect();
    const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    return from + part * (to - from);
  }

  plot.addEventListener("pointermove", (event) => {
    const now = timeAt(event);
    showInstant(indexOf(now), false);
    if (pressed === null) return;
    const begin = Math.min(pressed, now), end = Math.max(pressed, now);
    chosen.hidden = false;
    chosen.style.left = percent(share(begin));
    chosen.style.width = percent(share(end) - share(begin));
  });
  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    pressed = timeAt(event);
    if (event.pointerType === "mouse") plot.setPointerCapture(event.pointerId);
    showInstant(indexOf(pressed), false);
  });
  plot.addEventListener("pointerup", (event) => {
    const begin = pressed, end = timeAt(event);
    pressed = null;
    chosen.hidden = true;
    if (begin !== null && Math.abs(share(end) - share(begin)) * plot.clientWidth > 8) {
      zoom(Math.min(begin, end), Math.max(begin, end));
    }
  });
  plot.addEventListener("pointercancel", () => { pressed = null; chosen.hidden = true; });
  plot.addEventListener("pointerleave", () => { if (pressed === null) showPeak(); });
  plot.addEventListener("dblclick", () => zoom(0, span));
  plot.addEventListener("keydown", (event) => {
    const wide = to - from;
    const actions = {
      ArrowLeft: () => showInstant(Math.max(0, at - 1), false),
      ArrowRight: () => showInstant(Math.min(times.length - 1, at + 1), false),
      "+": () => zoom(times[at] - wide / 4, times[at] + wide / 4),
      "-": () => zoom(from - wide / 2, to + wide / 2),
      Escape: () => { zoom(0, span); showPeak(); },
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
    if (times[at] < from || times[at] > to) zoom(times[at] - wide / 2, times[at] + wide / 2);
  });
  find("#whole").addEventListener("click", () => { zoom(0, span); showPeak(); });
  find("#near").addEventListener("click", () => {
    const step = data.steps.find((s) => s[1] <= data.peak && data.peak <= s[2]);
    if (step) zoom(step[1] * span, step[2] * span);
    else zoom(peakAt - span / 20, peakAt + span / 20);
    showPeak();
  });
  window.addEventListener("resize", draw);
  document.documentElement.classList.add("has-script");
  draw();
  showPeak();
})();
