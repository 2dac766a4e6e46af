// Reading aids of a pertoken page: tooltips that compare a token over stacked rows, arrow keys, light and dark.
// Without this script the page still shows everything: colours are CSS and each token carries a title.
(() => {
  const tip = document.createElement("div");
  tip.className = "pt-tip";
  tip.hidden = true;
  document.body.append(tip);
  const tokens = (row) => [...row.querySelectorAll(".t")];
  const twins = (token) => {
    const at = tokens(token.closest(".pt-row")).indexOf(token);
    return [...token.closest(".pt-heat").querySelectorAll(".pt-row")].map((row) => tokens(row)[at]);
  };
  const line = (left, right, mine) => {
    const div = document.createElement("div");
    if (mine) div.className = "me";
    for (const text of [left, right]) div.append(Object.assign(document.createElement("span"), { textContent: text }));
    tip.append(div);
  };
  const hide = () => {
    tip.hidden = true;
    document.querySelectorAll(".t.on").forEach((t) => t.classList.remove("on"));
  };
  const show = (token) => {
    hide();
    tip.replaceChildren();
    if (token.title) token.removeAttribute("title"); // the same words stay in aria-label
    line(token.dataset.t, "id " + token.dataset.i);
    for (const twin of twins(token)) {
      if (!twin) continue;
      twin.classList.add("on");
      line(twin.closest(".pt-row").dataset.who, twin.dataset.v, twin === token);
    }
    tip.hidden = false;
    const box = token.getClientRects()[0] || token.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = left + "px";
    tip.style.top = (above > 8 ? above : box.bottom + 8) + "px";
  };
  document.addEventListener("pointerover", (event) => {
    const token = event.target.closest?.(".t");
    if (token) show(token);
    else if (!document.activeElement?.classList.contains("t")) hide();
  });
  document.addEventListener("focusin", (event) => event.target.classList.contains("t") && show(event.target));
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => {
    const token = event.target;
    if (!token.classList?.contains("t")) return;
    if (event.key === "Escape") return hide();
    const row = tokens(token.closest(".pt-row"));
    const rows = twins(token);
    const step = { ArrowRight: [row, 1], ArrowLeft: [row, -1], ArrowDown: [rows, 1], ArrowUp: [rows, -1] }[event.key];
    const next = step && step[0][step[0].indexOf(token) + step[1]];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  document.querySelector(".pt-theme")?.addEventListener("click", () => {
    const dark = getComputedStyle(document.body).backgroundColor !== "rgb(255, 255, 255)";
    document.documentElement.style.colorScheme = dark ? "light" : "dark";
  });
})();
