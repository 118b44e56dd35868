"use strict";
// The picture is complete without this script; it adds reading off values, and hiding lines.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plot = document.querySelector(".growth .plot");
  if (!data || !plot) return;
  const cursor = plot.querySelector(".cursor");
  const readout = document.querySelector(".tools output");
  const values = document.querySelectorAll(".legend b");
  const lengths = [...new Set(data.points.map((point) => point.n))].sort((a, b) => a - b);
  const longest = Math.max(...data.points.filter((point) => point.done).map((point) => point.n));
  const atRest = readout.textContent, restValues = [...values].map((element) => element.textContent);
  const span = Math.log(data.high / data.low);
  const SNAP_PIXELS = 14;
  let at = null;

  // As attnprof.units.format_bytes has it.
  function formatBytes(size) {
    if (size < 1024) return Math.round(size) + " B";
    const units = [["KiB", 1024, 1], ["MiB", 1048576, 1], ["GiB", 1073741824, 2]];
    for (const [unit, factor, digits] of units) {
      const text = (size / factor).toFixed(digits);
      if (Number(text) < 1024) return text + " " + unit;
    }
    return (size / 1099511627776).toFixed(2) + " TiB";
  }

  const place = (n) => Math.log(n / data.low) / span;
  const lengthAt = (part) => data.low * Math.exp(part * span);

  function byLaw(row, n) {
    const sizes = data.laws[row].map((laws) => {
      const [, c0, c1, c2] = laws.find(([last]) => n <= last) || laws[laws.length - 1];
      return c0 + c1 * n + c2 * n * n;
    });
    return sizes.length ? Math.max(...sizes) : null;
  }

  // Along the straight line that joins two predicted lengths in the picture.
  function predict(n) {
    const found = data.predicted.findIndex(([length]) => length >= n);
    const after = found < 0 ? data.predicted.length - 1 : found;
    if (after < 1) return null;
    const [[n0, y0], [n1, y1]] = [data.predicted[after - 1], data.predicted[after]];
    return y0 * Math.pow(y1 / y0, Math.log(n / n0) / Math.log(n1 / n0));
  }

  const estimate = (row, n) => (row === 0 && n > longest ? predict(n) : byLaw(row, n));

  function describe(n) {
    const found = data.points.filter((point) => point.n === n);
    const parts = found.map((point) => point.done
      ? point.source + " " + formatBytes(point.sizes[0])
      : point.source + " " + point.status);
    const size = estimate(0, n);
    if (size !== null) parts.push((n > longest ? "predicted " : "law ") + formatBytes(size));
    return "n = " + n.toLocaleString("en-US") + ": " + (parts.join(", ") || "not known");
  }

  function show(n) {
    at = n;
    cursor.hidden = false;
    cursor.style.left = (100 * place(n)).toFixed(3) + "%";
    readout.textContent = describe(n);
    const known = data.points.find((point) => point.n === n && point.done);
    values.forEach((element, row) => {
      const size = known ? known.sizes[row] : estimate(row, n);
      element.textContent = size === null || size === undefined ? "–" : formatBytes(size);
    });
  }

  function rest() {
    at = null;
    cursor.hidden = true;
    readout.textContent = atRest;
    values.forEach((element, row) => { element.textContent = restValues[row]; });
  }

  function lengthUnder(event) {
    const box = plot.getBoundingClientRect();
    const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const near = lengths.find((n) => Math.abs(place(n) - part) * box.width < SNAP_PIXELS);
    return near || Math.max(1, Math.round(lengthAt(part)));
  }

  plot.addEventListener("pointermove", (event) => show(lengthUnder(event)));
  plot.addEventListener("pointerdown", (event) => show(lengthUnder(event)));
  plot.addEventListener("pointerleave", rest);
  plot.addEventListener("keydown", (event) => {
    const now = at === null ? longest : at;
    const actions = {
      ArrowLeft: () => show([...lengths].reverse().find((n) => n < now) || lengths[0]),
      ArrowRight: () => show(lengths.find((n) => n > now) || lengths[lengths.length - 1]),
      Escape: rest,
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  });
  document.querySelectorAll("[data-toggles]").forEach((box) => {
    box.addEventListener("change", () => {
      plot.querySelectorAll("[data-series]").forEach((element) => {
        const isOwn = element.getAttribute("data-series") === box.getAttribute("data-toggles");
        if (isOwn) element.classList.toggle("off", !box.checked);
      });
    });
  });
  document.documentElement.classList.add("has-script");
})();
