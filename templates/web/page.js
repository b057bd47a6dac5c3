(function () {
  "use strict";

  // Reads the page again every few seconds, while somebody looks at it.
  const EVERY_MS = 5000;
  const live = document.getElementById("live");

  async function refresh() {
    if (document.hidden) {
      return;
    }
    // What somebody is filling in must not be taken from under their hands.
    const main = document.getElementById("main");
    if (main.contains(document.activeElement) || main.querySelector(":checked")) {
      return;
    }
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (!answer.ok) {
        throw new Error("status " + answer.status);
      }
      const text = await answer.text();
      const page = new DOMParser().parseFromString(text, "text/html");
      main.replaceChildren(...page.getElementById("main").childNodes);
      live.textContent = "live, " + new Date().toLocaleTimeString();
      live.classList.remove("lost");
    } catch (error) {
      live.textContent = "no connection; shown is the last answer";
      live.classList.add("lost");
    }
  }

  window.setInterval(refresh, EVERY_MS);
  live.textContent = "live";
})();
