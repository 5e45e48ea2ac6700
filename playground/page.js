// What the page does by itself: move the boundary, copy, say aloud, and go to what is new.
() => {
  document.addEventListener("input", ({ target }) => {
    if (target.matches(".cut"))
      target.closest(".frame").style.setProperty("--cut", target.value + "%");
  });

  document.addEventListener("click", async ({ target }) => {
    if (!target.matches(".copy")) return;
    const text = target.nextElementSibling;
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {  // without TLS there is no clipboard: the text is selected instead
      getSelection().selectAllChildren(text);
      document.execCommand("copy");
    }
    target.textContent = "Copied";
    setTimeout(() => (target.textContent = "Copy"), 2000);
  });

  // Gradio gives each radio button a name of its own, so arrow keys would not move between them.
  document.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!step || !event.target.matches(".levels input")) return;
    event.preventDefault();
    const all = [...event.target.closest(".levels").querySelectorAll("input")];
    const next = all[(all.indexOf(event.target) + step + all.length) % all.length];
    next.focus();
    next.click();
  });

  // On a narrow screen what was drawn is below what was pressed.
  new MutationObserver(() => {
    if (matchMedia("(max-width: 940px)").matches && document.querySelector("#results .facts, #results .alert"))
      document.getElementById("seen").scrollIntoView({ behavior: "smooth" });
  }).observe(document.getElementById("results"), { childList: true, subtree: true });

  for (const group of document.querySelectorAll(".levels"))
    group.setAttribute("aria-label", group.querySelector("[data-testid=block-info]").innerText);
  document.getElementById("told").setAttribute("aria-live", "polite");
  document.documentElement.lang = "en";
}
