/** What the keyboard does: arrow keys among results and tabs, and "/". */

const plain = (event) => !event.ctrlKey && !event.metaKey && !event.altKey;

/** Arrow keys, Home and End among the items of ``area``, in whatever rows they lie; one of them is in the Tab order. */
export function movable(area) {
  area.addEventListener('keydown', (event) => {
    const here = event.target.closest('.item');
    if (!here || !plain(event)) return;
    const items = [...area.querySelectorAll('.item')];
    const at = items.indexOf(here);
    const found = {
      ArrowLeft: () => items[at - 1], ArrowRight: () => items[at + 1], Home: () => items[0], End: () => items.at(-1),
      ArrowUp: () => acrossFrom(here, items, -1), ArrowDown: () => acrossFrom(here, items, 1),
    }[event.key];
    if (!found) return;
    event.preventDefault();
    found()?.focus();
  });
  area.addEventListener('focusin', (event) => {
    const here = event.target.closest('.item');
    if (!here) return;
    for (const item of area.querySelectorAll('.item[tabindex="0"]')) item.tabIndex = -1;
    here.tabIndex = 0;
  });
}

/** The item in the next row up (-1) or down (1) that lies nearest to being above or below. */
function acrossFrom(here, items, way) {
  const place = (item) => {
    const box = item.getBoundingClientRect();
    return { item, y: way * box.top, x: box.left + box.width / 2 };
  };
  const from = place(here);
  const beyond = items.map(place).filter(({ y }) => y > from.y + 4);
  const row = Math.min(...beyond.map(({ y }) => y));
  return beyond.filter(({ y }) => y < row + 4).sort((a, b) => Math.abs(a.x - from.x) - Math.abs(b.x - from.x))[0]?.item;
}

/** Left and right arrow keys go to the next tab that can be chosen, and choose it. */
export function tabKeys(list) {
  list.addEventListener('keydown', (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    const tabs = [...list.querySelectorAll('[role=tab]:enabled')];
    const next = tabs[(tabs.indexOf(event.target) + way + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
}

/** "/" goes to ``field`` from wherever nothing is being written. */
export function slash(field) {
  document.addEventListener('keydown', (event) => {
    if (event.key !== '/' || !plain(event) || event.target.closest('input, select, textarea, dialog')) return;
    event.preventDefault();
    field.focus();
    field.select();
  });
}
