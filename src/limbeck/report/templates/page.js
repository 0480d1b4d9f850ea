"use strict";
(() => {
  const root = document.documentElement;

  // Theme: auto (the system's), light, dark. Storage may be forbidden on file:// pages.
  const button = document.querySelector(".theme");
  const themes = ["auto", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("limbeck-theme"); } catch { return null; } };
  const show = (theme) => {
    root.dataset.theme = theme;
    button.querySelector(".word").textContent = theme;
    button.setAttribute("aria-label", `Colours: ${theme}. Press to change.`);
    try { localStorage.setItem("limbeck-theme", theme); } catch { /* the choice lasts as long as the page */ }
  };
  show(themes.includes(stored()) ? stored() : "auto");
  button.hidden = false;
  button.addEventListener("click", () => show(themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length]));

  for (const copy of document.querySelectorAll(".copy")) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      const code = copy.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        const range = document.createRange();
        range.selectNodeContents(code);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        document.execCommand("copy");
      }
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1600);
    });
  }

  const tip = document.getElementById("tip");
  const follow = (event) => {
    const target = event.target.closest?.("[data-tip]");
    tip.hidden = !target;
    if (!target) return;
    tip.textContent = target.dataset.tip;
    const { innerWidth: wide } = window;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, wide - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
  };
  document.addEventListener("pointermove", follow);
  document.addEventListener("pointerdown", follow);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  addEventListener("beforeprint", () => document.querySelectorAll("details:not(.numbers)").forEach((d) => { d.open = true; }));
})();
