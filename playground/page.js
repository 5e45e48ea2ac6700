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

  // Gradio gives each radio button a name of its own, and a new one when it is chosen. With one name
  // they are a group to the browser: one stop of the tab key, and arrow keys that move in it.
  for (const group of document.querySelectorAll(".levels")) {
    const join = () => {
      for (const each of group.querySelectorAll("input")) if (each.name !== group.id) each.name = group.id;
    };
    new MutationObserver(join).observe(group, { childList: true, subtree: true, attributeFilter: ["name"] });
    join();
  }

  // On a narrow screen what was drawn is below what was pressed.
  new MutationObserver(() => {
    if (matchMedia("(max-width: 940px)").matches && document.querySelector("#results .facts, #results .alert"))
      document.querySelector("#results :is(.stage, .alert)").scrollIntoView({ behavior: "smooth" });
  }).observe(document.getElementById("results"), { childList: true, subtree: true });

  for (const group of document.querySelectorAll(".levels"))
    group.setAttribute("aria-label", group.querySelector("[data-testid=block-info]").innerText);
  document.getElementById("told").setAttribute("aria-live", "polite");
  document.documentElement.lang = "en";
}
