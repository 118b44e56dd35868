/* Runs before anything is drawn, so that a dark page does not flash white. */
(() => {
  "use strict";
  const NAME = "attnprof-theme";
  const kept = document.cookie.split("; ").find((part) => part.startsWith(`${NAME}=`));
  let scheme = kept?.split("=")[1];
  if (scheme !== "dark" && scheme !== "light") {
    scheme = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  }
  function keep(next) {
    document.cookie = `${NAME}=${next}; path=/; max-age=31536000; SameSite=Strict`;
  }
  keep(scheme);
  document.documentElement.dataset.mantineColorScheme = scheme;
  window.attnprofScheme = { keep };
})();
