/* What happens in the browser alone: gestures and keys change the view, the view changes the URL.
   The server gives the rest. */
(() => {
  "use strict";
  let view = {};
  const NONE = () => window.dash_clientside.no_update;
  const FIELDS = ["run", "device", "t0", "t1", "at", "since", "block", "layer", "category", "other", "step",
    "sweep", "capacity", "batch_doublings", "head_doublings", "dtype_halvings"];
  /* Lasts from page to page, from device to device, and from run to run. */
  const LASTING = ["run", "device", "t0", "t1", "at"];
  const OF_DEVICES = ["run", "device"];
  const OF_RUNS = ["run", "other", "capacity", "batch_doublings", "head_doublings", "dtype_halvings"];

  const isSet = (value) => value !== null && value !== undefined;

  function query(of, fields) {
    const said = new URLSearchParams();
    for (const name of fields) {
      if (of[name] !== null && of[name] !== undefined && of[name] !== "") said.set(name, of[name]);
    }
    const text = said.toString();
    return text ? `?${text}` : "";
  }

  /* Two gestures may be told of at once: the second goes on from what the first has changed. */
  function become(changes) {
    view = { ...view, ...changes };
    return view;
  }

  function change(next) {
    window.dash_clientside.set_props("view", { data: become(next) });
  }

  /* The times that keys jump to; none on other pages. */
  function readMarks() {
    const holder = document.getElementById("marks");
    return holder ? JSON.parse(holder.dataset.marks) : null;
  }

  /* Half the width of the window around a peak: what is shown now if that is near, else a fortieth. */
  function around(at, marks) {
    const shown = (view.t1 ?? marks.end) - (view.t0 ?? 0);
    const half = Math.min(shown, marks.end / 20) / 2;
    return { t0: Math.max(0, Math.round(at - half)), t1: Math.min(marks.end, Math.round(at + half)) };
  }

  function step(direction) {
    const marks = readMarks();
    if (!marks) return;
    const middle = view.t0 === null || view.t0 === undefined ? null : (view.t0 + view.t1) / 2;
    const margin = middle === null ? 0 : (view.t1 - view.t0) / 50;
    const next = direction > 0
      ? marks.peaks.find((at) => middle === null || at > middle + margin)
      : [...marks.peaks].reverse().find((at) => middle === null || at < middle - margin);
    if (next !== undefined) change(around(next, marks));
  }

  /* What the picture over time shows, where an instant can be chosen on it: events and their bytes. */
  function readInstants() {
    const card = document.querySelector(`#timeline, [id*='"type":"pick"']`);
    const line = card?.querySelector(".js-plotly-plot")?._fullData?.find((trace) => trace.customdata);
    return line ? { events: Array.from(line.customdata, Number), sizes: Array.from(line.y) } : null;
  }

  /* Choose an instant as a click does: the one before or after, or the highest that is shown. */
  function look(direction) {
    const found = readInstants();
    if (!found) return;
    const { events, sizes } = found;
    const highest = events[sizes.indexOf(Math.max(...sizes))];
    const next = !direction || !isSet(view.at) ? highest
      : direction > 0 ? events.find((event) => event > view.at)
        : events.findLast((event) => event < view.at);
    if (next >= 0) change({ at: next, step: null, block: null });
  }

  const KEYS = {
    "p": () => {
      const marks = readMarks();
      if (marks && isSet(marks.peak)) change(around(marks.peak, marks));
    },
    "[": () => step(-1),
    "]": () => step(1),
    "b": () => look(0),
    ",": () => look(-1),
    ".": () => look(1),
    "0": () => { if (readMarks()) change({ t0: null, t1: null }); },
    "d": () => toggleScheme(),
    "/": () => document.getElementById("search")?.focus(),
    "Escape": () => {
      if (isSet(view.at) || isSet(view.since)) change({ at: null, since: null, block: null });
    },
    "?": () => window.dash_clientside.set_props("help", { opened: true }),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, textarea, select, [contenteditable=true]");
    const act = KEYS[event.key];
    const isModal = document.querySelector(".mantine-Modal-content") !== null;
    if (!act || typing || isModal) return;
    event.preventDefault();
    act();
  });

  /* What is typed into a list to choose from is looked for, not put after what is chosen. */
  document.addEventListener("focusin", (event) => {
    const input = event.target;
    if (!input.matches(".mantine-Select-input:not([readonly])")) return;
    // Selecting takes the focus: two lists would pass it to each other for ever.
    setTimeout(() => { if (document.activeElement === input) input.select(); });
  });

  /* What is drawn anew takes the focus with it; what stands in its place gets it back. */
  let focused = null;

  document.addEventListener("focusin", ({ target }) => {
    // The × of a list is gone once it was pressed: the list itself has the id.
    const list = target.closest(".mantine-Select-root")?.querySelector("input[id]");
    const holder = list ?? target.closest("[id]");
    const place = holder ? [...holder.getElementsByTagName(target.tagName)].indexOf(target) : -1;
    focused = { target, id: holder?.id, place };
  });

  document.addEventListener("focusout", ({ target }) => {
    // One that is removed is gone by then; one that is left has no claim.
    queueMicrotask(() => { if (focused?.target === target && target.isConnected) focused = null; });
  });

  function keepFocus() {
    if (!focused || focused.target.isConnected || document.activeElement !== document.body) return;
    const holder = document.getElementById(focused.id);
    const twins = holder?.getElementsByTagName(focused.target.tagName);
    (focused.place < 0 ? holder : twins?.[focused.place])?.focus({ preventScroll: true });
  }

  /* The arrows beside the numbers of pages are pictures, and the component takes no names for them. */
  function nameArrows() {
    for (const pages of document.querySelectorAll(".mantine-Pagination-root")) {
      const buttons = pages.querySelectorAll("button");
      buttons[0]?.setAttribute("aria-label", "previous page");
      buttons[buttons.length - 1]?.setAttribute("aria-label", "next page");
    }
  }

  new MutationObserver(() => { keepFocus(); nameArrows(); })
    .observe(document.documentElement, { childList: true, subtree: true });

  /* Nobody looks: the clock of the Live page stands still. */
  document.addEventListener("visibilitychange", () => {
    if (document.getElementById("live")) {
      window.dash_clientside.set_props("tick", { disabled: document.hidden });
    }
  });

  /* A dashboard that was stopped would leave the page silent: it is asked until it answers again. */
  const SILENT = "The dashboard no longer answers: it was stopped, or is out of reach. What is shown may be old.";
  const ANEW = "The dashboard was started anew: open the address that it printed.";
  const ask = window.fetch.bind(window);
  let isAsking = false;

  async function askAgain() {
    const icon = document.querySelector("link[rel=icon]").href;
    const text = await ask(icon, { cache: "no-store" })
      .then((answer) => (answer.status === 403 ? ANEW : ""), () => SILENT);
    showBanner(text);
    isAsking = text === SILENT;
    if (isAsking) setTimeout(askAgain, 2000);
  }

  function showBanner(text) {
    const shown = document.getElementById("banner");
    if (shown?.textContent === text) return;
    shown?.remove();
    if (!text) return;
    const banner = Object.assign(document.createElement("div"), { id: "banner", textContent: text });
    banner.setAttribute("role", "alert");
    document.body.append(banner);
  }

  window.fetch = async (...asked) => {
    let answer = null;
    try {
      answer = await ask(...asked);
      return answer;
    } finally {
      // Requests that are given up fail too, as when the page is left: so one fails twice.
      if (!isAsking && (answer === null || answer.status === 403)) {
        isAsking = true;
        setTimeout(askAgain, 300);
      }
    }
  };

  /* Files speak of what is shown: their query is that of the page. */
  document.addEventListener("click", (event) => {
    const file = event.target.closest("a[data-export]");
    if (file) file.href = `${file.getAttribute("href").split("?")[0]}${query(view, FIELDS)}`;
    const png = event.target.closest("button[data-png]");
    if (png) savePicture(png);
    const category = event.target.closest("button[data-category]");
    if (category) {
      const name = category.dataset.category;
      change({ category: view.category === name ? "" : name });
    }
    const block = event.target.closest("button[data-block]");
    if (block) {
      const number = Number(block.dataset.block);
      change({ block: view.block === number ? null : number });
    }
    if (event.target.closest(".shell-navbar a")) {
      window.dash_clientside.set_props("navbar-button", { opened: false });  // it covers a phone
    }
    if (event.target.closest("button[data-pin]")) {
      // With A set the drawer makes room for the click that says where B is.
      change(isSet(view.since) ? { since: null } : { since: view.at, at: null, block: null });
    }
  });

  function savePicture(button) {
    const graph = button.closest("section").querySelector(".js-plotly-plot");
    if (!graph) return;
    const paper = getComputedStyle(document.documentElement).getPropertyValue("--card").trim();
    const before = graph.layout.paper_bgcolor;
    const name = ["attnprof", view.run, button.dataset.png].join("-").replace(/[^\w.-]+/g, "-");
    window.Plotly.relayout(graph, { paper_bgcolor: paper })
      .then(() => window.Plotly.downloadImage(graph, {
        format: "png", scale: 2, width: graph.clientWidth, height: graph.clientHeight, filename: name,
      }))
      .finally(() => window.Plotly.relayout(graph, { paper_bgcolor: before ?? "rgba(0,0,0,0)" }));
  }

  function toggleScheme() {
    const root = document.documentElement;
    const next = root.dataset.mantineColorScheme === "dark" ? "light" : "dark";
    window.attnprofScheme.keep(next);
    window.dash_clientside.set_props("scheme", { forceColorScheme: next });
    const templates = JSON.parse(document.getElementById("attnprof-templates").textContent);
    for (const graph of document.querySelectorAll(".js-plotly-plot")) {
      window.Plotly.relayout(graph, { template: templates[next] });
    }
  }

  /* What plotly takes for one double click, and the last click on the timeline. */
  const DOUBLE_CLICK_MS = 300;
  let clicked = { time: -Infinity, before: {} };

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.attnprof = {
    /* The view's store is the truth; the address bar and the header follow it. */
    follow(data) {
      if (!data) return [NONE(), NONE(), NONE(), NONE()];
      view = data;
      const address = window.location.pathname + query(data, FIELDS);
      window.history.replaceState(window.history.state, "", address);
      for (const entry of document.querySelectorAll("button[data-category]")) {
        entry.setAttribute("aria-pressed", String(entry.dataset.category === data.category));
      }
      const one = (data.devices ?? []).length < 2;
      document.querySelector(".pick-device")?.classList.toggle("only", one);
      const lasting = query(data, LASTING);
      const links = window.dash_clientside.callback_context.outputs_list[3]
        .map((output) => output.id.path + lasting);
      return [data.run || null, data.devices ?? [], data.device || null, links];
    },

    /* As dcc.Link does. A dcc.Location would write an older address over that of the view. */
    go(href) {
      if (!href) return;
      window.history.pushState({}, "", href);
      window.dispatchEvent(new CustomEvent("_dashprivate_pushstate"));
      window.scrollTo(0, 0);
    },

    choose(run, device, found) {
      const by = window.dash_clientside.callback_context.triggered_id;
      const here = window.location.pathname;
      if (by === "run" && run && run !== view.run) return here + query({ ...view, run }, OF_RUNS);
      if (by === "device" && device && device !== view.device) {
        return here + query({ ...view, device }, OF_DEVICES);
      }
      if (by === "search" && found) return found;
      return NONE();
    },

    zoom(relayout, data) {
      if (!relayout || !data) return NONE();
      // A double click shows all again; its first click has chosen an instant by then.
      const isDouble = performance.now() - clicked.time < 2 * DOUBLE_CLICK_MS;
      const whole = { t0: null, t1: null, ...(isDouble ? clicked.before : {}) };
      if (relayout["xaxis.autorange"]) return become(whole);
      const range = relayout["xaxis.range"]
        ?? [relayout["xaxis.range[0]"], relayout["xaxis.range[1]"]];
      if (range[0] === undefined || range[1] === undefined) return NONE();
      const [t0, t1] = range.map((seconds) => Math.round(seconds * 1e9));
      const marks = readMarks();
      const isWhole = marks !== null && t0 <= 0 && t1 >= marks.end;
      const next = isWhole ? whole : { t0: Math.max(0, t0), t1 };
      if (next.t0 === (data.t0 ?? null) && next.t1 === (data.t1 ?? null)) return NONE();
      return become(next);
    },

    click(click, opened, data) {
      const by = window.dash_clientside.callback_context.triggered_id;
      if (by === "timeline" && click) {
        const point = click.points.find((p) => isSet(p.customdata));
        const time = performance.now();
        if (!point || time - clicked.time < DOUBLE_CLICK_MS) return NONE();
        clicked = { time, before: { at: view.at ?? null, block: view.block ?? null } };
        return become({ at: Math.max(0, Number(point.customdata)), block: null });
      }
      if (by === "drawer" && opened === false && isSet(data.at)) {
        return become({ at: null, since: null, block: null });
      }
      return NONE();
    },

    /* A control's value is a field of the view. */
    control(values, data) {
      const by = window.dash_clientside.callback_context.triggered_id;
      const input = window.dash_clientside.callback_context.triggered[0];
      if (!by || !data) return NONE();
      const value = isSet(input.value) ? input.value : "";
      // A step and an instant that was clicked ("at" in the list) take each other's place.
      const isInstant = by.field === "step";
      const shown = isInstant && isSet(data.at) ? "at" : data[by.field] ?? "";
      if (String(shown) === String(value)) return NONE();
      return { ...data, [by.field]: value, ...(isInstant ? { at: null } : {}) };
    },

    pick(clicks, data) {
      const click = window.dash_clientside.callback_context.triggered[0]?.value;
      const point = click?.points.find((p) => isSet(p.customdata));
      if (!point || !data) return NONE();
      return become({ at: Math.max(0, Number(point.customdata)), step: null });
    },

    /* Of a heatmap Dash passes on where it was clicked, and not what its cell leads to. */
    lead() {
      const { triggered, triggered_id: id } = window.dash_clientside.callback_context;
      const point = triggered[0]?.value?.points[0];
      if (!point) return NONE();
      const card = document.getElementById(JSON.stringify({ graph: id.graph, type: id.type }));
      const { x, customdata } = card.querySelector(".js-plotly-plot").data[point.curveNumber];
      return customdata[point.y]?.[Array.from(x).indexOf(point.x)]?.[1] ?? NONE();
    },

    theme(clicks) {
      if (clicks) toggleScheme();
    },

    help(clicks) {
      return clicks ? true : NONE();
    },

    menu(opened, navbar) {
      return { ...navbar, collapsed: { mobile: !opened, desktop: false } };
    },
  };
})();
