"use strict";
(() => {
  const label = document.getElementById("live");
  let known = null;
  const place = "mim-scroll";
  try {
    const kept = sessionStorage.getItem(place);
    if (kept !== null) window.scrollTo(0, Number(kept));
    sessionStorage.removeItem(place);
  } catch { }
  const ask = async () => {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      const found = await answer.text();
      if (known !== null && found !== known) {
        try { sessionStorage.setItem(place, String(window.scrollY)); } catch { }
        location.reload();
        return;
      }
      known = found;
      label.textContent = "Live.";
    } catch {
      label.textContent = "The server has stopped; this is what it showed last.";
    }
    setTimeout(ask, 3000);
  };
  ask();
})();
