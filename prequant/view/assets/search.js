// Search by name: of nodes, ops, modules and weights at the stage that is shown.

const FOUND_AT_MOST = 40;

function search(words) {
  const parts = words.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  if (!parts.length) return found;
  const matches = (...texts) => parts.every((part) => texts.some((each) => each.toLowerCase().includes(part)));
  for (const block of current().blocks.values()) {
    if (found.length < FOUND_AT_MOST && block.parent && matches(block.path, block.kind)) found.push([block.id, block.path || block.label, block.kind]);
  }
  for (const node of current().nodes.values()) {
    const { record } = node;
    if (found.length >= FOUND_AT_MOST) break;
    if (matches(record.name, record.target, record.module, ...record.uses)) found.push([node.id, record.name, record.uses.join(", ") || record.module]);
  }
  return found;
}

let picked = 0;

function showFound() {
  const found = search(byId("search").value);
  const rows = found.map(([id, name, where], i) => {
    const row = make("li", { role: "option", id: `found-${i}`, "aria-selected": i === picked }, name, make("small", {}, where));
    row.dataset.id = id;
    row.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      pick(id);
    });
    return row;
  });
  if (!rows.length && byId("search").value.trim()) rows.push(make("li", { "aria-disabled": "true" }, "nothing of that name at this stage"));
  byId("found").replaceChildren(...rows);
  byId("found").hidden = !rows.length;
  byId("search").setAttribute("aria-expanded", rows.length > 0);
  byId("search").setAttribute("aria-activedescendant", found.length ? `found-${picked}` : "");
}

function pick(id) {
  closeSearch();
  reveal(id);
}

function closeSearch() {
  byId("found").hidden = true;
  byId("search").setAttribute("aria-expanded", "false");
  byId("search").blur();
}

byId("search").addEventListener("input", () => {
  picked = 0;
  showFound();
});
byId("search").addEventListener("blur", () => (byId("found").hidden = true));
byId("search").addEventListener("keydown", (event) => {
  const rows = byId("found").querySelectorAll("[data-id]");
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    picked = (picked + (event.key === "ArrowDown" ? 1 : -1) + rows.length) % Math.max(1, rows.length);
    showFound();
    const row = byId(`found-${picked}`);
    if (row) row.scrollIntoView({ block: "nearest" });
  } else if (event.key === "Enter" && rows[picked]) pick(rows[picked].dataset.id);
  else if (event.key === "Escape") {
    byId("search").value = "";
    closeSearch();
  }
});
