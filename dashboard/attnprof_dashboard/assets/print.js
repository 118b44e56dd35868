/* On paper, figures are as wide as the page, and dark on white. */
(() => {
  "use strict";
  const holder = document.getElementById("attnprof-templates");
  const templates = holder ? JSON.parse(holder.textContent) : {};
  const root = document.documentElement;

  function relayout(find) {
    for (const graph of document.querySelectorAll(".js-plotly-plot")) {
      window.Plotly.relayout(graph, find(graph));
    }
  }

  /* A saved page has one template, in which its figures are drawn. */
  const pick = (scheme) => (templates[scheme] ? { template: templates[scheme] } : {});

  addEventListener("beforeprint", () => {
    root.classList.add("on-paper"); // the page's width is not known yet
    relayout((graph) => ({ width: graph.parentElement.clientWidth, ...pick("light") }));
  });

  addEventListener("afterprint", () => {
    root.classList.remove("on-paper");
    const scheme = root.dataset.mantineColorScheme;
    relayout(() => ({ width: null, autosize: true, ...pick(scheme) }));
  });
})();
